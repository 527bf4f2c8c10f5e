# SPDX-License-Identifier: MIT OR Apache-2.0
"""The parallel kernel: all pairs of tokens, time quadratic in S, like attention."""

import torch

from mlstm._tuning import ignore_tuning
from mlstm.torch._kernels import sequence


def mlstm_parallel__limit_headdim(
    q,
    k,
    v,
    i,
    f,
    c_initial=None,
    n_initial=None,
    m_initial=None,
    return_last_states=False,
    eps=1e-6,
    autocast_kernel_dtype=torch.bfloat16,
    chunk_size=64,
    *,
    cu_seqlens=None,
    dtype_state=None,
    detach_denominator=False,
    qk_scale=None,
    **kwargs,
):
    """The numbers of `mlstm.torch.chunkwise.mlstm_chunkwise__xl_chunk`, which documents the
    arguments, by the quadratic form. `chunk_size` is ignored."""
    ignore_tuning("mlstm_parallel__limit_headdim", kwargs)
    return sequence(
        q,
        k,
        v,
        i,
        f,
        c_initial,
        n_initial,
        m_initial,
        return_last_states,
        eps=eps,
        autocast_kernel_dtype=autocast_kernel_dtype,
        cu_seqlens=cu_seqlens,
        dtype_state=dtype_state,
        detach_denominator=detach_denominator,
        qk_scale=qk_scale,
        parallel=True,
    )
