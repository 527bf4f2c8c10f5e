# SPDX-License-Identifier: MIT OR Apache-2.0
"""States: carried from segment to segment, their gradients, their dtypes."""

import pytest
import torch

from mlstm.torch import get_mlstm_kernel
from mlstm.torch.recurrent import mlstm_recurrent_step
from reference import (
    Inputs,
    assert_close,
    compare,
    error,
    flat,
    random_inputs,
    recurrence,
)

NAMES = ["chunkwise--xl_chunk", "parallel--limit_headdim", "chunkwise--xl_chunk_siging"]


@pytest.mark.parametrize("cut", [1, 37, 64, 99])
@pytest.mark.parametrize("name", NAMES)
def test_two_segments_are_one_long_run(name, cut, device):
    """Outputs, last states and all gradients, those to the first state included."""
    kernel = get_mlstm_kernel(name)
    inputs = random_inputs(device, torch.float64, s=100, states=True)
    if "siging" in name:
        inputs.m = None
    whole, parts = inputs.leaves(), inputs.leaves()
    h, states = kernel(*whole, return_last_states=True)

    h1, carried = kernel(*parts.tokens(0, cut), return_last_states=True)
    rest = parts.tokens(cut, 100)
    rest.c, rest.n, rest.m = carried if len(carried) == 3 else (*carried, None)
    h2, last = kernel(*rest, return_last_states=True)

    assert_close([h, *states], [torch.cat([h1, h2], 2), *last], 1e-11)
    gradients = [torch.randn(t.shape, dtype=t.dtype).to(device) for t in (h, *states)]
    torch.autograd.backward([h, *states], gradients)
    torch.autograd.backward([torch.cat([h1, h2], 2), *last], gradients)
    assert_close(whole.gradients(), parts.gradients(), 1e-10)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("name", NAMES[:2])
def test_gradients_of_last_states_alone(name, which, device):
    """Only some of c, n, m are used, and h is not."""
    inputs = random_inputs(device, torch.float64, states=True)
    ours, exact = inputs.leaves(), inputs.leaves()
    _, got = get_mlstm_kernel(name)(*ours, return_last_states=True)
    _, wanted = recurrence(exact)
    gradients = [torch.randn_like(got[index]) for index in which]
    torch.autograd.backward([got[index] for index in which], gradients)
    torch.autograd.backward([wanted[index] for index in which], gradients)
    # The oracle leaves out what has no influence; the kernel says zero.
    oracle = [torch.zeros_like(t) if t.grad is None else t.grad for t in exact]
    assert_close(ours.gradients(), oracle, 1e-10)


@pytest.mark.parametrize("name", NAMES[:2])
def test_returning_states_changes_nothing(name, device):
    inputs = random_inputs(device, states=True)
    results = []
    for states in (False, True):
        leaves = inputs.leaves()
        h = flat(get_mlstm_kernel(name)(*leaves, return_last_states=states))[0]
        h.backward(torch.ones_like(h))
        results.append([h, *leaves.gradients()])
    assert_close(results[0], results[1], 0.0)


def test_h_is_a_tensor_without_states(device):
    """B = 2 must not be unpacked as (h, states)."""
    inputs = random_inputs(device, b=2)
    for name in NAMES:
        h = get_mlstm_kernel(name)(*list(inputs)[:5], return_last_states=False)
        assert isinstance(h, torch.Tensor) and h.shape == inputs.v.shape


def test_states_without_gradient(device):
    """An initial state that does not require a gradient gets none."""
    leaves = random_inputs(device, states=True).leaves()
    leaves.c, leaves.n, leaves.m = leaves.c.detach(), leaves.n.detach(), leaves.m.detach()
    get_mlstm_kernel(NAMES[0])(*leaves).sum().backward()
    assert leaves.q.grad is not None and leaves.c.grad is None


