# SPDX-License-Identifier: MIT OR Apache-2.0
"""Arrays that are sharded over B or NH are computed where they are, forward and backward, with the
bits of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import STATES, assert_same_bits, call, inputs
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P  # noqa: N817

from mlstm.jax import get_mlstm_kernel
from mlstm.jax.recurrent import mlstm_recurrent_step, mlstm_recurrent_step_slots

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
LAYOUTS = {
    "rows": (("x",), P("x")),
    "heads": (("x",), P(None, "x")),
    "rows_and_heads": (("x", "y"), P("x", "y")),
    "rows_over_both": (("x", "y"), P(("x", "y"))),
    "heads_over_both": (("x", "y"), P(None, ("x", "y"))),
}


def mesh_of(names, axis_type=AxisType.Auto):
    shape = (8,) if len(names) == 1 else (2, 4)
    return jax.make_mesh(shape, names, (axis_type,) * len(names), devices=jax.devices("cpu"))


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def axis_type(request):
    return request.param


@pytest.fixture
def tensors(rng):
    return inputs(rng, b=8, nh=8, s=19, dhqk=4, dhhv=6, states=True)


def forward_and_gradient(kernel):
    """The outputs and the gradient of a random projection of them."""

    def function(tensors, incoming):
        results, pull = jax.vjp(kernel, tensors)
        return results, pull(incoming)

    return function


def assert_local(function, mesh, arguments, spec, wanted_spec=None):
    """`function` of arrays sharded alike: without communication, sharded alike, the same bits."""
    place = lambda x: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    placed = jax.tree.map(place, arguments)
    compiled = jax.jit(function).lower(*placed).compile()
    text = compiled.as_text()
    assert "mlstm_" in text
    assert not [name for name in COLLECTIVES if name in text]
    results = compiled(*placed)
    for x in jax.tree.leaves(results):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, wanted_spec or spec), x.ndim)
    assert_same_bits(results, function(*arguments))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["chunkwise--xl_chunk", "parallel--limit_headdim", "chunkwise--xl_chunk_siging"]
)
def test_sequences(name, layout, axis_type, tensors):
    if "siging" in name:
        del tensors["m_initial"]
    kernel = call(get_mlstm_kernel(name), return_last_states=True)
    incoming = jax.tree.map(jnp.ones_like, kernel(tensors))
    names, spec = LAYOUTS[layout]
    mesh = mesh_of(names, axis_type)
    assert_local(forward_and_gradient(kernel), mesh, (tensors, incoming), spec)


def test_layout(tensors):
    kernel = call(get_mlstm_kernel("chunkwise--xl_chunk"), layout="BSHD")
    function = forward_and_gradient(kernel)
    assert_local(function, mesh_of(("x", "y")), (tensors, kernel(tensors)), P("x", "y"))


def test_in_a_mesh_that_is_set(axis_type, tensors):
    mesh = mesh_of(("x", "y"), axis_type)
    kernel = call(get_mlstm_kernel("chunkwise--xl_chunk"))
    wanted = kernel(tensors)
    with jax.set_mesh(mesh):
        placed = jax.device_put(tensors, NamedSharding(mesh, P("x", "y")))
        assert_same_bits(jax.jit(kernel)(placed), wanted)


def test_step(tensors):
    token = [x[:, :, 0] if len(k) == 1 and x.ndim == 4 else x for k, x in tensors.items()]
    token[3:5] = (x[:, :, :1] for x in token[3:5])
    assert_local(mlstm_recurrent_step, mesh_of(("x", "y")), token, P("x", "y"))


def test_step_slots_over_heads(tensors):
    """Rows may choose any slot, so that only heads are split."""
    tokens = {k: x[:, :, :2] for k, x in tensors.items() if len(k) == 1}
    pools = {k: tensors[name] for k, name in zip("cnm", STATES, strict=True)}
    slots = jnp.array([3, -1, 0, 1, 2, 5, 4, -1])
    step = lambda arrays: mlstm_recurrent_step_slots(**arrays, src_slots=slots)  # noqa: E731
    assert_local(step, mesh_of(("x",)), (tokens | pools,), P(None, "x"))


def test_packed_over_heads(rng):
    packed = inputs(rng, b=1, nh=8, s=19, states=True, rows=3)
    offsets = jnp.array([0, 4, 4, 19])
    kernel = call(get_mlstm_kernel("chunkwise--xl_chunk"), cu_seqlens=offsets)
    function = forward_and_gradient(kernel)
    assert_local(function, mesh_of(("x",)), (packed, kernel(packed)), P(None, "x"))


def test_sharded_tokens_are_gathered(tensors):
    """Nothing is lost where the layout does not fit."""
    mesh = mesh_of(("x",))
    kernel = call(get_mlstm_kernel("chunkwise--xl_chunk"), return_last_states=True)
    tensors["q"] = tensors["q"][:, :, :16]
    tensors |= {k: tensors[k][:, :, :16] for k in "kvif"}
    wanted = kernel(tensors)
    tensors["q"] = jax.device_put(tensors["q"], NamedSharding(mesh, P(None, None, "x")))
    tensors["v"] = jax.device_put(tensors["v"], NamedSharding(mesh, P("x")))
    assert_same_bits(jax.jit(kernel)(tensors), wanted)


# ---- shard_map ----------------------------------------------------------------------------------


@pytest.mark.parametrize("manual", [("x", "y"), ("x",)], ids=["manual", "partly_manual"])
def test_shard_map(manual, tensors):
    kernel = call(get_mlstm_kernel("chunkwise--xl_chunk"), return_last_states=True)
    function = forward_and_gradient(kernel)
    incoming = jax.tree.map(jnp.ones_like, kernel(tensors))
    spec = P(*manual)
    mapped = jax.shard_map(
        function, mesh=mesh_of(("x", "y")), in_specs=spec, out_specs=spec, axis_names=set(manual)
    )
    assert_same_bits(jax.jit(mapped)(tensors, incoming), function(tensors, incoming))


def test_gradient_under_shard_map(tensors):
    """What all devices share gets the sum of their gradients."""
    kernel = call(get_mlstm_kernel("chunkwise--xl_chunk"))
    tensors = {k: x.astype("float64") for k, x in tensors.items()}
    shared = {"k": tensors.pop("k")[:1]}

    def loss(tensors, shared):
        k = jnp.broadcast_to(shared["k"], tensors["q"].shape)
        return (kernel(tensors | {"k": k}) ** 2).sum()

    def local(tensors, shared):
        return jax.lax.psum(loss(tensors, shared), "x")

    mesh = mesh_of(("x",))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P("x"), P()), out_specs=P())
    got = jax.jit(jax.grad(mapped, argnums=(0, 1)))(tensors, shared)
    wanted = jax.grad(loss, argnums=(0, 1))(tensors, shared)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), got, wanted)
