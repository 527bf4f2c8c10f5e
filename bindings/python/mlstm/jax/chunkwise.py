# SPDX-License-Identifier: MIT OR Apache-2.0
"""Chunkwise kernels: time linear in S, for training and prefill."""

from mlstm.jax._kernels import sequence


def mlstm_chunkwise__xl_chunk(
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
    chunk_size=64,
    autocast_kernel_dtype=None,
    *,
    cu_seqlens=None,
    dtype_state=None,
    detach_denominator=False,
    qk_scale=None,
    layout="BHSD",
    **kwargs,
):
    """mLSTM with the exponential input gate over sequences of any length.

    All kernel functions take these arguments. What is no array is static under jit.

    Args:
        q, k: (B, NH, S, DHQK) float32, float64, bfloat16 or float16, any S and DHQK.
        v: (B, NH, S, DHHV), dtype of q.
        i, f: pre-activations of the input and forget gate, (B, NH, S). Read as they are in
            float32 or the dtype of q, otherwise converted to float32. i = -inf ignores the token,
            f = -inf resets the state.
        c_initial, n_initial, m_initial: state before the first token, all or none:
            (R, NH, DHQK, DHHV) in float32, bfloat16 or float16, (R, NH, DHQK), (R, NH) or
            (R, NH, 1). R is B, or the number of packed sequences. With float64 data states are
            float64.
        return_last_states: also return the state after the last token.
        eps: added to the denominator.
        chunk_size: tokens per chunk, a hint (None: none); the result does not depend on it.
        autocast_kernel_dtype: dtype that q, k, v, and with them h, take; None keeps theirs.
        cu_seqlens: sequences packed along S, with B = 1: (R + 1) int32 or int64 offsets into S
            from 0 to S. Sequences may be empty; none sees another.
        dtype_state: dtype of c in and out; None keeps that of c_initial, else float32. n and m
            are float32.
        detach_denominator: gradients without the denominator's part, as `mlstm_kernels` has them;
            right only where a scale-invariant norm follows.
        qk_scale: factor on q; None for DHQK ** -0.5.
        layout: "BSHD" where q, k, v, i, f are transposed from (B, S, NH, ...) and h to it: then
            nothing is copied under jit. Shapes are those above in any case.
        kwargs: tuning arguments of `mlstm_kernels` are accepted and ignored.

    Returns:
        h (B, NH, S, DHHV), dtype of q; or (h, (c, n, m)), the state shaped like the initial one
        with m (R, NH). All of it is differentiable, once, in reverse mode.

    Raises:
        jax.errors.JaxRuntimeError: an argument does not fit (the message names it and says what
            was expected and what came), there is no kernel for it, or the device failed.
        TypeError, ValueError: an unknown keyword, an unknown layout.
    """
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
        chunk_size=chunk_size,
        autocast_kernel_dtype=autocast_kernel_dtype,
        cu_seqlens=cu_seqlens,
        dtype_state=dtype_state,
        detach_denominator=detach_denominator,
        qk_scale=qk_scale,
        layout=layout,
        **kwargs,
    )


# `mlstm_kernels` has two kernels for what is one here.
mlstm_chunkwise__limit_chunk = mlstm_chunkwise__xl_chunk


def mlstm_siging_chunkwise__xl_chunk(
    q,
    k,
    v,
    i,
    f,
    c_initial=None,
    n_initial=None,
    return_last_states=False,
    eps=1e-6,
    normalize=True,
    chunk_size=64,
    autocast_kernel_dtype=None,
    **kwargs,
):
    """mLSTM with the sigmoid input gate: as `mlstm_chunkwise__xl_chunk`, but without m.

    Args:
        normalize: divide by max(|N|, 1) + eps; False leaves h = s q^T C.

    Returns:
        h or (h, (c, n)).
    """
    options = dict(eps=eps, chunk_size=chunk_size, autocast_kernel_dtype=autocast_kernel_dtype)
    options |= dict(siging=True, normalize=normalize)
    arrays = (q, k, v, i, f, c_initial, n_initial, None)
    return sequence(*arrays, return_last_states, **options, **kwargs)
