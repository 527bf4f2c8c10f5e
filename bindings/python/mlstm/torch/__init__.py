# SPDX-License-Identifier: MIT OR Apache-2.0
"""mLSTM kernels for PyTorch, by name, with the names of `mlstm_kernels.torch`.

    from mlstm.torch import get_mlstm_kernel
    h = get_mlstm_kernel("chunkwise--xl_chunk")(q, k, v, i, f)

`get_available_*` list our names; the names of the peers' Triton kernels are accepted as well, so
that a program needs to change its import only.
"""

from mlstm._registry import Registry
from mlstm.torch import chunkwise, parallel, recurrent

_REGISTRY = Registry(chunkwise, parallel, recurrent)
get_available_mlstm_kernels = _REGISTRY.get_available_mlstm_kernels
get_mlstm_kernel = _REGISTRY.get_mlstm_kernel
get_available_mlstm_sequence_kernels = _REGISTRY.get_available_mlstm_sequence_kernels
get_mlstm_sequence_kernel = _REGISTRY.get_mlstm_sequence_kernel
get_available_mlstm_step_kernels = _REGISTRY.get_available_mlstm_step_kernels
get_mlstm_step_kernel = _REGISTRY.get_mlstm_step_kernel
