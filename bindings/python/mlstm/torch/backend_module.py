# SPDX-License-Identifier: MIT OR Apache-2.0
"""A module that picks the kernel for training, prefill and generation."""

from dataclasses import dataclass

import torch
from torch import nn

from mlstm.torch import get_mlstm_kernel, get_mlstm_sequence_kernel, get_mlstm_step_kernel
from mlstm.torch._kernels import step

_MODES = ("train", "train_with_padding", "inference")


@dataclass
class mLSTMBackendConfig:  # noqa: N801, the name in `mlstm_kernels`
    """Configuration of `mLSTMBackend`."""

    chunkwise_kernel: str = "chunkwise--xl_chunk"
    """Kernel for sequences, one of `get_available_mlstm_kernels()`."""
    sequence_kernel: str = "recurrent_sequence"
    """Accepted and checked; not needed, since every kernel takes every length."""
    step_kernel: str = "step"
    """Kernel for single tokens in inference."""
    mode: str = "train"
    """"train"; "train_with_padding", the same here, since no length needs padding; "inference"."""
    chunk_size: int = 64
    """Tokens per chunk, a hint."""
    return_last_states: bool = True
    """Whether training returns the last states; inference always does."""
    autocast_kernel_dtype: str = "bfloat16"
    """dtype that q, k, v take where autocast is enabled."""
    eps: float = 1e-6
    """Added to the denominator."""
    inference_state_dtype: str = "float32"
    """dtype of the c state in inference."""
    normalize_siging: bool = True
    """`normalize` of the kernels with the sigmoid input gate."""

    def __post_init__(self):
        """Raises ValueError for a mode that does not exist."""
        _check_mode(self.mode)


class mLSTMBackend(nn.Module):  # noqa: N801, the name in `mlstm_kernels`
    """Runs the configured kernels: sequences in training, sequences and single tokens, always
    with states, in inference.

    Raises:
        ValueError: an unknown kernel.
    """

    config_class = mLSTMBackendConfig

    def __init__(self, config: mLSTMBackendConfig):
        super().__init__()
        self.config = config
        self._kernel = get_mlstm_kernel(config.chunkwise_kernel)
        get_mlstm_sequence_kernel(config.sequence_kernel)
        get_mlstm_step_kernel(config.step_kernel)
        self._siging = {}
        if "siging" in config.chunkwise_kernel:
            self._siging = {"normalize": config.normalize_siging}

    def forward(
        self,
        q,
        k,
        v,
        i,
        f,
        c_initial=None,
        n_initial=None,
        m_initial=None,
        return_last_states=None,
        mode=None,
        *,
        cu_seqlens=None,
    ):
        """Arguments and results of `mlstm.torch.chunkwise.mlstm_chunkwise__xl_chunk`.

        `mode` and `return_last_states` override the configuration where given.
        """
        config = self.config
        mode = mode or config.mode
        _check_mode(mode)
        inference = mode == "inference"
        state_dtype = getattr(torch, config.inference_state_dtype) if inference else None
        if inference:
            return_last_states = True
        elif return_last_states is None:
            return_last_states = config.return_last_states
        states = (c_initial, n_initial, m_initial)
        if inference and q.shape[2] == 1 and c_initial is not None and cu_seqlens is None:
            return self._step(q, k, v, i, f, *states, state_dtype)
        return self._kernel(
            q,
            k,
            v,
            i,
            f,
            *states,
            return_last_states=return_last_states,
            eps=config.eps,
            autocast_kernel_dtype=getattr(torch, config.autocast_kernel_dtype),
            chunk_size=config.chunk_size,
            cu_seqlens=cu_seqlens,
            dtype_state=state_dtype,
            **self._siging,
        )

    def _step(self, q, k, v, i, f, c, n, m, state_dtype):
        siging = bool(self._siging)
        h, states = step(
            q.squeeze(2),
            k.squeeze(2),
            v.squeeze(2),
            i,
            f,
            c,
            n,
            None if siging else m,
            dtype_state=state_dtype,
            eps=self.config.eps,
            siging=siging,
            **self._siging,
        )
        return h.unsqueeze(2), states

    def extra_repr(self) -> str:
        """The configuration."""
        return str(self.config)


def _check_mode(mode: str) -> None:
    if mode not in _MODES:
        raise ValueError(f"mode {mode!r} is unknown; there are {', '.join(_MODES)}")
