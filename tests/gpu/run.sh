#!/bin/bash
# SPDX-License-Identifier: MIT OR Apache-2.0
# All GPU tests: correctness through the C ABI, PyTorch and JAX, compute-sanitizer on a small
# set, and a quick benchmark. Needs a GPU and python3 with torch, pytest and tqdm, and jax and flax for
# what is about JAX; no compiler and no network. About 4 minutes on an H200.
#
#   tests/gpu/run.sh [mlstm-*.whl]    (without a wheel: the package built in this tree)
#
# SANITIZE=0 leaves compute-sanitizer out, BENCH=0 the benchmark.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONDONTWRITEBYTECODE=1
PYTHON=${PYTHON:-python3}
heading() { printf '\n==> %s\n' "$1"; }

package=$PWD/bindings/python
if [[ $# -gt 0 ]]; then
  package=$(mktemp -d)
  trap 'rm -rf "$package"' EXIT
  "$PYTHON" -m pip install -q --no-index --no-deps --target "$package" "$1"
fi
export PYTHONPATH=$package${PYTHONPATH:+:$PYTHONPATH}
export MLSTM_LIBRARY=$package/mlstm/_lib/libmlstm.so.0

heading 'C ABI on the GPU'
(cd tests/gpu && "$PYTHON" -m pytest -q -p no:cacheprovider .)
(cd tests/gpu && "$PYTHON" accuracy.py)

heading 'PyTorch on the GPU'
"$PYTHON" -m pytest -q -p no:cacheprovider -r fE -m gpu tests/python

jax=$("$PYTHON" -c 'import jax; print(jax.devices("cuda")[0])' 2> /dev/null || true)
if [[ -n $jax ]]; then
  heading 'JAX on the GPU'
  "$PYTHON" -m pytest -q -p no:cacheprovider -r fE -m gpu tests/jax
else
  heading 'JAX: not here, or not for the GPU'
fi

if [[ "${SANITIZE:-1}" != 0 ]]; then
  for tool in memcheck racecheck initcheck synccheck; do
    heading "compute-sanitizer $tool"
    (cd tests/gpu && PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
      --error-exitcode 1 "$PYTHON" sanitize.py | tail -n 5)
  done
fi

if [[ "${BENCH:-1}" != 0 ]]; then
  heading 'Benchmark'
  "$PYTHON" benchmarks/gpu.py --quick --budget 120
  if [[ -n $jax ]]; then "$PYTHON" benchmarks/gpu_jax.py --only '^(small|step_b1) '; fi
fi
