# SPDX-License-Identifier: MIT OR Apache-2.0
"""mLSTM kernels for JAX, by name, with the names of `mlstm_kernels.jax`.

    from mlstm.jax import get_mlstm_kernel
    h = get_mlstm_kernel("chunkwise--xl_chunk")(q, k, v, i, f)

`get_available_*` list our names; the names of the peers' kernels are accepted as well, so that a
program needs to change its import only. The functions work under jit, grad, vmap, scan,
checkpoint and shard_map; arrays that are sharded over B or NH are computed where they are.
"""

from mlstm._registry import Registry
from mlstm.jax import chunkwise, parallel, recurrent

_REGISTRY = Registry(
    chunkwise,
    parallel,
    recurrent,
    {"parallel--limit_headdim_siging": parallel.mlstm_siging_parallel__limit_headdim},
    {
        "chunkwise--native_autograd": "chunkwise--xl_chunk",
        "parallel--native_autograd": "parallel--limit_headdim",
        "parallel--native_custbw": "parallel--limit_headdim",
        "parallel--native_stablef_autograd": "parallel--limit_headdim",
        "parallel--native_stablef_custbw": "parallel--limit_headdim",
        "parallel--native_siging_autograd": "parallel--limit_headdim_siging",
        "parallel--native_siging_custbw": "parallel--limit_headdim_siging",
        "native": "step",
    },
)
get_available_mlstm_kernels = _REGISTRY.get_available_mlstm_kernels
get_mlstm_kernel = _REGISTRY.get_mlstm_kernel
get_available_mlstm_sequence_kernels = _REGISTRY.get_available_mlstm_sequence_kernels
get_mlstm_sequence_kernel = _REGISTRY.get_mlstm_sequence_kernel
get_available_mlstm_step_kernels = _REGISTRY.get_available_mlstm_step_kernels
get_mlstm_step_kernel = _REGISTRY.get_mlstm_step_kernel
