# SPDX-License-Identifier: MIT OR Apache-2.0
"""Recurrent kernels: a token, or a few, at a time, for generation."""

import jax.numpy as jnp

from mlstm.jax._kernels import sequence, step_on_pools


def mlstm_recurrent_step(q, k, v, i, f, c, n, m, eps=1e-6, dtype_state=jnp.float32, **kwargs):
    """One token per row. Where c, n and m are donated, or carried by a scan, they are updated in
    place.

    Args:
        q, k: (B, NH, DHQK) float32, float64, bfloat16 or float16.
        v: (B, NH, DHHV), dtype of q.
        i, f: (B, NH, 1) or (B, NH), as in `mlstm.jax.chunkwise.mlstm_chunkwise__xl_chunk`.
        c, n, m: the state, (B, NH, DHQK, DHHV), (B, NH, DHQK), (B, NH, 1) or (B, NH); m None with
            `siging`.
        eps: added to the denominator.
        dtype_state: dtype of the new c: float32, bfloat16 or float16; None keeps that of c. n and m
            are float32. With float64 data states are float64.
        kwargs: qk_scale, siging and normalize, as in `mlstm.jax.chunkwise`; tuning arguments of
            `mlstm_kernels` are accepted and ignored.

    Returns:
        (h, (c, n, m)): h (B, NH, DHHV), dtype of q, and the new state, m (B, NH, 1); without m with
        `siging`. Differentiable.

    Raises:
        As `mlstm.jax.chunkwise.mlstm_chunkwise__xl_chunk`.
    """
    tokens = (jnp.expand_dims(x, 2) for x in (q, k, v))
    gates = (jnp.reshape(x, (*jnp.shape(x)[:2], 1)) for x in (i, f))
    options = dict(eps=eps, dtype_state=dtype_state, step=True)
    h, states = sequence(*tokens, *gates, c, n, m, True, **options, **kwargs)
    return h[:, :, 0], _with_last_dimension(states)


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
    """1 to 16 tokens per row on a pool of states. Where the pools are donated, or carried by a
    scan, they are updated in place.

    Args:
        q, k, v, i, f: (B, NH, S, DHQK), same, (B, NH, S, DHHV), (B, NH, S), same; S from 1 to 16.
        c, n, m: pools, (num_slots, NH, DHQK, DHHV) in float32, bfloat16 or float16,
            (num_slots, NH, DHQK) and (num_slots, NH) or (num_slots, NH, 1) in float32 (float64
            data: all float64).
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
        (h, (c, n, m)): h (B, NH, S, DHHV), dtype of q, and the pools, shaped as given; slots that
        no row writes stay as they are. Not differentiable.

    Raises:
        As `mlstm.jax.chunkwise.mlstm_chunkwise__xl_chunk`.
    """
    if src_slots is None and (dst_slots is not None or c.shape[0] != q.shape[0]):
        src_slots = jnp.arange(q.shape[0], dtype=jnp.int32)
    tensors = dict(q=q, k=k, v=v, i=i, f=f, c=c, n=n, m=m, src_slots=src_slots)
    tensors |= dict(dst_slots=dst_slots, has_state=has_state, num_tokens=num_tokens)
    results = step_on_pools(tensors, eps=eps, qk_scale=qk_scale)
    states = results["c"], results["n"], results["m"].reshape(m.shape)
    return results["h"], states


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
    state_dtype=None,
    **kwargs,
):
    """A sequence of any length, as `mlstm.jax.chunkwise.mlstm_chunkwise__xl_chunk`, which documents
    the arguments, but for m, which is (R, NH, 1) in the states that are returned. `state_dtype` is
    `dtype_state` there. There is no loop over tokens: the chunkwise kernel computes it."""
    arrays = (q, k, v, i, f, c_initial, n_initial, m_initial)
    kwargs = {"dtype_state": state_dtype} | kwargs
    result = sequence(*arrays, return_last_states, eps=eps, **kwargs)
    return (result[0], _with_last_dimension(result[1])) if return_last_states else result


def _with_last_dimension(states):
    return (*states[:2], *(m[..., None] for m in states[2:]))


# Names in `mlstm_kernels` of what is computed here.
mlstm_recurrent_step__native = mlstm_recurrent_step
mlstm_recurrent_step__triton = mlstm_recurrent_step
mlstm_recurrent_sequence__native_fw = mlstm_recurrent_sequence
mlstm_recurrent_sequence__triton_step_fused_fw = mlstm_recurrent_sequence
