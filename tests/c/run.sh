#!/usr/bin/env bash
# Builds and runs the C tests against the library that pkg-config finds.
#   tests/c/run.sh BUILD_FOLDER
set -euo pipefail
build=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")"
CC=${CC:-cc} CXX=${CXX:-c++}
read -ra cflags <<< "$(pkg-config --cflags mlstm)"
read -ra libs <<< "$(pkg-config --libs mlstm)"
libdir=$(pkg-config --variable=libdir mlstm)
warnings=(-Wall -Wextra -Wpedantic -Werror)

echo "header: C99 to C17, C++11 to C++20, no padding"
for standard in c99 c11 c17; do
  $CC -std=$standard "${warnings[@]}" -Wpadded "${cflags[@]}" -fsyntax-only header.c
done
for standard in c++11 c++14 c++17 c++20; do
  $CXX -x c++ -std=$standard "${warnings[@]}" -Wpadded "${cflags[@]}" -fsyntax-only header.c
done
$CC -std=c11 "${warnings[@]}" "${cflags[@]}" -fsyntax-only layout.c
$CXX -x c++ -std=c++11 "${warnings[@]}" "${cflags[@]}" -fsyntax-only layout.c

# compile OUTPUT SOURCES... -- OPTIONS...
compile() {
  local output=$1 sources=()
  shift
  while [[ $1 != -- ]]; do sources+=("$1"); shift; done
  shift
  $CC -std=c11 -g -O1 "${warnings[@]}" -Wshadow "$@" "${cflags[@]}" "${sources[@]}" -o "$output" \
    "${libs[@]}" -Wl,-rpath,"$libdir" -lm -pthread
}

export ASAN_OPTIONS=detect_leaks=1:abort_on_error=0
for mode in plain sanitized; do
  flags=()
  if [[ $mode = sanitized ]]; then
    flags=(-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer)
  fi
  compile "$build/contract-$mode" contract.c call.c fence.c -- "${flags[@]}"
  compile "$build/numeric-$mode" numeric.c oracle.c -- "${flags[@]}"
  compile "$build/threads-$mode" threads.c call.c fence.c -- "${flags[@]}"
  for name in contract numeric threads; do
    echo "$name, $mode"
    if [[ $mode = sanitized ]]; then
      # A sanitizer that is not in finds nothing.
      nm "$build/$name-$mode" | grep __asan_init > /dev/null || { echo "no AddressSanitizer"; exit 1; }
    fi
    "$build/$name-$mode"
  done
done

echo "the same bits at any number of worker threads"
for threads in 1 2 3 7; do
  MLSTM_NUM_THREADS=$threads "$build/threads-plain" | grep bits > "$build/bits-$threads"
  cmp "$build/bits-1" "$build/bits-$threads"
done

for level in scalar avx2; do
  echo "numeric with MLSTM_CPU_LEVEL=$level"
  MLSTM_CPU_LEVEL=$level "$build/numeric-plain"
done
