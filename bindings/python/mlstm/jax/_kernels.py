# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the kernel functions share: gradients, and conversion of arguments between the interface of
`mlstm_kernels` and the operations."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlstm._tuning import ignore_tuning
from mlstm.jax import _targets
from mlstm.jax._operations import free_letters, operation, specs
from mlstm.jax._targets import Attributes, Call, compute_dtype

_INITIAL = ("c_initial", "n_initial", "m_initial")
_LAST = ("c_last", "n_last", "m_last")
_POOLS = ("c", "n", "m")


class Options(NamedTuple):
    """What of a call is no array."""

    attributes: Attributes
    parallel: bool = False
    return_last_states: bool = False
    state_dtype: jnp.dtype | None = None  # of c
    step: bool = False  # one token, by the step kernel where there is no gradient
    tokens_first: bool = False

    @property
    def siging(self):
        return self.attributes.gate == _targets.SIGMOID


def _call(options, op, operands, results):
    """`op` on arrays by name, to results by name."""
    attributes = options.attributes
    if op == "step":
        attributes = attributes._replace(chunk_size=0)
    else:
        op = f"{'parallel' if options.parallel else 'chunkwise'}_{op}"
    kind = op.split("_")[-1]
    names = tuple(name for name in _targets.OPERANDS[kind] if operands.get(name) is not None)
    call = Call(op, names, tuple(results), attributes, options.state_dtype, options.tokens_first)
    return _run(call, operands)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run(call, operands):
    values = operation(call)(*(operands[name] for name in call.operands))
    return dict(zip(call.results, values, strict=True))


@_run.defjvp
def _no_gradient(*_):
    raise NotImplementedError(
        "mlstm: no gradient of a gradient, nor of a step on slots, is implemented"
    )


def _states(options, names):
    return names[:2] if options.siging else names


def _forward(options, tensors, saved=()):
    last = _states(options, _LAST) if options.return_last_states else ()
    return _call(options, "fw", tensors, ("h", *saved, *last))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable(options, tensors):
    """{"h": h, "c_last": ..., ...} of {"q": q, ..., "c_initial": ..., ...}."""
    if not options.step:
        return _forward(options, tensors)
    pools = dict(zip(_POOLS, (tensors.get(name) for name in _INITIAL), strict=True))
    names = _states(options, _POOLS)
    results = _call(options, "step", tensors | pools, ("h", *names))
    last = zip(_LAST, (results[name] for name in names), strict=False)
    return {"h": results["h"], **dict(last)}


def _differentiable_fw(options, tensors):
    normalize = not options.attributes.flags & _targets.NO_NORMALIZE
    saved = (["n"] if normalize else []) + ([] if options.siging else ["m"])
    results = _forward(options, tensors, saved)
    kept = {name: results.pop(name) for name in saved}
    if normalize:
        kept["h"] = results["h"]
    return results, (tensors, kept)


def _differentiable_bw(options, kept, cotangents):
    tensors, saved = kept
    incoming = {f"d{name}": gradient for name, gradient in cotangents.items()}
    wanted = [f"d{name}" for name in (*"qkvif", *_INITIAL) if name in tensors]
    gradients = _call(options, "bw", tensors | saved | incoming, wanted)
    return ({name: gradients.get(f"d{name}") for name in tensors},)


differentiable.defvjp(_differentiable_fw, _differentiable_bw)


# ---- the interface of `mlstm_kernels` ------------------------------------------------------------


def in_explicit_mesh(call, function, tensors):
    """`function` of arrays by name. Where the mesh has explicit axes, they are partitioned like
    automatic ones, and the results are sharded as `call` says."""
    types = [jax.typeof(x) for x in tensors.values()]
    axes = next((t.sharding.mesh.explicit_axes for t in types if t.sharding.mesh.explicit_axes), ())
    if not axes:
        return function(tensors)
    given = [t.sharding.spec for t in types]
    _, wanted = specs(
        free_letters(call), call.dims(_targets.OPERANDS), given, call.dims(_targets.RESULTS)
    )
    wanted = dict(zip(call.results, wanted, strict=True))
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=wanted)(tensors)


