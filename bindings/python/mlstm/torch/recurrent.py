# SPDX-License-Identifier: MIT OR Apache-2.0
"""Recurrent kernels: a token, or a few, at a time, for generation."""

import torch

from mlstm._tuning import ignore_tuning
from mlstm.torch._kernels import sequence, step
from mlstm.torch._ops import gates_as_accepted


def mlstm_recurrent_step(
    q, k, v, i, f, c, n, m, eps=1e-6, dtype_state=torch.float32, *, qk_scale=None, **kwargs
):
    """One token per row.

    Args:
        q, k: (B, NH, DHQK) float32, float64, bfloat16 or float16.
        v: (B, NH, DHHV), dtype of q.
        i, f: (B, NH, 1), as in `mlstm.torch.chunkwise.mlstm_chunkwise__xl_chunk`.
        c, n, m: the state, (B, NH, DHQK, DHHV), (B, NH, DHQK), (B, NH, 1); not changed.
        eps: added to the denominator.
        dtype_state: dtype of the new c: float32, bfloat16 or float16. n and m are float32. With
            float64 data states are float64.
        qk_scale: factor on q; None for DHQK ** -0.5.
        kwargs: tuning arguments of `mlstm_kernels` are accepted and ignored.

    Returns:
        (h, (c, n, m)): h (B, NH, DHHV), dtype of q, and the new state, differentiable.

    Raises:
        As `mlstm.torch.chunkwise.mlstm_chunkwise__xl_chunk`.
    """
    ignore_tuning("mlstm_recurrent_step", kwargs)
    return step(q, k, v, i, f, c, n, m, eps=eps, dtype_state=dtype_state, qk_scale=qk_scale)


def mlstm_recurrent_step_slots(
    q,
    k,
    v,
    i,
    f,
    c,
    n,
    m,
    src_slots=None,
    dst_slots=None,
    has_state=None,
    num_tokens=None,
    *,
    eps=1e-6,
    qk_scale=None,
):
    """1 to 16 tokens per row on a pool of states that is updated in place.

    Args:
        q, k, v, i, f: (B, NH, S, DHQK), same, (B, NH, S, DHHV), (B, NH, S), same; S from 1 to 16.
        c, n, m: pools, (num_slots, NH, DHQK, DHHV) in float32, bfloat16 or float16,
            (num_slots, NH, DHQK) and (num_slots, NH) or (num_slots, NH, 1) in float32 (float64
            data: all float64). Any strides, the last one 1.
        src_slots: (B) int32 or int64, the slot a row reads; -1 marks padding: nothing is read or
            written and h is 0. None: row b uses slot b.
        dst_slots: (B) int32 or int64, the slot a row writes; -1 writes no state. None: src_slots.
            No row may write what another one reads or writes.
        has_state: (B) bool, uint8 or int32; false starts from a zero state and does not read the
            slot, which may hold anything.
        num_tokens: (B) int32 or int64, how many of the S tokens count; the h of the others is 0.
        eps: added to the denominator.
        qk_scale: factor on q; None for DHQK ** -0.5.

    Returns:
        h (B, NH, S, DHHV), dtype of q. Not differentiable.

    Raises:
        As `mlstm.torch.chunkwise.mlstm_chunkwise__xl_chunk`.
    """
    if m.dim() == 3 and m.shape[2] == 1:
        m = m.squeeze(2)
    with torch.no_grad():
        return torch.ops.mlstm.step_(
            q,
            k,
            v,
            *gates_as_accepted(q, i, f),
            c,
            n,
            m,
            src_slots,
            dst_slots,
            has_state,
            num_tokens,
            eps=eps,
            qk_scale=qk_scale,
        )


def mlstm_recurrent_sequence(
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
    dtype_state=torch.float32,
    autocast_kernel_dtype=torch.bfloat16,
    *,
    cu_seqlens=None,
    detach_denominator=False,
    qk_scale=None,
    **kwargs,
):
    """A sequence of any length, as `mlstm.torch.chunkwise.mlstm_chunkwise__xl_chunk`, which
    documents the arguments. There is no loop over tokens: the chunkwise kernel computes it."""
    ignore_tuning("mlstm_recurrent_sequence", kwargs)
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
    )
