# SPDX-License-Identifier: MIT OR Apache-2.0
"""Parallel kernels: all pairs of tokens, time quadratic in S, like attention.

They compute the numbers of `mlstm.jax.chunkwise`, which documents the arguments.
"""

from mlstm.jax._kernels import sequence


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
    autocast_kernel_dtype=None,
    **kwargs,
):
    """`mlstm.jax.chunkwise.mlstm_chunkwise__xl_chunk` by the quadratic form."""
    arrays = (q, k, v, i, f, c_initial, n_initial, m_initial)
    options = dict(eps=eps, autocast_kernel_dtype=autocast_kernel_dtype, parallel=True)
    return sequence(*arrays, return_last_states, **options, **kwargs)


def mlstm_siging_parallel__limit_headdim(
    q,
    k,
    v,
    i,
    f,
    c_initial=None,
    n_initial=None,
    return_last_states=False,
    eps=1e-6,
    stable_fgate=True,
    normalize=True,
    autocast_kernel_dtype=None,
    **kwargs,
):
    """`mlstm.jax.chunkwise.mlstm_siging_chunkwise__xl_chunk` by the quadratic form.
    `stable_fgate` is ignored: it always is."""
    del stable_fgate
    options = dict(eps=eps, autocast_kernel_dtype=autocast_kernel_dtype, normalize=normalize)
    arrays = (q, k, v, i, f, c_initial, n_initial, None)
    return sequence(*arrays, return_last_states, parallel=True, siging=True, **options, **kwargs)
