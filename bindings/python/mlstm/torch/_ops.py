# SPDX-License-Identifier: MIT OR Apache-2.0
"""torch.ops.mlstm: loads the operators of bindings/torch/ops.cpp and registers what PyTorch wants
to know about them from Python: shapes of outputs (fake kernels), gradients, autocast.

Shapes as in ops.cpp: q, k (B, NH, S, DHQK); v, h (B, NH, S, DHHV); i, f (B, NH, S); states
c (R, NH, DHQK, DHHV), n (R, NH, DHQK), m (R, NH).
"""

import torch

from mlstm._library import native

# A program may have loaded ops.cpp by itself, with torch.utils.cpp_extension.load.
if not hasattr(torch.ops.mlstm, "forward"):
    torch.ops.load_library(native("mlstm_torch.so"))

_LIBRARY = torch.library.Library("mlstm", "FRAGMENT")
_FORWARD = torch.ops.mlstm.forward.default


def compute_dtype(q):
    """dtype of n and m: float64 for float64 data, else float32."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def cast_for_autocast(dtype, q, k, v):
    """q, k, v in `dtype`; float64 stays, as everywhere in autocast."""
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))


def gates_as_accepted(q, i, f):
    """The gates as given if the kernels read them so, else in float32: never rounded to less."""
    if i.dtype == f.dtype and i.dtype in (q.dtype, torch.float32):
        return i, f
    return i.to(compute_dtype(q)), f.to(compute_dtype(q))


# ---- fake kernels: the allocations of ops.cpp ---------------------------------------------------


def _empty_tokens(like, shape, dtype):
    if like.dim() >= 3 and 0 < like.stride(1) < like.stride(2):
        shape = [shape[0], shape[2], shape[1], *shape[3:]]
        return like.new_empty(shape, dtype=dtype).transpose(1, 2)
    return like.new_empty(shape, dtype=dtype)


def _empty_states(exist, siging, rows, q, v, c_dtype):
    (_, nh, _, dhqk), dhhv = q.shape, v.shape[3]
    c_shape = (rows, nh, dhqk, dhhv) if exist else (0,)
    n_shape = (rows, nh, dhqk) if exist else (0,)
    m_shape = (rows, nh) if exist and not siging else (0,)
    return (
        q.new_empty(c_shape, dtype=c_dtype),
        q.new_empty(n_shape, dtype=compute_dtype(q)),
        q.new_empty(m_shape, dtype=compute_dtype(q)),
    )


def _rows(q, cu_seqlens):
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


@torch.library.register_fake("mlstm::forward")
def _forward_fake(
    q,
    k,
    v,
    i,
    f,
    c_initial,
    n_initial,
    m_initial,
    cu_seqlens,
    *,
    siging=False,
    normalize=True,
    state_dtype=None,
    return_last_states=False,
    **_,
):
    tokens = q.shape[:3]
    if state_dtype is None:
        state_dtype = compute_dtype(q) if c_initial is None else c_initial.dtype
    return (
        _empty_tokens(v, [*tokens, v.shape[3]], q.dtype),
        q.new_empty(tokens if normalize else (0,), dtype=compute_dtype(q)),
        q.new_empty((0,) if siging else tokens, dtype=compute_dtype(q)),
        *_empty_states(return_last_states, siging, _rows(q, cu_seqlens), q, v, state_dtype),
    )


@torch.library.register_fake("mlstm::backward")
def _backward_fake(
    dh,
    dc_last,
    dn_last,
    dm_last,
    q,
    k,
    v,
    i,
    f,
    c_initial,
    n_initial,
    m_initial,
    cu_seqlens,
    h,
    n,
    m,
    *,
    siging=False,
    initial_gradients=False,
    **_,
):
    any_c = dc_last if c_initial is None else c_initial
    state_dtype = compute_dtype(q) if any_c is None else any_c.dtype
    return (
        *(_empty_tokens(t, list(t.shape), t.dtype) for t in (q, k, v, i, f)),
        *_empty_states(initial_gradients, siging, _rows(q, cu_seqlens), q, v, state_dtype),
    )


@torch.library.register_fake("mlstm::step")
def _step_fake(q, k, v, i, f, c, n, m, *, siging=False, **_):
    return (
        _empty_tokens(v, [*q.shape[:3], v.shape[3]], q.dtype),
        *_empty_states(True, m is None, c.shape[0], q, v, c.dtype),
    )


@torch.library.register_fake("mlstm::step_")
def _step_inplace_fake(q, k, v, *_, **__):
    return _empty_tokens(v, [*q.shape[:3], v.shape[3]], q.dtype)


# ---- autograd -----------------------------------------------------------------------------------


def _is_recorded(inputs):
    if torch.is_grad_enabled():
        for t in inputs:
            if t is not None and t.requires_grad:
                return True
    return False


def call(op, *inputs, **options):
    """`op`, not through its autograd kernel, which is in Python, where that would do nothing."""
    if torch.compiler.is_compiling() or _is_recorded(inputs):
        return op(*inputs, **options)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs, **options)


def _forward_below(keyset, inputs, options):
    with torch._C._AutoDispatchBelowAutograd():
        keyset = keyset & torch._C._after_autograd_keyset
        return _FORWARD.redispatch(keyset, *inputs, **options)


class _Forward(torch.autograd.Function):
    """The forward as autograd records it.

    torch.library.register_autograd would do, but takes five times as long as the operator itself
    to look up what the arguments' defaults are.
    """

    @staticmethod
    def forward(ctx, keyset, options, *inputs):
        outputs = _forward_below(keyset, inputs, options)
        h, n, m, *last = outputs
        ctx.set_materialize_grads(False)
        absent = [t for t in last if t.dim() == 1]
        ctx.mark_non_differentiable(n, m, *absent)
        ctx.save_for_backward(*inputs, h, n, m)
        ctx.options = {
            name: value
            for name, value in options.items()
            if name not in ("state_dtype", "return_last_states")
        }
        return outputs

    @staticmethod
    def backward(ctx, dh, _dn, _dm, dc_last, dn_last, dm_last):
        saved = ctx.saved_tensors
        q, m_initial, h = saved[0], saved[7], saved[9]
        if dh is None:
            dh = torch.zeros_like(h)
        # An absent dm_last would mean something else than a zero one: see mlstm_bw_args in mlstm.h.
        if dm_last is None and not ctx.options.get("siging"):
            given = dc_last if dc_last is not None else dn_last
            if given is not None:
                dm_last = given.new_zeros(given.shape[:2], dtype=compute_dtype(q))
        # The first two of needs_input_grad are keyset and options.
        initial_gradients = any(ctx.needs_input_grad[7:10])
        *gradients, dc_initial, dn_initial, dm_initial = call(
            torch.ops.mlstm.backward.default,
            dh,
            dc_last,
            dn_last,
            dm_last,
            *saved,
            **ctx.options,
            initial_gradients=initial_gradients,
        )
        if not initial_gradients:
            return None, None, *gradients, None, None, None, None
        if m_initial is None:
            dm_initial = None
        return None, None, *gradients, dc_initial, dn_initial, dm_initial, None


def _forward_autograd(keyset, *inputs, **options):
    if _is_recorded(inputs):
        return _Forward.apply(keyset, options, *inputs)
    return _forward_below(keyset, inputs, options)


_LIBRARY.impl("forward", _forward_autograd, "Autograd", with_keyset=True)


def _no_double_backward(ctx, *_):
    raise RuntimeError("mlstm: the gradient of the gradient is not implemented")


torch.library.register_autograd("mlstm::backward", _no_double_backward, lib=_LIBRARY)


def _count_change_of_pools(keyset, q, k, v, i, f, c, n, m, *args, **kwargs):
    """Lets autograd notice that the pools change."""
    pools = [t for t in (c, n, m) if t is not None and not t.is_inference()]
    torch.autograd.graph.increment_version(pools)
    keyset = keyset & torch._C._after_ADInplaceOrView_keyset
    op = torch.ops.mlstm.step_.default
    return op.redispatch(keyset, q, k, v, i, f, c, n, m, *args, **kwargs)


_LIBRARY.impl("step_", _count_change_of_pools, "ADInplaceOrView", with_keyset=True)


# ---- autocast: q, k, v take the autocast dtype; the gates and the states keep theirs ------------


def _register_autocast(name, device, key):
    op = getattr(torch.ops.mlstm, name).default

    def kernel(q, k, v, i, f, *args, **kwargs):
        q, k, v = cast_for_autocast(torch.get_autocast_dtype(device), q, k, v)
        i, f = gates_as_accepted(q, i, f)
        with torch.autocast(device, enabled=False):
            return op(q, k, v, i, f, *args, **kwargs)

    _LIBRARY.impl(name, kernel, key)


for _name in ("forward", "step", "step_"):
    _register_autocast(_name, "cpu", "AutocastCPU")
    _register_autocast(_name, "cuda", "AutocastCUDA")
