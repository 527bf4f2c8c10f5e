#!/usr/bin/env bash
# Installs into a fresh prefix, builds the C and C++ examples there as a user would (pkg-config,
# shared and static; CMake), runs them, and uninstalls. PKG_CONFIG_PATH is set here.
#   tests/install/run.sh BUILD_FOLDER
set -euo pipefail
rm -rf "$1"
build=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/../.."
CC=${CC:-cc} CXX=${CXX:-c++}
warnings=(-Wall -Wextra -Wpedantic -Werror)
fail() { echo "FAILED: $1"; exit 1; }

# A package is built under DESTDIR and unpacked in its final place.
prefix=$build/usr
"${MAKE:-make}" install PREFIX="$prefix" DESTDIR="$build/package"
mv "$build/package$prefix" "$prefix"
[[ $(readlink "$prefix/lib/libmlstm.so") = libmlstm.so.0 ]] || fail "libmlstm.so is no link"
cmp include/mlstm.h "$prefix/include/mlstm.h"
! grep -r "$build/package" "$prefix/lib/pkgconfig" "$prefix/lib/cmake" || fail "DESTDIR got in"

export PKG_CONFIG_PATH=$prefix/lib/pkgconfig
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -n 1)
[[ $(pkg-config --modversion mlstm) = "$version" ]] || fail "pkg-config has another version"
read -ra cflags <<< "$(pkg-config --cflags mlstm)"
read -ra libs <<< "$(pkg-config --libs mlstm)"
read -ra static_libs <<< "$(pkg-config --variable=static_libs mlstm)"

echo "C example, pkg-config"
$CC -std=c99 "${warnings[@]}" examples/c/generate.c "${cflags[@]}" "${libs[@]}" -lm -o "$build/generate"
LD_LIBRARY_PATH=$prefix/lib "$build/generate"

echo "C example, pkg-config, static library"
$CC -std=c99 examples/c/generate.c "${cflags[@]}" "${static_libs[@]}" -lm -o "$build/generate-static"
! readelf --dynamic "$build/generate-static" | grep libmlstm || fail "it needs the shared library"
"$build/generate-static"

echo "C++ example, pkg-config"
$CXX -std=c++17 "${warnings[@]}" examples/cpp/engine.cpp "${cflags[@]}" "${libs[@]}" -o "$build/engine"
LD_LIBRARY_PATH=$prefix/lib "$build/engine"

echo "C++ example, AddressSanitizer"
$CXX -std=c++17 -g -fsanitize=address,undefined -fno-sanitize-recover=all examples/cpp/engine.cpp \
  "${cflags[@]}" "${libs[@]}" -o "$build/engine-sanitized"
LD_LIBRARY_PATH=$prefix/lib "$build/engine-sanitized"

echo "CMake, find_package(mlstm)"
# The CMake files find their prefix by themselves: move it.
mv "$prefix" "$build/moved"
cmake -S tests/install -B "$build/cmake" -DCMAKE_PREFIX_PATH="$build/moved" -G "Unix Makefiles" \
  --log-level=WARNING
cmake --build "$build/cmake"
for example in generate generate_static engine; do "$build/cmake/$example"; done
if cmake -S tests/install -B "$build/cmake-newer" -DCMAKE_PREFIX_PATH="$build/moved" \
  -Dmlstm_test_version=99 --log-level=ERROR > "$build/newer.log" 2>&1; then
  fail "find_package accepted version 99"
fi
mv "$build/moved" "$prefix"

"${MAKE:-make}" uninstall PREFIX="$prefix"
left=$(find "$prefix" ! -type d)
[[ -z $left ]] || fail "uninstall left $left"
