# SPDX-License-Identifier: MIT OR Apache-2.0
"""The same bits as from mlstm.torch, for every kernel, option, output and gradient."""

import jax
import jax.numpy as jnp
import pytest
import torch
from arrays import DTYPES, STATES, assert_same_bits, call, incoming, inputs, to_torch

import mlstm.jax as ours
import mlstm.torch as theirs

KERNELS = ("chunkwise--xl_chunk", "parallel--limit_headdim", "chunkwise--xl_chunk_siging")
OPTIONS = {
    "detach_denominator": dict(detach_denominator=True),
    "qk_scale": dict(qk_scale=0.3),
    "no_eps": dict(eps=0.0),
    "chunks_of_16": dict(chunk_size=16),
}


def compare(rng, device, name, tensors, cu_seqlens=None, dtype_state=None, **options):
    """Outputs and gradients of both, bit for bit."""
    if "siging" in name:
        tensors.pop("m_initial", None)
    packed = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
    state = {} if dtype_state is None else {"dtype_state": getattr(jnp, dtype_state)}
    kernel = call(
        ours.get_mlstm_kernel(name), return_last_states=True, **options, **packed, **state
    )
    results, pull = jax.vjp(jax.jit(kernel), tensors)
    gradients = incoming(rng, results)
    (got,) = pull(gradients)

    leaves = {key: to_torch(x, device).requires_grad_() for key, x in tensors.items()}
    packed = {key: to_torch(x, device) for key, x in packed.items()}
    state = {} if dtype_state is None else {"dtype_state": getattr(torch, dtype_state)}
    kernel = theirs.get_mlstm_kernel(name)
    h, states = kernel(**leaves, return_last_states=True, **options, **packed, **state)
    assert_same_bits(results, (h, states))
    wanted = [to_torch(x, device) for x in jax.tree.leaves(gradients)]
    torch.autograd.backward(
        [h, *states], [x.reshape(t.shape) for t, x in zip([h, *states], wanted, strict=True)]
    )
    assert_same_bits(got, {key: x.grad for key, x in leaves.items()})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("states", [False, True], ids=["from_zero", "from_state"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels(name, states, dtype, device, rng):
    compare(rng, device, name, inputs(rng, dtype, states=states))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, device, rng):
    compare(rng, device, KERNELS[0], inputs(rng, states=True), **options)


def test_without_denominator(device, rng):
    compare(rng, device, KERNELS[2], inputs(rng, states=True), normalize=False)


@pytest.mark.parametrize("dtype_state", ["bfloat16", "float16"])
def test_narrow_states(dtype_state, device, rng):
    compare(rng, device, KERNELS[0], inputs(rng, "bfloat16", states=True), dtype_state=dtype_state)


@pytest.mark.parametrize("gate_dtype", ["bfloat16", "float16"])
def test_gates_of_other_dtypes(gate_dtype, device, rng):
    tensors = inputs(rng, "bfloat16")
    tensors |= {key: tensors[key].astype(gate_dtype) for key in "if"}
    compare(rng, device, KERNELS[0], tensors)


@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
@pytest.mark.parametrize("offsets", [[0, 0, 1, 1, 2, 65, 65, 130], [0, 40], [0, 0]], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_packed(name, offsets, index_dtype, device, rng):
    rows, s = len(offsets) - 1, offsets[-1]
    tensors = inputs(rng, b=1, s=s, states=True, rows=rows)
    compare(rng, device, name, tensors, cu_seqlens=jnp.array(offsets, index_dtype))


@pytest.mark.parametrize("s", [0, 1])
def test_short(s, device, rng):
    compare(rng, device, KERNELS[0], inputs(rng, s=s, states=True))


@pytest.mark.parametrize("name", ["parallel--limit_headdim_siging"])
def test_parallel_siging_is_chunkwise_siging(name, rng):
    tensors = inputs(rng, "float64")
    results = [call(ours.get_mlstm_kernel(key))(tensors) for key in (name, KERNELS[2])]
    assert jnp.allclose(*results, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_step(dtype, device, rng):
    tensors = inputs(rng, dtype, s=1, states=True)
    c, n, m = (tensors.pop(key) for key in STATES)
    token = [x[:, :, 0] if x.ndim == 4 else x for x in tensors.values()]
    got = jax.jit(ours.get_mlstm_step_kernel("step"))(*token, c, n, m)
    arrays = [to_torch(x, device) for x in (*token, c, n, m[..., None])]
    assert_same_bits(got, theirs.get_mlstm_step_kernel("step")(*arrays))


@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
def test_step_slots(index_dtype, device, rng):
    tensors = inputs(rng, b=4, s=3, states=True, rows=7)
    c, n, m = (tensors.pop(key) for key in STATES)
    slots = dict(src_slots=[5, -1, 2, 0], dst_slots=[5, -1, 3, -1], num_tokens=[3, 3, 1, 0])
    slots = {key: jnp.array(x, index_dtype) for key, x in slots.items()}
    slots["has_state"] = jnp.array([True, True, False, True])
    h, states = jax.jit(ours.recurrent.mlstm_recurrent_step_slots)(
        **tensors, c=c, n=n, m=m, **slots
    )
    pools = [to_torch(x, device) for x in (c, n, m)]
    arrays = {key: to_torch(x, device) for key, x in (tensors | slots).items()}
    wanted = theirs.recurrent.mlstm_recurrent_step_slots(
        **arrays, **dict(zip("cnm", pools, strict=True))
    )
    assert_same_bits((h, states), (wanted, pools))
