# SPDX-License-Identifier: MIT OR Apache-2.0
"""The installed `mlstm_kernels` as a second opinion, where it is installed: same interface, same
numbers as its native kernels."""

import inspect

import pytest
import torch

import mlstm.torch
from mlstm.torch.backend_module import mLSTMBackend, mLSTMBackendConfig
from reference import assert_close, error, flat, random_inputs

peers = pytest.importorskip("mlstm_kernels.torch", reason="mlstm_kernels is not installed")
peers_backend = pytest.importorskip("mlstm_kernels.torch.backend_module")

# Its floor of m, and its eps in another frame, make this much of a difference.
TOLERANCE = 2e-5


def peer_kernel(name):
    get = peers.get_mlstm_kernel if "--" in name else peers.get_mlstm_step_kernel
    try:
        return get(name)
    except ValueError:
        pytest.skip(f"this mlstm_kernels has no {name} (it needs Triton)")


@pytest.mark.parametrize("states", [False, True], ids=["from_zero", "from_state"])
def test_chunkwise(states, device):
    x = random_inputs(device, torch.float64, s=64, states=states)
    ours, theirs = x.leaves(), x.leaves()
    got = flat(mlstm.torch.get_mlstm_kernel("chunkwise--xl_chunk")(*ours, return_last_states=True))
    wanted = flat(
        peer_kernel("chunkwise--native_autograd")(*theirs, return_last_states=True, chunk_size=16)
    )
    assert_close(got, wanted, TOLERANCE)
    gradient = torch.randn_like(got[0])
    got[0].backward(gradient)
    wanted[0].backward(gradient)
    assert_close(list(ours.gradients())[:5], list(theirs.gradients())[:5], TOLERANCE)


@pytest.mark.parametrize("name", ["chunkwise--xl_chunk", "parallel--limit_headdim"])
def test_detached_denominator(name, device):
    """Their hand-written backward, which leaves the denominator out."""
    x = random_inputs(device, torch.float64, s=64)
    ours, theirs = x.leaves(), x.leaves()
    h = mlstm.torch.get_mlstm_kernel(name)(*ours, detach_denominator=True)
    wanted = peer_kernel("parallel--native_custbw")(
        *list(theirs)[:5], autocast_kernel_dtype=torch.float32
    )
    gradient = torch.randn_like(h)
    h.backward(gradient)
    wanted.backward(gradient)
    assert_close(list(ours.gradients())[:5], list(theirs.gradients())[:5], 1e-3)


def test_siging(device):
    x = random_inputs(device, torch.float64, s=64)
    kernel = mlstm.torch.get_mlstm_kernel("chunkwise--xl_chunk_siging")
    native = peer_kernel("parallel--native_siging_autograd")
    assert error(kernel(*x), native(*list(x)[:5])) < TOLERANCE


def test_step(device):
    x = random_inputs(device, s=1, states=True)
    tokens = (x.q[:, :, 0], x.k[:, :, 0], x.v[:, :, 0], x.i, x.f, x.c, x.n, x.m)
    got = flat(mlstm.torch.get_mlstm_step_kernel("step")(*tokens))
    wanted = flat(peer_kernel("native")(*tokens))
    assert [t.shape for t in got] == [t.shape for t in wanted]
    assert_close(got, wanted, TOLERANCE)


@pytest.mark.parametrize("s", [1, 5, 64, 100])
def test_backend_in_inference(s, device):
    x = random_inputs(device, s=s, states=True)
    native = peers_backend.mLSTMBackendConfig(mode="inference", chunk_size=16)
    wanted = flat(peers_backend.mLSTMBackend(native)(*x))
    got = flat(mLSTMBackend(mLSTMBackendConfig(mode="inference"))(*x))
    assert [t.shape for t in got] == [t.shape for t in wanted]
    assert_close(got, wanted, TOLERANCE)


def test_backend_configuration_has_their_fields():
    theirs = inspect.signature(peers_backend.mLSTMBackendConfig).parameters
    assert set(theirs) <= set(inspect.signature(mLSTMBackendConfig).parameters)


@pytest.mark.parametrize(
    "name",
    [
        "chunkwise--triton_xl_chunk",
        "chunkwise--triton_limit_chunk",
        "chunkwise--triton_xl_chunk_siging",
        "parallel--triton_limit_headdim",
        "triton",
    ],
)
def test_their_keywords_are_accepted(name):
    """By name, in their order up to eps."""
    get = mlstm.torch.get_mlstm_kernel if "--" in name else mlstm.torch.get_mlstm_step_kernel
    theirs = inspect.signature(peer_kernel(name)).parameters.values()
    names = [p.name for p in theirs if p.kind != p.VAR_KEYWORD]
    x = random_inputs("cpu", s=1, states=True)
    tensors = (x.q, x.k, x.v, x.i, x.f, x.c, x.n, x.m)
    if name == "triton":
        tensors = (*(t[:, :, 0] for t in tensors[:3]), *tensors[3:])
    shared = names[: names.index("eps") + 1]
    assert list(inspect.signature(get(name)).parameters)[: len(shared)] == shared
    options = {p.name: p.default for p in theirs if p.name in names[8:]}
    get(name)(*tensors, **options)
