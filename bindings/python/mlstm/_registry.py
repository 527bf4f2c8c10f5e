# SPDX-License-Identifier: MIT OR Apache-2.0
"""Kernels by name: the functions of the same names in `mlstm_kernels`."""

from collections.abc import Callable

# Names in `mlstm_kernels` of what is computed here.
_ALIASES = {
    "chunkwise--triton_xl_chunk": "chunkwise--xl_chunk",
    "chunkwise--triton_limit_chunk": "chunkwise--limit_chunk",
    "chunkwise--triton_xl_chunk_siging": "chunkwise--xl_chunk_siging",
    "parallel--triton_limit_headdim": "parallel--limit_headdim",
    "native_sequence__triton": "recurrent_sequence",
    "triton": "step",
}


class Registry:
    """The kernel functions of a package's modules under our names and those of `mlstm_kernels`.

    `kernels` and `aliases` are those that a package has beyond the ones that all have.
    """

    def __init__(self, chunkwise, parallel, recurrent, kernels=None, aliases=None):
        self._kernels = {
            "chunkwise--xl_chunk": chunkwise.mlstm_chunkwise__xl_chunk,
            "chunkwise--limit_chunk": chunkwise.mlstm_chunkwise__limit_chunk,
            "chunkwise--xl_chunk_siging": chunkwise.mlstm_siging_chunkwise__xl_chunk,
            "parallel--limit_headdim": parallel.mlstm_parallel__limit_headdim,
            **(kernels or {}),
        }
        self._sequence_kernels = {"recurrent_sequence": recurrent.mlstm_recurrent_sequence}
        self._step_kernels = {"step": recurrent.mlstm_recurrent_step}
        self._aliases = _ALIASES | (aliases or {})

    def _get(self, kernels, kind, name):
        kernel = kernels.get(self._aliases.get(name, name))
        if kernel is None:
            raise ValueError(f"{kind} kernel {name!r} is unknown; there are {', '.join(kernels)}")
        return kernel

    def get_available_mlstm_kernels(self) -> list[str]:
        """Names of the kernels for training and prefill."""
        return list(self._kernels)

    def get_mlstm_kernel(self, name: str) -> Callable:
        """The kernel `name`, called like `chunkwise.mlstm_chunkwise__xl_chunk`.

        Raises:
            ValueError: there is none of this name.
        """
        return self._get(self._kernels, "mlstm", name)

    def get_available_mlstm_sequence_kernels(self) -> list[str]:
        """Names of the kernels that stand for a loop over tokens."""
        return list(self._sequence_kernels)

    def get_mlstm_sequence_kernel(self, name: str) -> Callable:
        """The kernel `name`, called like `recurrent.mlstm_recurrent_sequence`.

        Raises:
            ValueError: there is none of this name.
        """
        return self._get(self._sequence_kernels, "mlstm sequence", name)

    def get_available_mlstm_step_kernels(self) -> list[str]:
        """Names of the kernels for one token."""
        return list(self._step_kernels)

    def get_mlstm_step_kernel(self, name: str) -> Callable:
        """The kernel `name`, called like `recurrent.mlstm_recurrent_step`.

        Raises:
            ValueError: there is none of this name.
        """
        return self._get(self._step_kernels, "mlstm step", name)
