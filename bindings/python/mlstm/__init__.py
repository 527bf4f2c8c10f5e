# SPDX-License-Identifier: MIT OR Apache-2.0
"""mLSTM (xLSTM) kernels behind one stable C ABI.

`mlstm.torch` has the PyTorch kernels under the names of `mlstm_kernels.torch`, `mlstm.jax` the JAX
kernels under those of `mlstm_kernels.jax`. `include_dir()` and `library_dir()` say where `mlstm.h`
and `libmlstm.so.0` are, to build other programs with them.
"""

from mlstm._library import include_dir, library_dir, version

__version__ = version()
__all__ = ["__version__", "include_dir", "library_dir"]
