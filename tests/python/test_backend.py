# SPDX-License-Identifier: MIT OR Apache-2.0
"""mLSTMBackend in its modes."""

import pytest
import torch

from mlstm.torch.backend_module import mLSTMBackend, mLSTMBackendConfig
from reference import Inputs, assert_close, flat, random_inputs, recurrence

KERNELS = ["chunkwise--xl_chunk", "chunkwise--limit_chunk", "parallel--limit_headdim"]
SIGING = "chunkwise--xl_chunk_siging"


def backend(**config):
    return mLSTMBackend(mLSTMBackendConfig(**config))


@pytest.mark.parametrize("mode", ["train", "train_with_padding"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_training(kernel, mode, device):
    x = random_inputs(device, s=77, states=True)
    h, states = recurrence(x)
    module = backend(chunkwise_kernel=kernel, mode=mode)
    assert_close(flat(module(*x)), [h, *states], 1e-5)
    module = backend(chunkwise_kernel=kernel, mode=mode, return_last_states=False)
    got = module(*x)
    assert isinstance(got, torch.Tensor) and got.shape == (2, 2, 77, 24)
    assert_close([got], [h], 1e-5)
    assert_close(flat(module(*x, return_last_states=True)), [h, *states], 1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_inference(kernel, device):
    """A prompt of any length, then token by token, is one long sequence."""
    x = random_inputs(device, s=45)
    module = backend(chunkwise_kernel=kernel, mode="inference", return_last_states=False)
    rows, states = [], (None, None, None)
    for start, stop in [(0, 0), (0, 1), (1, 38), (38, 39), (39, 40), (40, 44), (44, 45)]:
        part = x.tokens(start, stop).replace(c=states[0], n=states[1], m=states[2])
        h, states = module(*part)
        assert h.shape[2] == stop - start
        rows.append(h)
    wanted, last = recurrence(x)
    assert_close([torch.cat(rows, 2), *states], [wanted, *last], 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("s", [1, 5])
def test_inference_state_dtype(dtype, s, device):
    x = random_inputs(device, torch.bfloat16, s=s, states=True)
    _, (c, n, m) = backend(mode="inference", inference_state_dtype=dtype)(*x)
    assert c.dtype == getattr(torch, dtype) and n.dtype == m.dtype == torch.float32


def test_mode_can_be_overridden(device):
    x = random_inputs(device, s=5)
    module = backend(mode="train", return_last_states=False)
    assert isinstance(module(*x), torch.Tensor)
    _, states = module(*x, mode="inference")
    assert len(states) == 3


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("s", [1, 20])
def test_siging(s, normalize, device):
    x = random_inputs(device, s=s, states=True).replace(m=None)
    wanted, last = recurrence(x, siging=True, normalize=normalize)
    for mode in ("train", "inference"):
        module = backend(chunkwise_kernel=SIGING, normalize_siging=normalize, mode=mode)
        assert_close(flat(module(*x)), [wanted, *last[:2]], 1e-5)


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_gradients(mode, device):
    """In inference too, and for single tokens."""
    for s in (1, 30):
        x = random_inputs(device, torch.float64, s=s, states=True)
        ours, exact = x.leaves(), x.leaves()
        got, wanted = flat(backend(mode=mode)(*ours)), flat(recurrence(exact))
        gradients = [torch.randn_like(t) for t in wanted]
        torch.autograd.backward(got, gradients)
        torch.autograd.backward(wanted, gradients)
        assert_close(ours.gradients(), exact.gradients(), 1e-10)


def test_packed(device):
    x = random_inputs(device, b=1, s=30)
    cu_seqlens = torch.tensor([0, 12, 30], dtype=torch.int32, device=device)
    h, _ = backend(mode="inference")(*x, cu_seqlens=cu_seqlens)
    parts = [recurrence(Inputs(*list(x.tokens(*cut))[:5]))[0] for cut in [(0, 12), (12, 30)]]
    assert_close([h], [torch.cat(parts, 2)], 1e-5)


def test_autocast(device):
    x = random_inputs(device, states=True)
    module = backend(autocast_kernel_dtype="float16")
    with torch.autocast(device, dtype=torch.bfloat16):
        h, _ = module(*x)
    assert h.dtype == torch.float16


def test_compile(device):
    torch.compiler.reset()
    module = backend(mode="inference")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for s in (1, 20):
        x = random_inputs(device, s=s, states=True)
        assert_close(flat(compiled(*x)), flat(module(*x)), 0.0)


def test_configuration():
    peers = mLSTMBackendConfig(
        chunkwise_kernel="chunkwise--triton_xl_chunk",
        sequence_kernel="native_sequence__triton",
        step_kernel="triton",
    )
    assert "triton_xl_chunk" in str(mLSTMBackend(peers))
    with pytest.raises(ValueError, match="mode 'eval' is unknown"):
        mLSTMBackendConfig(mode="eval")
    with pytest.raises(ValueError, match="mode"):
        backend()(*random_inputs("cpu", s=3), mode="eval")
    for field in ("chunkwise_kernel", "sequence_kernel", "step_kernel"):
        with pytest.raises(ValueError, match="'none' is unknown"):
            backend(**{field: "none"})
