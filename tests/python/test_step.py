# SPDX-License-Identifier: MIT OR Apache-2.0
"""Steps: one token, several tokens, and state pools with slots, updated in place."""

import pytest
import torch

from mlstm.torch import get_mlstm_kernel, get_mlstm_step_kernel
from mlstm.torch.recurrent import mlstm_recurrent_step, mlstm_recurrent_step_slots
from reference import (
    TOLERANCE,
    Inputs,
    assert_close,
    error,
    flat,
    random_inputs,
    random_like,
    recurrence,
)

SLOTS = 7


def one_token(x):
    """Arguments of a step kernel from inputs of S = 1."""
    return (x.q[:, :, 0], x.k[:, :, 0], x.v[:, :, 0], x.i, x.f, x.c, x.n, x.m)


@pytest.mark.parametrize("dhqk, dhhv", [(16, 24), (24, 80), (100, 100), (1, 1), (256, 512)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_step_matches_recurrence(dtype, dhqk, dhhv, device):
    b = max(2, 200 // dhhv)  # enough elements for their errors to average
    x = random_inputs(device, dtype, b=b, s=1, dhqk=dhqk, dhhv=dhhv, states=True)
    before = x.map(torch.clone)
    h, states = mlstm_recurrent_step(*one_token(x))
    wanted, last = recurrence(x)
    assert h.dtype == dtype
    assert_close([h, *states], [wanted[:, :, 0], *last], TOLERANCE[dtype])
    assert all(torch.equal(a, b) for a, b in zip(x, before, strict=True)), "inputs changed"


def test_steps_equal_the_sequence(device):
    x = random_inputs(device, s=70, states=True)
    h, states = get_mlstm_kernel("chunkwise--xl_chunk")(*x, return_last_states=True)
    rows, (c, n, m) = [], (x.c, x.n, x.m)
    for t in range(70):
        part = x.tokens(t, t + 1).replace(c=c, n=n, m=m)
        row, (c, n, m) = mlstm_recurrent_step(*one_token(part))
        rows.append(row)
    assert_close([torch.stack(rows, 2), c, n, m], [h, *states], 1e-5)


def test_step_alias_and_tuning(device):
    x = random_inputs(device, s=1, states=True)
    kernel = get_mlstm_step_kernel("triton")
    kernel(*one_token(x), eps=1e-6, num_warps=4, siz_b_DHQK=64)
    with pytest.raises(TypeError, match="nonsense"):
        kernel(*one_token(x), nonsense=1)


@pytest.mark.parametrize("dtype_state", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_step_dtype_state(dtype_state, device):
    x = random_inputs(device, s=1, states=True)
    _, (c, n, m) = mlstm_recurrent_step(*one_token(x), dtype_state=dtype_state)
    assert c.dtype == dtype_state and n.dtype == m.dtype == torch.float32
    wanted = recurrence(x.replace(c=x.c.to(dtype_state)))[1][0]
    assert error(c, wanted) < (1e-5 if dtype_state == torch.float32 else 5e-3)


@pytest.mark.parametrize("siging", [False, True])
def test_step_is_differentiable(siging, device):
    """By way of a sequence of one token."""
    x = random_inputs(device, torch.float64, s=1, states=True)
    ours, exact = x.leaves(), x.leaves()
    if siging:
        ours.m, exact.m = None, None
        got = flat(get_mlstm_kernel("chunkwise--xl_chunk_siging")(*ours, return_last_states=True))
        wanted = flat(recurrence(exact, siging=True))
    else:
        h, states = mlstm_recurrent_step(*one_token(ours))
        got = [h.unsqueeze(2), *states]
        wanted = flat(recurrence(exact))
    gradients = random_like(wanted)
    torch.autograd.backward(got, gradients)
    torch.autograd.backward(wanted, gradients)
    assert_close(ours.gradients(), exact.gradients(), 1e-10)


# ---- slots --------------------------------------------------------------------------------------


def pools(device, x, dtype=torch.float32, slots=SLOTS):
    """Dirty pools: NaN wherever nothing was put."""
    b, nh, _, dhqk = x.q.shape
    return (
        torch.full((slots, nh, dhqk, x.v.shape[3]), float("nan"), dtype=dtype, device=device),
        torch.full((slots, nh, dhqk), float("nan"), device=device),
        torch.full((slots, nh, 1), float("nan"), device=device),
    )


def put(pool, slots, x):
    for t, state in zip(pool, (x.c, x.n, x.m), strict=True):
        t[slots] = state.to(t.dtype)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("s", [1, 2, 5, 16])
def test_slots_in_place(s, index_dtype, device):
    x = random_inputs(device, b=3, s=s, states=True)
    pool = pools(device, x)
    slots = torch.tensor([5, 0, 3], dtype=index_dtype, device=device)
    put(pool, slots.long(), x)
    h = mlstm_recurrent_step_slots(*list(x)[:5], *pool, slots)
    wanted, last = recurrence(x)
    assert_close([h, *(t[slots.long()] for t in pool)], [wanted, *last], 1e-5)
    untouched = [1, 2, 4, 6]
    assert all(t[untouched].isnan().all() for t in pool)


def test_without_slots_row_b_uses_slot_b(device):
    x = random_inputs(device, b=3, s=1, states=True)
    pool = tuple(t.clone() for t in (x.c, x.n, x.m))
    h = mlstm_recurrent_step_slots(*list(x)[:5], *pool)
    wanted, last = recurrence(x)
    assert_close([h, *pool], [wanted, *last], 1e-5)


@pytest.mark.parametrize("padding", [[4, -1, -1], [-1, 6, -1], [-1, -1, -1]], ids=str)
def test_padding_rows_touch_nothing(padding, device):
    """-1 beside the last slot too; several padding rows at once."""
    x = random_inputs(device, b=3, s=2, states=True)
    slots = torch.tensor(padding, device=device)
    real = [row for row, slot in enumerate(padding) if slot >= 0]
    pool = pools(device, x)
    for row in real:
        put(pool, padding[row], Inputs(*(t[row] for t in x)))
    before = [t.clone() for t in pool]
    h = mlstm_recurrent_step_slots(*list(x)[:5], *pool, slots)
    wanted, last = recurrence(x)
    for row, slot in enumerate(padding):
        if slot < 0:
            assert (h[row] == 0).all()
        else:
            assert error(h[row], wanted[row]) < 1e-5
            assert_close([t[slot] for t in pool], [t[row] for t in last], 1e-5)
    others = [slot for slot in range(SLOTS) if slot not in padding]
    for now, then in zip(pool, before, strict=True):
        assert torch.equal(now[others].nan_to_num(7.0), then[others].nan_to_num(7.0))


def test_source_and_destination_slots(device):
    x = random_inputs(device, b=3, s=1, states=True)
    src = torch.tensor([0, 1, 2], device=device)
    dst = torch.tensor([6, -1, 4], device=device)  # row 1 forgets its state
    pool = pools(device, x)
    put(pool, src, x)
    h = mlstm_recurrent_step_slots(*list(x)[:5], *pool, src, dst)
    wanted, last = recurrence(x)
    assert_close([h], [wanted], 1e-5)
    for t, start, end in zip(pool, (x.c, x.n, x.m), last, strict=True):
        assert torch.equal(t[src], start)
        assert_close([t[6], t[4]], [end[0], end[2]], 1e-5)
        assert t[[3, 5]].isnan().all()


@pytest.mark.parametrize("flag_dtype", [torch.bool, torch.uint8, torch.int32], ids=str)
def test_new_requests_start_from_zero(flag_dtype, device):
    """has_state false: the dirty slot is not read."""
    x = random_inputs(device, b=3, s=2, states=True)
    slots = torch.tensor([2, 4, 6], device=device)
    has_state = torch.tensor([1, 0, 1], device=device).to(flag_dtype)
    pool = pools(device, x)
    put(pool, slots[[0, 2]], Inputs(*(t[[0, 2]] for t in x)))
    h = mlstm_recurrent_step_slots(*list(x)[:5], *pool, slots, has_state=has_state)
    for t in (x.c, x.n, x.m):
        t[1] = 0.0
    wanted, last = recurrence(x)
    assert_close([h, *(t[slots] for t in pool)], [wanted, *last], 1e-5)


@pytest.mark.parametrize("accepted", [[0, 1, 4], [2, 3, 0]], ids=str)
def test_accepted_tokens(accepted, device):
    """Speculative decoding: only the first num_tokens of a row change its state."""
    x = random_inputs(device, b=3, s=4, states=True)
    slots = torch.tensor([3, 1, 5], device=device)
    pool = pools(device, x)
    put(pool, slots, x)
    h = mlstm_recurrent_step_slots(
        *list(x)[:5], *pool, slots, num_tokens=torch.tensor(accepted, device=device)
    )
    for row, count in enumerate(accepted):
        alone = Inputs(*(t[row : row + 1] for t in x)).tokens(0, count)
        wanted, last = recurrence(alone)
        assert_close([h[row : row + 1, :, :count]], [wanted], 1e-5)
        assert (h[row, :, count:] == 0).all()
        got = [t[slots[row]][None] for t in pool]
        assert_close(got, last, 1e-5)


def test_strided_pools(device):
    """Pools that are slices of a larger allocation, and m without its last dimension."""
    x = random_inputs(device, b=2, s=1, states=True)
    wide = pools(device, x, slots=2 * SLOTS)
    pool = tuple(t[::2] for t in wide)
    slots = torch.tensor([1, 6], device=device)
    put(pool, slots, x)
    h = mlstm_recurrent_step_slots(*list(x)[:5], pool[0], pool[1], pool[2].squeeze(-1), slots)
    wanted, last = recurrence(x)
    assert_close([h, *(t[slots] for t in pool)], [wanted, *last], 1e-5)
    assert all(t[1::2].isnan().all() for t in wide)


@pytest.mark.parametrize("dtype_state", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_pools(dtype_state, device):
    x = random_inputs(device, torch.bfloat16, b=2, s=1, states=True)
    pool = pools(device, x, dtype=dtype_state)
    slots = torch.tensor([1, 6], device=device)
    put(pool, slots, x)
    h = mlstm_recurrent_step_slots(*list(x)[:5], *pool, slots)
    wanted, last = recurrence(x)
    assert_close([h, *(t[slots] for t in pool)], [wanted, *last], 8e-3)


@pytest.mark.parametrize("slots", [[0, SLOTS], [0, -2], [3, 3]], ids=str)
def test_bad_slots(slots):
    """Only the CPU looks at what the slots say. Nothing may have been written."""
    x = random_inputs("cpu", b=2, s=1, states=True)
    pool = pools("cpu", x)
    with pytest.raises(RuntimeError, match="slots"):
        mlstm_recurrent_step_slots(*list(x)[:5], *pool, torch.tensor(slots))
    assert all(t.isnan().all() for t in pool)


def test_step_rejects_what_it_cannot_update(device):
    x = random_inputs(device, b=2, s=1, states=True)
    slots = torch.tensor([0, 1], device=device)
    with pytest.raises(RuntimeError, match=r"n\.dtype: expected float32"):
        mlstm_recurrent_step_slots(*list(x)[:5], x.c, x.n.bfloat16(), x.m, slots)
    with pytest.raises(RuntimeError, match="1 to 16 tokens"):
        y = random_inputs(device, b=2, s=17)
        mlstm_recurrent_step_slots(*list(y)[:5], x.c, x.n, x.m, slots)


def test_autograd_notices_changed_pools(device):
    """A pool that a backward still needs must not change unnoticed."""
    x = random_inputs(device, b=2, s=1, states=True)
    q = x.q.clone().requires_grad_()
    h = get_mlstm_kernel("chunkwise--xl_chunk")(q, *list(x)[1:])
    mlstm_recurrent_step_slots(*list(x)[:5], x.c, x.n, x.m)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()
