# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the kernel functions share: conversion of arguments between the interface of
`mlstm_kernels` and the operators."""

from contextlib import nullcontext

import torch

from mlstm.torch._ops import call, cast_for_autocast, compute_dtype, gates_as_accepted

_NOTHING = nullcontext()


def states_as_accepted(q, c, n, m, dtype=None):
    """States as the operators take them: c in `dtype` (its own if None), n and m in float32, m
    without its last dimension of size 1; with float64 data all in float64."""
    compute = compute_dtype(q)
    if c is not None and (dtype is not None or compute == torch.float64):
        c = c.to(compute if compute == torch.float64 else dtype)
    if n is not None:
        n = n.to(compute)
    if m is not None:
        m = m.to(compute)
        if m.dim() == 3 and m.shape[2] == 1:
            m = m.squeeze(2)
    return c, n, m


def states_as_returned(c, n, m, siging):
    """(c, n, m) with m (R, NH, 1); (c, n) with the sigmoid gate."""
    return (c, n) if siging else (c, n, m.unsqueeze(-1))


@torch.compiler.assume_constant_result  # compiled code is guarded by the switch
def allows_tf32():
    """torch's own switch for float32 matrix products on CUDA, by whichever name it was set."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def sequence(
    q,
    k,
    v,
    i,
    f,
    c_initial=None,
    n_initial=None,
    m_initial=None,
    return_last_states=False,
    *,
    autocast_kernel_dtype=torch.bfloat16,
    dtype_state=None,
    cu_seqlens=None,
    chunk_size=None,
    siging=False,
    **options,
):
    """torch.ops.mlstm.forward with the arguments of the kernel functions."""
    autocast = torch.is_autocast_enabled(q.device.type)
    if autocast:
        q, k, v = cast_for_autocast(autocast_kernel_dtype, q, k, v)
    if dtype_state is not None and q.dtype == torch.float64:
        dtype_state = torch.float64
    # The dtype is settled: the operator's own autocast must not change it.
    with torch.autocast(q.device.type, enabled=False) if autocast else _NOTHING:
        h, _, _, *last = call(
            torch.ops.mlstm.forward.default,
            q,
            k,
            v,
            *gates_as_accepted(q, i, f),
            *states_as_accepted(q, c_initial, n_initial, m_initial, dtype_state),
            cu_seqlens,
            state_dtype=dtype_state,
            return_last_states=return_last_states,
            chunk_size=chunk_size or 0,
            siging=siging,
            allow_tf32=q.dtype == torch.float32 and allows_tf32(),
            **options,
        )
    return (h, states_as_returned(*last, siging)) if return_last_states else h


def step(q, k, v, i, f, c, n, m, *, dtype_state=torch.float32, siging=False, **options):
    """One token per row: torch.ops.mlstm.step, or the differentiable sequence of one token."""
    q, k, v = q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2)
    tensors = (q, k, v, i, f, c, n, m)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        h, states = sequence(
            *tensors,
            True,
            autocast_kernel_dtype=torch.get_autocast_dtype(q.device.type),
            dtype_state=dtype_state,
            siging=siging,
            **options,
        )
        return h.squeeze(2), states
    h, *states = torch.ops.mlstm.step(
        q,
        k,
        v,
        *gates_as_accepted(q, i, f),
        *states_as_accepted(q, c, n, m, dtype_state),
        siging=siging,
        **options,
    )
    return h.squeeze(2), states_as_returned(*states, siging)
