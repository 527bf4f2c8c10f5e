# SPDX-License-Identifier: MIT OR Apache-2.0
"""jax's transformations of the kernels."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import STATES, assert_same_bits, call, inputs
from jax.test_util import check_grads

from mlstm.jax import get_mlstm_kernel
from mlstm.jax.chunkwise import mlstm_chunkwise__xl_chunk, mlstm_siging_chunkwise__xl_chunk
from mlstm.jax.recurrent import (
    mlstm_recurrent_sequence,
    mlstm_recurrent_step,
    mlstm_recurrent_step_slots,
)

chunkwise = call(mlstm_chunkwise__xl_chunk, return_last_states=True)


def squares(kernel):
    """The gradient of a sum over all outputs."""

    def total(tensors):
        return sum((x**2).sum() for x in jax.tree.leaves(kernel(tensors)))

    return jax.grad(total)


def stack(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def row_of(tree, row):
    return jax.tree.map(lambda x: x[row], tree)


def mapped(kernel, size, in_axes=0):
    """vmap as a loop over the mapped axis of every array by name."""

    def loop(tensors):
        axes = in_axes if isinstance(in_axes, dict) else dict.fromkeys(tensors, in_axes)
        rows = [
            kernel({k: x if axes[k] is None else x.take(row, axes[k]) for k, x in tensors.items()})
            for row in range(size)
        ]
        return stack(rows)

    return loop


@pytest.mark.parametrize("name", ["chunkwise--xl_chunk", "parallel--limit_headdim"])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 5, 5, 13]], ids=["rows", "packed"])
def test_gradients(name, cu_seqlens, rng):
    packed = {} if cu_seqlens is None else {"cu_seqlens": jnp.array(cu_seqlens)}
    tensors = inputs(
        rng, "float64", b=1, s=13, dhqk=4, dhhv=5, states=True, rows=3 if packed else 1
    )
    kernel = call(get_mlstm_kernel(name), return_last_states=True, **packed)
    check_grads(kernel, (tensors,), order=1, modes=["rev"])


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_siging(normalize, rng):
    tensors = inputs(rng, "float64", s=13, dhqk=4, dhhv=5, states=True)
    del tensors["m_initial"]
    options = dict(normalize=normalize, return_last_states=True)
    check_grads(call(mlstm_siging_chunkwise__xl_chunk, **options), (tensors,), 1, modes=["rev"])


def test_gradients_of_step(rng):
    tensors = inputs(rng, "float64", s=1, dhqk=4, dhhv=5, states=True)
    token = [x[:, :, 0] if x.ndim == 4 and len(k) == 1 else x for k, x in tensors.items()]
    check_grads(mlstm_recurrent_step, token, order=1, modes=["rev"])


def test_no_second_derivative(rng):
    tensors = inputs(rng, "float64", s=3)
    with pytest.raises(NotImplementedError, match="no gradient of a gradient"):
        jax.jacrev(squares(chunkwise))(tensors)


def test_unused_outputs(rng):
    """A loss of some outputs only."""
    tensors = inputs(rng, "float64", s=9, dhqk=3, dhhv=3, states=True)
    for pick in (lambda h, s: h, lambda h, s: s[0], lambda h, s: s[1], lambda h, s: s[2]):
        check_grads(lambda x, pick=pick: pick(*chunkwise(x)), (tensors,), 1, modes=["rev"])


# ---- vmap ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_vmap(axis, gradient, device, rng):
    tensors = [inputs(rng, s=17, states=True) for _ in range(3)]
    kernel = squares(chunkwise) if gradient else chunkwise
    stacked = jax.tree.map(lambda *x: jnp.stack(x, axis), *tensors)
    got = jax.jit(jax.vmap(kernel, in_axes=axis))(stacked)
    assert_same_bits(got, mapped(kernel, 3, axis)(stacked))


def test_vmap_is_one_call(rng):
    """Not one for each row, nor a loop."""
    tensors = stack([inputs(rng, s=17, states=True) for _ in range(3)])
    for kernel, calls in ((chunkwise, 1), (squares(chunkwise), 2)):
        text = jax.jit(jax.vmap(kernel)).lower(tensors).as_text()
        assert text.count("custom_call @mlstm_chunkwise_") == calls
        assert "stablehlo.while" not in text


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_vmap_of_some(gradient, rng):
    """Operands that are not mapped belong to every row."""
    tensors = inputs(rng, s=17, states=True)
    kernel = squares(chunkwise) if gradient else chunkwise
    for name in ("q", "i", "c_initial"):
        some = tensors | {name: jnp.stack([tensors[name], tensors[name] * 0.5])}
        axes = dict.fromkeys(some) | {name: 0}
        got = jax.vmap(kernel, in_axes=(axes,))(some)
        assert_same_bits(got, mapped(kernel, 2, axes)(some))


def test_vmap_of_vmap(rng):
    tensors = [[inputs(rng, s=9) for _ in range(2)] for _ in range(3)]
    stacked = stack(map(stack, tensors))
    got = jax.vmap(jax.vmap(squares(chunkwise)))(stacked)
    for outer, row in enumerate(tensors):
        for inner, x in enumerate(row):
            assert_same_bits(row_of(got, (outer, inner)), squares(chunkwise)(x))


@pytest.mark.parametrize("offsets_mapped", [False, True])
def test_vmap_of_packed(offsets_mapped, rng):
    """Rows of packed sequences are packed together."""

    def gradient(tensors, cu_seqlens):
        options = dict(return_last_states=True, cu_seqlens=cu_seqlens)
        return squares(call(mlstm_chunkwise__xl_chunk, **options))(tensors)

    offsets = jnp.array([[0, 3, 3, 17], [0, 1, 16, 17] if offsets_mapped else [0, 3, 3, 17]])
    tensors = [inputs(rng, b=1, s=17, states=True, rows=3) for _ in range(2)]
    stacked = stack(tensors)
    axes = (0, 0 if offsets_mapped else None)
    got = jax.vmap(gradient, axes)(stacked, offsets if offsets_mapped else offsets[0])
    for row, x in enumerate(tensors):
        assert_same_bits(row_of(got, row), gradient(x, offsets[row]))


def test_vmap_of_step_slots(rng):
    """Every row has slots of its own, also where the pools are not mapped."""
    tensors = inputs(rng, s=2, states=True, rows=5)
    pools = dict(zip("cnm", (tensors.pop(key) for key in STATES), strict=True))
    q = jnp.stack([tensors.pop("q"), jnp.ones((2, 2, 2, 16), jnp.float32)])
    slots = jnp.array([[4, -1], [1, 2]])
    step = lambda q, slots: mlstm_recurrent_step_slots(q, **tensors, **pools, src_slots=slots)  # noqa: E731
    got = jax.vmap(step)(q, slots)
    for row in range(2):
        wanted = step(q[row], slots[row])
        assert_same_bits(row_of(got, row), wanted)


# ---- scan, checkpoint, donation -----------------------------------------------------------------


def test_scan_over_segments(device, rng):
    """Segments that hand on their state are one long sequence, with its gradient."""
    tensors = inputs(rng, "float64", s=24, states=True)
    states = {name: tensors.pop(name) for name in STATES}

    def segments(tensors, states):
        cut = {
            k: jnp.moveaxis(x.reshape(*x.shape[:2], 4, 6, *x.shape[3:]), 2, 0)
            for k, x in tensors.items()
        }

        def segment(state, x):
            h, state = mlstm_chunkwise__xl_chunk(**x, **state, return_last_states=True)
            return dict(zip(STATES, state, strict=True)), h

        last, h = jax.lax.scan(segment, states, cut)
        return jnp.concatenate(list(h), 2), last

    def whole(tensors, states):
        h, last = mlstm_chunkwise__xl_chunk(**tensors, **states, return_last_states=True)
        return h, dict(zip(STATES, last, strict=True))

    def loss(function, *arguments):
        h, last = function(*arguments)
        # What does not depend on the frame m of the state.
        scale = jnp.exp(last["m_initial"])
        c, n = last["c_initial"] * scale[..., None, None], last["n_initial"] * scale[..., None]
        return (h**2).sum() + (c**3).sum() + n.sum()

    if device == "cuda":
        pytest.skip("float64 has no kernel on every GPU")
    got, wanted = (
        jax.jit(jax.value_and_grad(partial(loss, function), argnums=(0, 1)))(tensors, states)
        for function in (segments, whole)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), got, wanted)


def test_scan_over_steps(rng):
    """The step in a scan is the sequence."""
    tensors = inputs(rng, "float64", s=9, states=True)
    states = [tensors.pop(name) for name in STATES]

    def token(state, x):
        h, state = mlstm_recurrent_step(*x[:3], *(gate[..., None] for gate in x[3:]), *state)
        return state, h

    steps = [jnp.moveaxis(x, 2, 0) for x in tensors.values()]
    last, h = jax.lax.scan(token, (*states[:2], states[2][..., None]), steps)
    got = jnp.moveaxis(h, 0, 2), last
    wanted = mlstm_recurrent_sequence(*tensors.values(), *states, return_last_states=True)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11), got, wanted)


def test_checkpoint(device, rng):
    tensors = inputs(rng, states=True)
    got = jax.jit(squares(jax.checkpoint(chunkwise)))(tensors)
    assert_same_bits(got, squares(chunkwise)(tensors))


@pytest.mark.parametrize("slots", [False, True])
def test_donated_state_is_updated_in_place(slots, device, rng):
    tensors = inputs(rng, s=1, states=True)
    c, n, m = (tensors.pop(name) for name in STATES)
    if slots:
        step = mlstm_recurrent_step_slots
    else:
        step = mlstm_recurrent_step
        tensors = {k: x[:, :, 0] if x.ndim == 4 else x for k, x in tensors.items()}
        m = m[..., None]
    wanted = step(**tensors, c=c, n=n, m=m)
    where = [x.unsafe_buffer_pointer() for x in (c, n, m)]
    compiled = jax.jit(step, donate_argnames=("c", "n", "m"))
    got = compiled(**tensors, c=c, n=n, m=m)
    assert c.is_deleted() and n.is_deleted() and m.is_deleted()
    assert [x.unsafe_buffer_pointer() for x in got[1]] == where
    assert_same_bits(got, wanted)


def test_slots_without_state_are_not_read(device, rng):
    """Nor is the row of a padding slot, and what no row writes stays as it is."""
    tensors = inputs(rng, s=3, states=True, rows=4)
    pools = {k: tensors.pop(name) for k, name in zip("cnm", STATES, strict=True)}
    dirty = {k: x.at[jnp.array([1, 3])].set(jnp.nan) for k, x in pools.items()}
    slots = dict(src_slots=jnp.array([1, 2]), has_state=jnp.array([False, True]))
    h, states = mlstm_recurrent_step_slots(**tensors, **dirty, **slots)
    assert not jnp.isnan(h).any()
    for k, x in zip("cnm", states, strict=True):
        assert jnp.isnan(x[3]).all() and not jnp.isnan(x[:3]).any()
        assert_same_bits(x[0], pools[k][0])
    h, states = mlstm_recurrent_step_slots(**tensors, **dirty, src_slots=jnp.array([-1, -1]))
    assert_same_bits((h, states), (jnp.zeros_like(h), tuple(dirty.values())))


# ---- layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chunkwise--xl_chunk", "parallel--limit_headdim"])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 5, 5, 17]], ids=["rows", "packed"])
def test_layout_changes_no_bit(name, cu_seqlens, rng):
    packed = {} if cu_seqlens is None else {"cu_seqlens": jnp.array(cu_seqlens)}
    tensors = [inputs(rng, b=1, s=17, states=True, rows=3 if packed else 1) for _ in range(2)]
    for mapped, x in ((jax.vmap, stack(tensors)), (lambda f: f, tensors[0])):
        wanted, got = (
            mapped(squares(call(get_mlstm_kernel(name), return_last_states=True, **options)))(x)
            for options in (packed, packed | {"layout": "BSHD"})
        )
        assert_same_bits(got, wanted)


def test_layout_saves_copies(rng):
    """Transpositions from and to (B, S, NH, ...) cancel, forward and backward."""
    tensors = {name: x.swapaxes(1, 2) for name, x in inputs(rng).items()}

    def transpositions(layout):
        def loss(tensors):
            x = {name: x.swapaxes(1, 2) for name, x in tensors.items()}
            h = mlstm_chunkwise__xl_chunk(**x, layout=layout).swapaxes(1, 2)
            return (h**2).sum(), h

        text = jax.jit(jax.grad(loss, has_aux=True)).lower(tensors).compile().as_text()
        return text.count(" transpose(")

    assert transpositions("BHSD") > 0
    assert transpositions("BSHD") == 0


def test_unknown_layout(rng):
    with pytest.raises(ValueError, match="layout: expected 'BHSD' or 'BSHD', got 'BSD'"):
        mlstm_chunkwise__xl_chunk(**inputs(rng), layout="BSD")
