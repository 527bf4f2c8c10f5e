# SPDX-License-Identifier: MIT OR Apache-2.0
"""The native library that the package carries."""

import ctypes
from pathlib import Path

_LIB = Path(__file__).parent / "_lib"


def library_dir() -> str:
    """The folder of libmlstm.so.0, and of what mlstm.torch and mlstm.jax load."""
    return str(_LIB)


def include_dir() -> str:
    """The folder of mlstm.h."""
    return str(_LIB / "include")


def native(name: str) -> str:
    """The path of a native file of the package.

    Raises:
        ImportError: the file was not built.
    """
    path = _LIB / name
    if not path.exists():
        raise ImportError(
            f"{path} is missing. In a source tree, run `cargo build --release` and then "
            "`python bindings/build.py`."
        )
    return str(path)


def version() -> str:
    """The version of libmlstm.so, e.g. "0.1.0"."""
    number = ctypes.CDLL(native("libmlstm.so.0")).mlstm_version()
    return f"{number >> 16}.{number >> 8 & 255}.{number & 255}"
