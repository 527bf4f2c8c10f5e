# SPDX-License-Identifier: MIT OR Apache-2.0
"""mLSTM kernels for PyTorch, by name, with the names of `mlstm_kernels.torch`.

    from mlstm.torch import get_mlstm_kernel
    h = get_mlstm_kernel("chunkwise--xl_chunk")(q, k, v, i, f)

`get_available_*` list our names; the names of the peers' Triton kernels are accepted as well, so
that a program needs to change its import only.
"""

from collections.abc import Callable

from mlstm.torch import chunkwise, parallel, recurrent

_KERNELS = {
    "chunkwise--xl_chunk": chunkwise.mlstm_chunkwise__xl_chunk,
    "chunkwise--limit_chunk": chunkwise.mlstm_chunkwise__limit_chunk,
    "chunkwise--xl_chunk_siging": chunkwise.mlstm_siging_chunkwise__xl_chunk,
    "parallel--limit_headdim": parallel.mlstm_parallel__limit_headdim,
}
_SEQUENCE_KERNELS = {"recurrent_sequence": recurrent.mlstm_recurrent_sequence}
_STEP_KERNELS = {"step": recurrent.mlstm_recurrent_step}

# Names in `mlstm_kernels` of what is computed here.
_ALIASES = {
    "chunkwise--triton_xl_chunk": "chunkwise--xl_chunk",
    "chunkwise--triton_limit_chunk": "chunkwise--limit_chunk",
    "chunkwise--triton_xl_chunk_siging": "chunkwise--xl_chunk_siging",
    "parallel--triton_limit_headdim": "parallel--limit_headdim",
    "native_sequence__triton": "recurrent_sequence",
    "triton": "step",
}


def _get(kernels: dict[str, Callable], kind: str, name: str) -> Callable:
    kernel = kernels.get(_ALIASES.get(name, name))
    if kernel is None:
        raise ValueError(f"{kind} kernel {name!r} is unknown; there are {', '.join(kernels)}")
    return kernel


def get_available_mlstm_kernels() -> list[str]:
    """Names of the kernels for training and prefill."""
    return list(_KERNELS)


def get_mlstm_kernel(name: str) -> Callable:
    """The kernel `name`, called like `chunkwise.mlstm_chunkwise__xl_chunk`.

    Raises:
        ValueError: there is none of this name.
    """
    return _get(_KERNELS, "mlstm", name)


def get_available_mlstm_sequence_kernels() -> list[str]:
    """Names of the kernels that stand for a loop over tokens."""
    return list(_SEQUENCE_KERNELS)


def get_mlstm_sequence_kernel(name: str) -> Callable:
    """The kernel `name`, called like `recurrent.mlstm_recurrent_sequence`.

    Raises:
        ValueError: there is none of this name.
    """
    return _get(_SEQUENCE_KERNELS, "mlstm sequence", name)


def get_available_mlstm_step_kernels() -> list[str]:
    """Names of the kernels for one token."""
    return list(_STEP_KERNELS)


def get_mlstm_step_kernel(name: str) -> Callable:
    """The kernel `name`, called like `recurrent.mlstm_recurrent_step`.

    Raises:
        ValueError: there is none of this name.
    """
    return _get(_STEP_KERNELS, "mlstm step", name)
