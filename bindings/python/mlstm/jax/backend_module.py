# SPDX-License-Identifier: MIT OR Apache-2.0
"""A Flax (nnx) module that picks the kernel for training, prefill and generation."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from mlstm import _backend_config
from mlstm.jax import get_mlstm_kernel, get_mlstm_sequence_kernel, get_mlstm_step_kernel


@dataclass(unsafe_hash=True)
class mLSTMBackendConfig(_backend_config.mLSTMBackendConfig):  # noqa: N801
    """Configuration of `mLSTMBackend`."""

    autocast_kernel_dtype: str | None = None
    """dtype that q, k, v, and with them h, take; None keeps theirs."""
    layout: str = "BHSD"
    """"BSHD" where q, k, v, i, f are transposed from (B, S, NH, ...) and h to it."""


class mLSTMBackend(nnx.Module):  # noqa: N801, the name in `mlstm_kernels`
    """Runs the configured kernels: sequences in training, sequences and single tokens, always
    with states, in inference. It has no parameters.

    Raises:
        ValueError: an unknown kernel.
    """

    config_class = mLSTMBackendConfig

    def __init__(self, config: mLSTMBackendConfig):
        self.config = config
        get_mlstm_kernel(config.chunkwise_kernel)
        get_mlstm_sequence_kernel(config.sequence_kernel)
        get_mlstm_step_kernel(config.step_kernel)

    def __call__(
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
        """Arguments and results of `mlstm.jax.chunkwise.mlstm_chunkwise__xl_chunk`, but m of the
        last states is (R, NH, 1).

        `mode` and `return_last_states` override the configuration where given.
        """
        config = self.config
        inference = config.inference(mode)
        options = {"eps": config.eps}
        if config.siging:
            options["normalize"] = config.normalize_siging
        if inference:
            options["dtype_state"] = jnp.dtype(config.inference_state_dtype)
        states = (c_initial, n_initial) if config.siging else (c_initial, n_initial, m_initial)
        if inference and q.shape[2] == 1 and c_initial is not None and cu_seqlens is None:
            if config.autocast_kernel_dtype is not None:
                q, k, v = (x.astype(config.autocast_kernel_dtype) for x in (q, k, v))
            step = get_mlstm_step_kernel(config.step_kernel)
            if config.siging:
                states, options = (*states, None), options | {"siging": True}
            h, states = step(*(x[:, :, 0] for x in (q, k, v)), i, f, *states, **options)
            return h[:, :, None], states
        if return_last_states is None or inference:
            return_last_states = inference or config.return_last_states
        result = get_mlstm_kernel(config.chunkwise_kernel)(
            *(q, k, v, i, f, *states),
            return_last_states=return_last_states,
            chunk_size=config.chunk_size,
            autocast_kernel_dtype=config.autocast_kernel_dtype,
            cu_seqlens=cu_seqlens,
            layout=config.layout,
            **options,
        )
        if not return_last_states:
            return result
        h, (c, n, *m) = result
        return h, (c, n, *(x[..., None] for x in m))
