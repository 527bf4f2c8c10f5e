#!/usr/bin/env bash
# The C tests on a library that is itself instrumented by AddressSanitizer, at every CPU level that
# this machine has. Needs nightly Rust.
#   tests/c/sanitize.sh BUILD_FOLDER
set -euo pipefail
build=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")"
triple=$(rustc +nightly --version --verbose | sed -n 's/^host: //p')
RUSTFLAGS="-Zsanitizer=address -Cdebuginfo=1" CARGO_TARGET_DIR=$build/target \
  cargo +nightly rustc --locked --release --lib --crate-type staticlib --target "$triple"
library=$build/target/$triple/release/libmlstm.a

for sources in "contract.c call.c fence.c" "numeric.c oracle.c" "threads.c call.c fence.c"; do
  read -ra files <<< "$sources"
  program=$build/${files[0]%.c}
  ${CC:-cc} -std=c11 -g -O1 -fsanitize=address -I../../include "${files[@]}" "$library" \
    -o "$program" -lgcc_s -lutil -lrt -pthread -lm -ldl
  for level in scalar avx2 avx512; do
    echo "$(basename "$program") at $level"
    MLSTM_CPU_LEVEL=$level "$program"
  done
done
