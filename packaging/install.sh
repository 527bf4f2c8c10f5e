#!/usr/bin/env bash
# Installs or removes the header, the libraries and the files for pkg-config and CMake.
#   packaging/install.sh install|uninstall
# from the environment: PREFIX INCLUDEDIR LIBDIR (final paths), DESTDIR (put in front of them while
# packaging), TARGET (cargo's target folder).
set -euo pipefail
cd "$(dirname "$0")/.."

action=$1
# "0" until 1.0; build.rs sets the same SONAME.
soname=libmlstm.so.0
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -n 1)
library=$LIBDIR/libmlstm.so.$version
# As `cargo rustc --release --crate-type staticlib -- --print native-static-libs` says.
libs_private="-lgcc_s -lutil -lrt -lpthread -lm -ldl -lc"

for directory in "$PREFIX" "$INCLUDEDIR" "$LIBDIR"; do
  case $directory in
    /*) ;;
    *) echo "install: $directory is not an absolute path" >&2; exit 1 ;;
  esac
done

# Fills in a template.
configure() {
  sed -e "s|@PREFIX@|$PREFIX|g" -e "s|@INCLUDEDIR@|$INCLUDEDIR|g" -e "s|@LIBDIR@|$LIBDIR|g" \
    -e "s|@VERSION@|$version|g" -e "s|@SONAME@|$soname|g" -e "s|@LIBS_PRIVATE@|$libs_private|g" \
    -e "s|@RELATIVE_INCLUDEDIR@|$(realpath -m --relative-to="$LIBDIR" "$INCLUDEDIR")|g" \
    "packaging/$1.in" > "$2"
  chmod 644 "$2"
}

case $action in
  install)
    include=$DESTDIR$INCLUDEDIR lib=$DESTDIR$LIBDIR
    install -d "$include" "$lib/pkgconfig" "$lib/cmake/mlstm"
    install -m 644 include/mlstm.h "$include/mlstm.h"
    # Rust's objects carry debug information and LLVM bitcode, which no C linker needs.
    objcopy --strip-debug --remove-section=.llvmbc --remove-section=.llvmcmd \
      "$TARGET/release/libmlstm.a" "$lib/libmlstm.a"
    chmod 644 "$lib/libmlstm.a"
    install -m 755 "$TARGET/release/libmlstm.so" "$DESTDIR$library"
    ln -sf "libmlstm.so.$version" "$lib/$soname"
    ln -sf "$soname" "$lib/libmlstm.so"
    configure mlstm.pc "$lib/pkgconfig/mlstm.pc"
    configure mlstmConfig.cmake "$lib/cmake/mlstm/mlstmConfig.cmake"
    configure mlstmConfigVersion.cmake "$lib/cmake/mlstm/mlstmConfigVersion.cmake"
    echo "installed mlstm $version in $DESTDIR$PREFIX"
    ;;
  uninstall)
    rm -f "$DESTDIR$INCLUDEDIR/mlstm.h" "$DESTDIR$LIBDIR"/libmlstm.a "$DESTDIR$library" \
      "$DESTDIR$LIBDIR/$soname" "$DESTDIR$LIBDIR/libmlstm.so" \
      "$DESTDIR$LIBDIR/pkgconfig/mlstm.pc"
    rm -rf "$DESTDIR$LIBDIR/cmake/mlstm"
    echo "removed mlstm $version from $DESTDIR$PREFIX"
    ;;
  *)
    echo "usage: packaging/install.sh install|uninstall" >&2
    exit 2
    ;;
esac