def as_accepted(tensors, states, dtype_state=None, autocast_kernel_dtype=None):
    """Arrays as the operations take them, and the dtype of c: q, k, v in the kernel's dtype if one
    is given, gates and states not rounded to less than the library reads, m without a last
    dimension of size 1."""
    tensors = {name: jnp.asarray(x) for name, x in tensors.items() if x is not None}
    if autocast_kernel_dtype is not None:
        for name in "qkv":
            tensors[name] = tensors[name].astype(autocast_kernel_dtype)
    q, i, f = (tensors[name] for name in "qif")
    compute = compute_dtype(q)
    if i.dtype != f.dtype or i.dtype not in (q.dtype, jnp.float32):
        tensors |= {"i": i.astype(compute), "f": f.astype(compute)}
    c, _, m = (tensors.get(name) for name in states)
    if compute == jnp.float64:
        dtype_state = compute
    elif dtype_state is None:
        dtype_state = compute if c is None else c.dtype
    if m is not None and m.ndim == 3 and m.shape[2] == 1:
        tensors[states[2]] = m[:, :, 0]
    for name, dtype in zip(states, (dtype_state, compute, compute), strict=True):
        if name in tensors:
            tensors[name] = tensors[name].astype(dtype)
    return _vary_alike(tensors), jnp.dtype(dtype_state)


def _vary_alike(tensors):
    """Under shard_map, arrays that all count as different from device to device. The cast makes the
    gradient of one that is not a sum over devices."""
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in tensors.values()))
    return {
        name: jax.lax.pcast(
            x, tuple(varying - jax.typeof(x).manual_axis_type.varying), to="varying"
        )
        for name, x in tensors.items()
    }


def _allows_tf32():
    """jax's own switch, by either name; its default does not count as leave."""
    return jax.config.jax_default_matmul_precision in ("tensorfloat32", "TF32_TF32_F32")


def attributes_of(
    eps=1e-6,
    qk_scale=None,
    chunk_size=None,
    siging=False,
    normalize=True,
    detach_denominator=False,
    **kwargs,
):
    """Attributes of the targets for the kernel functions' options."""
    ignore_tuning("mlstm.jax", kwargs)
    flags = 0 if normalize else _targets.NO_NORMALIZE
    flags |= _targets.DETACH_DENOMINATOR if detach_denominator else 0
    flags |= _targets.NO_EPS if eps == 0 else 0
    flags |= _targets.ALLOW_TF32 if _allows_tf32() else 0
    gate = _targets.SIGMOID if siging else _targets.EXPONENTIAL
    return Attributes(flags, gate, int(chunk_size or 0), float(qk_scale or 0), float(eps))


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
    autocast_kernel_dtype=None,
    dtype_state=None,
    cu_seqlens=None,
    parallel=False,
    step=False,
    layout="BHSD",
    **options,
):
    """h, or (h, states) with m (R, NH), for the arguments of the kernel functions."""
    tensors = dict(q=q, k=k, v=v, i=i, f=f, c_initial=c_initial, n_initial=n_initial)
    tensors |= dict(m_initial=m_initial, cu_seqlens=cu_seqlens)
    tensors, dtype_state = as_accepted(tensors, _INITIAL, dtype_state, autocast_kernel_dtype)
    if layout not in ("BHSD", "BSHD"):
        raise ValueError(f"layout: expected 'BHSD' or 'BSHD', got {layout!r}")
    options = Options(
        attributes_of(**options),
        parallel,
        bool(return_last_states),
        dtype_state,
        step,
        layout == "BSHD",
    )
    names = ("h", *_states(options, _LAST)) if return_last_states else ("h",)
    call = Call("chunkwise_fw", tuple(tensors), names, options.attributes, dtype_state)
    results = in_explicit_mesh(call, partial(differentiable, options), tensors)
    h, *states = (results[name] for name in names)
    return (h, tuple(states)) if return_last_states else h


def step_on_pools(tensors, **options):
    """h and the new pools, by name, for the operands of the step target."""
    tensors, dtype_state = as_accepted(tensors, _POOLS)
    if "src_slots" in tensors or "num_tokens" in tensors:
        q, v = tensors["q"], tensors["v"]
        # The library leaves the h of padding alone.
        tensors["h"] = jnp.zeros((*q.shape[:3], *v.shape[3:]), q.dtype)
        tensors = _vary_alike(tensors)
    names = ("h", *(name for name in _POOLS if name in tensors))
    call = Call("step", tuple(tensors), names, attributes_of(**options), dtype_state)
    return in_explicit_mesh(call, partial(_run, call), tensors)
