# `make help` lists the targets. What they build goes into target/ (cargo), .venv/ and build/.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
# The targets use all cores themselves; their output stays in order.
.NOTPARALLEL:
.DELETE_ON_ERROR:

PREFIX ?= /usr/local
INCLUDEDIR ?= $(PREFIX)/include
LIBDIR ?= $(PREFIX)/lib
DESTDIR ?=
PYTHON ?= python3
CARGO ?= cargo
CARGO_FLAGS ?= --locked
FUZZ_SECONDS ?= 30
# CPU=1 builds without the CUDA kernels, and so without nvcc.
CPU ?=
ifneq ($(CPU),)
CARGO_FLAGS += --no-default-features
endif

TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))
VENV := .venv
PY := $(VENV)/bin/python
# The last thing that setup builds.
EXTENSION := bindings/python/mlstm/_lib/mlstm_xla.so
STAGE := $(abspath build/stage)
REQUIREMENTS := bindings/python/requirements-dev.txt tests/requirements.txt
C_FILES := $(wildcard bindings/*/*.cpp xla_ffi/*.cpp examples/c/*.[ch] examples/cpp/*.cpp examples/cpp/*.h \
	tests/c/*.[ch] tests/emulator/*.cc tests/emulator/*.h)
# A Debian-like machine may lack pkg-config and cmake; the wheels stand in.
TOOLS := PATH="$$PATH:$(abspath $(VENV))/bin" PKG_CONFIG_PATH="$(STAGE)/lib/pkgconfig"
heading = @printf '\n==> %s\n' "$(1)"

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16
	@echo
	@echo 'Variables: PREFIX DESTDIR LIBDIR INCLUDEDIR (install), CC CXX PYTHON CARGO, FUZZ_SECONDS,'
	@echo '  EMULATOR_CASES, CPU=1 (no CUDA kernels), NVCC, CUDA_HOME'

# ---- Building ---------------------------------------------------------------------------------

.PHONY: setup
setup: $(EXTENSION) ## build everything: the library, ./.venv with torch and jax, the Python package

# The kernels' compiler: the caller's ($NVCC, $CUDA_HOME or PATH), else NVIDIA's wheels. All five
# of one version: by themselves they would come in versions that do not fit each other.
NVCC_WHEELS := $(addsuffix ==13.0.*,nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm \
	nvidia-cuda-runtime nvidia-cuda-cccl)
HAVE_NVCC := $(or $(CPU),$(NVCC),$(wildcard $(CUDA_HOME)/bin/nvcc),$(shell command -v nvcc))
NVCC_READY := $(if $(HAVE_NVCC),,$(VENV)/.nvcc)

$(VENV)/.nvcc:
	$(call heading,CUDA compiler in $(VENV))
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check $(NVCC_WHEELS)
	@touch $@

.PHONY: lib
lib: $(TARGET)/release/libmlstm.so ## build libmlstm.so and libmlstm.a only

.PHONY: FORCE
# cargo knows what is stale, and leaves the file's time alone when nothing is.
$(TARGET)/release/libmlstm.so: FORCE $(NVCC_READY)
	$(call heading,libmlstm (release))
	$(CARGO) build --release $(CARGO_FLAGS)

# The stamp lives in the venv, so that removing it starts afresh.
$(VENV)/.requirements: $(REQUIREMENTS)
	$(call heading,Python packages in $(VENV): torch and jax are large and can take minutes)
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || \
	  { echo "python3 -m venv does not work: install it (Debian: apt install python3-venv)"; exit 1; }
	$(PY) -m pip install --disable-pip-version-check $(addprefix -r ,$(REQUIREMENTS))
	@touch $@

$(EXTENSION): $(VENV)/.requirements $(TARGET)/release/libmlstm.so include/mlstm.h \
		bindings/build.py $(wildcard bindings/torch/* xla_ffi/*) pyproject.toml setup.py
	$(call heading,PyTorch and JAX extensions and Python package)
	$(PY) bindings/build.py --library $(TARGET)/release/libmlstm.so
	$(PY) -m pip install --disable-pip-version-check --quiet --no-build-isolation --no-deps -e .

.PHONY: header
header: $(NVCC_READY) ## regenerate include/mlstm.h from src/capi
	MLSTM_UPDATE_HEADER=1 $(CARGO) test $(CARGO_FLAGS) --test header

# ---- Installing -------------------------------------------------------------------------------

INSTALL = PREFIX="$(PREFIX)" INCLUDEDIR="$(INCLUDEDIR)" LIBDIR="$(LIBDIR)" DESTDIR="$(DESTDIR)" \
	TARGET="$(TARGET)" packaging/install.sh

.PHONY: install
# Builds only what is missing: root often has no cargo.
install: ## install header, libraries, pkg-config and CMake files under PREFIX (and DESTDIR)
	@test -e $(TARGET)/release/libmlstm.so || $(MAKE) lib
	@$(INSTALL) install

.PHONY: uninstall
uninstall: ## remove what install put there
	@$(INSTALL) uninstall

# Where the tests find the library, as a user would.
.PHONY: stage
stage: lib
	@rm -rf $(STAGE)
	@$(MAKE) install PREFIX=$(STAGE) DESTDIR= INCLUDEDIR=$(STAGE)/include LIBDIR=$(STAGE)/lib

# ---- Testing ----------------------------------------------------------------------------------

.PHONY: test
test: setup check test-rust test-emulator test-abi test-c test-install test-readme test-python \
		test-jax ## all tests

.PHONY: check
check: $(VENV)/.requirements $(NVCC_READY) ## formatting and lints
	$(call heading,Formatting and lints)
	$(CARGO) fmt --check
	$(CARGO) clippy $(CARGO_FLAGS) --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc $(CARGO_FLAGS) --no-deps
	$(VENV)/bin/clang-format --dry-run -Werror $(C_FILES)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

.PHONY: format
format: $(VENV)/.requirements ## format Rust, C, C++ and Python
	$(CARGO) fmt
	$(VENV)/bin/clang-format -i $(C_FILES)
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .

.PHONY: test-rust
test-rust: $(NVCC_READY) ## Rust unit, integration and documentation tests, and the example
	$(call heading,Rust)
	$(CARGO) test $(CARGO_FLAGS)
	$(CARGO) run $(CARGO_FLAGS) --example chunkwise

.PHONY: test-emulator
# Needs nothing but Python and a C++ compiler.
test-emulator: ## the Hopper forward's kernels on the CPU, in an emulator
	$(call heading,Kernels in the emulator)
	$(PYTHON) -B tests/emulator/run.py build/emulator

.PHONY: test-abi
test-abi: stage ## exported symbols, SONAME, dependencies
	$(call heading,ABI)
	$(PYTHON) tests/abi/check.py $(STAGE)/lib include/mlstm.h include/symbols.txt

.PHONY: test-c
test-c: stage $(VENV)/.requirements ## header and C tests, plain and under AddressSanitizer
	$(call heading,C)
	@$(TOOLS) tests/c/run.sh build/c

.PHONY: test-install
test-install: stage $(VENV)/.requirements ## C and C++ examples through pkg-config and CMake
	$(call heading,Installed files and examples)
	@$(TOOLS) tests/install/run.sh build/install

.PHONY: test-readme
test-readme: setup stage ## the README's C and Python
	$(call heading,README)
	@$(TOOLS) $(PY) tests/readme.py README.md

.PHONY: test-python
test-python: setup ## Python tests
	$(call heading,Python)
	$(PY) -m pytest tests/python

.PHONY: test-jax
test-jax: setup ## JAX tests
	$(call heading,JAX)
	$(PY) -m pytest tests/jax

.PHONY: test-gpu
test-gpu: setup ## tests that need a GPU; not part of `test`
	PYTHON=$(abspath $(PY)) tests/gpu/run.sh

# ---- Running ----------------------------------------------------------------------------------

.PHONY: demo
demo: setup ## train a small xLSTM and let it write
	$(PY) examples/python/demo.py

.PHONY: demo-jax
demo-jax: setup ## the same in JAX
	$(PY) examples/python/demo_jax.py

.PHONY: bench
bench: setup ## benchmarks on the CPU
	$(PY) benchmarks/cpu.py

.PHONY: sanitize
sanitize: ## C tests on a library built with AddressSanitizer (needs nightly Rust)
	@tests/c/sanitize.sh build/sanitize

.PHONY: fuzz
fuzz: ## FUZZ_SECONDS of each fuzz target
	@$(CARGO) +nightly fuzz --version || \
	  { echo "needs: rustup toolchain install nightly && cargo install cargo-fuzz"; exit 1; }
	for target in $$($(CARGO) +nightly fuzz list); do \
	  $(CARGO) +nightly fuzz run $$target -- -max_total_time=$(FUZZ_SECONDS); \
	done

.PHONY: clean
clean: ## remove what was built, but for .venv
	$(CARGO) clean
	rm -rf build bindings/python/mlstm/_lib
