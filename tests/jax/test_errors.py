# SPDX-License-Identifier: MIT OR Apache-2.0
"""What does not fit is refused with the library's message."""

import jax
import jax.numpy as jnp
import pytest
from arrays import STATES, inputs

from mlstm.jax.chunkwise import mlstm_chunkwise__xl_chunk, mlstm_siging_chunkwise__xl_chunk
from mlstm.jax.recurrent import mlstm_recurrent_step, mlstm_recurrent_step_slots

Refused = jax.errors.JaxRuntimeError


def refused(message):
    return pytest.raises(Refused, match=message)


@pytest.fixture
def tensors(device, rng):
    return inputs(rng, s=7, states=True)


def run(tensors, **changes):
    jax.block_until_ready(mlstm_chunkwise__xl_chunk(**tensors | changes))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: {"k": x["k"][:, :, :, :3]}, r"k\.shape: expected \[2, 2, 7, 16\]"),
        (lambda x: {"v": x["v"][0]}, r"v\.rank: expected 4"),
        (lambda x: {"q": x["q"][0]}, r"q\.rank: expected 4"),
        (lambda x: {"i": x["i"][:, :, :3]}, r"i\.shape: expected \[2, 2, 7\]"),
        (lambda x: {"k": x["k"].astype("bfloat16")}, r"k\.dtype: expected float32"),
        (lambda x: {k: x[k].astype("int32") for k in "qkv"}, "dtype"),
        (lambda x: {"n_initial": None}, "n_initial: expected"),
        (lambda x: {"c_initial": x["c_initial"][:1]}, r"c_initial\.shape: expected"),
        (lambda x: {"chunk_size": -1}, "chunk_size: expected"),
        (lambda x: {"eps": -1.0}, "eps: expected"),
        (lambda x: {"qk_scale": float("nan")}, "qk_scale: expected"),
        (lambda x: {"dtype_state": jnp.int32}, "dtype"),
        (lambda x: {"cu_seqlens": jnp.array([0, 7])}, r"b: expected 1"),
    ],
)
def test_sequences(change, message, tensors):
    with refused(message):
        run(tensors, **change(tensors))


@pytest.mark.parametrize("offsets", [[0, 5], [1, 7], [0, 6, 2, 7]], ids=str)
def test_offsets(offsets, rng):
    """Their contents are checked on the CPU."""
    tensors = inputs(rng, b=1, s=7)
    with refused("cu_seqlens"):
        run(tensors, cu_seqlens=jnp.array(offsets))


def test_gradient(tensors):
    with refused(r"k\.shape: expected"):
        jax.block_until_ready(
            jax.grad(lambda k: mlstm_chunkwise__xl_chunk(**tensors | {"k": k}).sum())(
                tensors["k"][:, :, :, :3]
            )
        )


def test_step(tensors):
    token = [x[:, :, 0] if len(k) == 1 and x.ndim == 4 else x for k, x in tensors.items()]
    token[3:5] = (x[:, :, 0] for x in token[3:5])
    with refused("num_slots: expected at least b = 2"):
        jax.block_until_ready(mlstm_recurrent_step(*token[:5], token[5][:1], *token[6:]))


def test_slots(tensors):
    tokens = {k: x for k, x in tensors.items() if len(k) == 1}
    pools = {k: tensors[name] for k, name in zip("cnm", STATES, strict=True)}
    many = {k: jnp.concatenate([x] * 3, 2) for k, x in tokens.items()}
    with refused("s: expected"):
        jax.block_until_ready(mlstm_recurrent_step_slots(**many, **pools))


@pytest.mark.parametrize("slots", [[0, 0], [0, 2]], ids=str)
@pytest.mark.parametrize("mapped", [False, True])
def test_slots_that_collide(slots, mapped, rng):
    """Their contents are checked on the CPU, under vmap too."""
    tokens = inputs(rng, s=1, states=True)
    pools = {k: tokens.pop(name) for k, name in zip("cnm", STATES, strict=True)}
    step = lambda slots: mlstm_recurrent_step_slots(**tokens, **pools, src_slots=slots)  # noqa: E731
    with refused("src_slots"):
        if mapped:
            jax.vmap(step)(jnp.array([slots, [0, 1]]))
        else:
            step(jnp.array(slots))


@pytest.mark.parametrize("kernel", [mlstm_chunkwise__xl_chunk, mlstm_siging_chunkwise__xl_chunk])
def test_unknown_keyword(kernel, rng):
    with pytest.raises(TypeError, match="unexpected keyword argument 'chunksize'"):
        kernel(*inputs(rng).values(), chunksize=3)


def test_tuning_arguments_are_ignored(rng):
    mlstm_chunkwise__xl_chunk(*inputs(rng).values(), siz_b_L_parallel=64, num_warps_intra=4)