@pytest.mark.parametrize("shape", ["b_nh", "b_nh_1"])
def test_m_with_and_without_its_last_dimension(shape, device):
    inputs = random_inputs(device, states=True)
    m = inputs.m if shape == "b_nh_1" else inputs.m.squeeze(-1)
    _, (_, _, last) = get_mlstm_kernel(NAMES[0])(*inputs.replace(m=m), return_last_states=True)
    assert last.shape == inputs.m.shape


@pytest.mark.parametrize("dtype_state", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES[:2])
def test_state_dtypes(name, dtype_state, device):
    inputs = random_inputs(device, states=True)
    inputs = inputs.replace(c=inputs.c.to(dtype_state))
    kernel = get_mlstm_kernel(name)
    compare(kernel, inputs, oracle={}, precision=dtype_state, dtype_state=dtype_state)
    _, (c, n, m) = get_mlstm_kernel(name)(*inputs, return_last_states=True)
    assert c.dtype == dtype_state, "c keeps its dtype by default"
    assert n.dtype == m.dtype == torch.float32


def test_other_dtypes_of_n_and_m_are_converted(device):
    inputs = random_inputs(device, states=True)
    rounded = inputs.replace(n=inputs.n.bfloat16(), m=inputs.m.bfloat16())
    ours, exact = rounded.leaves(), rounded.leaves()
    got = flat(get_mlstm_kernel(NAMES[0])(*ours, return_last_states=True))
    wanted = flat(recurrence(exact))
    assert_close(got, wanted, 1e-5)
    torch.autograd.backward(got, [torch.ones_like(t) for t in got])
    torch.autograd.backward(wanted, [torch.ones_like(t) for t in wanted])
    assert_close(ours.gradients()[:6], exact.gradients()[:6], 1e-5)
    assert_close(ours.gradients()[6:], exact.gradients()[6:], 2e-2)


def test_unsupported_state_dtype(device):
    inputs = random_inputs(device, states=True)
    with pytest.raises(RuntimeError, match="state_dtype: expected float32, bfloat16 or float16"):
        get_mlstm_kernel(NAMES[0])(*inputs.replace(c=inputs.c.double()))


@pytest.mark.parametrize("steps", [2000])
def test_bfloat16_state_over_many_steps(steps, device):
    """Rounding the state after every token must not add up."""
    x = random_inputs(device, b=1, nh=2, s=steps, dhqk=16, dhhv=16, f_bias=3.0)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        c = torch.zeros(1, 2, 16, 16, dtype=dtype, device=device)
        n, m = torch.zeros(1, 2, 16, device=device), torch.zeros(1, 2, 1, device=device)
        rows = []
        for t in range(steps):
            h, (c, n, m) = mlstm_recurrent_step(
                x.q[:, :, t],
                x.k[:, :, t],
                x.v[:, :, t],
                x.i[:, :, t : t + 1],
                x.f[:, :, t : t + 1],
                c,
                n,
                m,
                dtype_state=dtype,
            )
            rows.append(h)
        assert c.dtype == dtype and n.dtype == m.dtype == torch.float32
        results[dtype] = torch.stack(rows, 2)
    full, rounded = results[torch.float32], results[torch.bfloat16]
    assert error(full[:, :, :200], recurrence(x.tokens(0, 200))[0]) < 1e-5
    for start in range(0, steps, steps // 4):
        part = slice(start, start + steps // 4)
        assert 1e-5 < error(rounded[:, :, part], full[:, :, part]) < 2e-2


def test_chunked_prefill_at_an_unaligned_point(device):
    """1866 + 1100 tokens in two calls, as a serving engine splits a prompt."""
    x = random_inputs(device, b=1, nh=1, s=2966, dhqk=16, dhhv=16)
    kernel = get_mlstm_kernel(NAMES[0])
    whole = flat(kernel(*x, return_last_states=True))
    h1, states = kernel(*x.tokens(0, 1866), return_last_states=True)
    h2, last = kernel(*Inputs(*list(x.tokens(1866, 2966))[:5], *states), return_last_states=True)
    assert_close([torch.cat([h1, h2], 2), *last], whole, 1e-5)
