# SPDX-License-Identifier: MIT OR Apache-2.0
"""A module that picks the kernel for training, prefill and generation."""

import torch
from torch import nn

from mlstm._backend_config import mLSTMBackendConfig
from mlstm.torch import get_mlstm_kernel, get_mlstm_sequence_kernel, get_mlstm_step_kernel
from mlstm.torch._kernels import step

__all__ = ["mLSTMBackend", "mLSTMBackendConfig"]


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
        if config.siging:
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
        inference = config.inference(mode)
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
