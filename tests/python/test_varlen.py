# SPDX-License-Identifier: MIT OR Apache-2.0
"""Packed sequences (cu_seqlens) equal the same sequences one by one."""

import pytest
import torch

from mlstm.torch import get_mlstm_kernel
from reference import Inputs, assert_close, assert_gradients_close, flat, random_inputs, recurrence

NAMES = ["chunkwise--xl_chunk", "parallel--limit_headdim", "chunkwise--xl_chunk_siging"]
OFFSETS = {
    "straddling": [0, 15, 100, 300, 1200, 2000],
    "empty_and_single": [0, 0, 1, 1, 2, 65, 65, 130, 130],
    "one": [0, 77],
    "nothing": [0, 0, 0],
}


def packed_inputs(device, offsets, dtype, dims, states):
    """Inputs with B = 1 and, with `states`, one state per sequence."""
    x = random_inputs(device, dtype, b=1, s=offsets[-1], dhqk=dims, dhhv=dims)
    if states:
        rows = random_inputs(
            device, dtype, b=len(offsets) - 1, s=1, dhqk=dims, dhhv=dims, states=True
        )
        x = x.replace(c=rows.c, n=rows.n, m=rows.m)
    return x


def sequences(x, offsets):
    """Each packed sequence as inputs of its own."""
    for row, (start, stop) in enumerate(zip(offsets, offsets[1:], strict=False)):
        part = list(x.tokens(start, stop))[:5]
        yield Inputs(*part, *(None if t is None else t[row : row + 1] for t in (x.c, x.n, x.m)))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("states", [False, True], ids=["from_zero", "from_state"])
@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_one_by_one(name, offsets, states, index_dtype, device):
    offsets = OFFSETS[offsets]
    dims = 100 if offsets[-1] < 1000 else 20
    x = packed_inputs(device, offsets, torch.float32, dims, states)
    if "siging" in name:
        x.m = None
    kernel = get_mlstm_kernel(name)
    together, alone = x.leaves(), x.leaves()
    cu_seqlens = torch.tensor(offsets, dtype=index_dtype, device=device)
    got = flat(kernel(*together, return_last_states=True, cu_seqlens=cu_seqlens))
    parts = [flat(kernel(*part, return_last_states=True)) for part in sequences(alone, offsets)]
    h, *last = map(list, zip(*parts, strict=True))
    wanted = [torch.cat(h, 2), *(torch.cat(t) for t in last)]
    assert_close(got, wanted, 2e-6, "outputs")
    gradients = [torch.randn(t.shape).to(t) for t in got]
    torch.autograd.backward(got, gradients)
    torch.autograd.backward(wanted, gradients)
    assert_gradients_close(together, alone, 1e-5)


@pytest.mark.parametrize("name", NAMES[:2])
def test_packed_against_the_recurrence(name, device):
    """D = 100 and sequences that straddle chunks."""
    offsets = OFFSETS["straddling"]
    x = packed_inputs(device, offsets, torch.float32, 100, True)
    x = x.replace(q=x.q[:, :1], k=x.k[:, :1], v=x.v[:, :1], i=x.i[:, :1], f=x.f[:, :1])
    x = x.replace(c=x.c[:, :1], n=x.n[:, :1], m=x.m[:, :1])
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
    h, last = get_mlstm_kernel(name)(*x, return_last_states=True, cu_seqlens=cu_seqlens)
    for row, part in enumerate(sequences(x, offsets)):
        wanted, states = recurrence(part)
        assert_close([h[:, :, offsets[row] : offsets[row + 1]]], [wanted], 1e-5)
        assert_close([t[row : row + 1] for t in last], states, 1e-5)


def test_batch_must_be_one(device):
    x = random_inputs(device, b=2, s=10)
    cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match="problem.b: expected 1 with packed sequences"):
        get_mlstm_kernel(NAMES[0])(*x, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(
    "offsets", [[0, 12], [0, 4, 9], [1, 10], [0, 6, 4, 10], [0, -3, 10]], ids=str
)
def test_bad_offsets(offsets):
    """Only the CPU looks at what the offsets say."""
    x = random_inputs("cpu", b=1, s=10)
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        get_mlstm_kernel(NAMES[0])(*x, cu_seqlens=torch.tensor(offsets))


@pytest.mark.parametrize(
    "offsets",
    [torch.tensor([0.0, 10.0]), torch.tensor([[0, 10]]), torch.tensor([0]), torch.tensor(10)],
    ids=["float", "rank_2", "no_sequence", "rank_0"],
)
def test_bad_offset_tensors(offsets, device):
    x = random_inputs(device, b=1, s=10)
    with pytest.raises(RuntimeError, match="cu_seqlens|num_seqs"):
        get_mlstm_kernel(NAMES[0])(*x, cu_seqlens=offsets.to(device))
