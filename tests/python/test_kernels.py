# SPDX-License-Identifier: MIT OR Apache-2.0
"""Sequence kernels against the float64 recurrence, forward and backward."""

import math

import pytest
import torch

from mlstm.torch import (
    get_available_mlstm_kernels,
    get_available_mlstm_sequence_kernels,
    get_mlstm_kernel,
    get_mlstm_sequence_kernel,
)
from reference import (
    TOLERANCE,
    Inputs,
    assert_close,
    compare,
    error,
    flat,
    random_inputs,
    recurrence,
)

NAMES = get_available_mlstm_kernels() + get_available_mlstm_sequence_kernels()
FORMS = ["chunkwise--xl_chunk", "parallel--limit_headdim"]


def kernel_of(name):
    return get_mlstm_kernel(name) if "--" in name else get_mlstm_sequence_kernel(name)


def siging(name):
    return {"siging": True} if "siging" in name else {}


@pytest.mark.parametrize("states", [False, True], ids=["from_zero", "from_state"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_matches_recurrence(name, dtype, states, device):
    inputs = random_inputs(device, dtype, states=states)
    if siging(name):
        inputs.m = None
    kernel = kernel_of(name)
    compare(kernel, inputs, oracle=siging(name))


@pytest.mark.parametrize("s", [1, 7, 8, 15, 17, 63, 65, 127, 129, 1025, 1026])
@pytest.mark.parametrize("name", FORMS)
def test_any_length(name, s, device):
    inputs = random_inputs(device, b=1, nh=1, s=s, dhqk=8, dhhv=8, states=True)
    compare(kernel_of(name), inputs)


@pytest.mark.parametrize("dhqk, dhhv", [(24, 24), (80, 100), (100, 80), (1, 3), (256, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_any_head_dims(name, dhqk, dhhv, dtype, device):
    b = max(4, 100 // dhhv)  # enough elements for their errors to average, the gates' too
    inputs = random_inputs(device, dtype, b=b, nh=1, s=70, dhqk=dhqk, dhhv=dhhv, states=True)
    compare(kernel_of(name), inputs)


@pytest.mark.parametrize("dhqk, dhhv", [(1024, 64), (64, 1024)])
def test_large_head_dims(dhqk, dhhv, device):
    inputs = random_inputs(device, b=1, nh=1, s=33, dhqk=dhqk, dhhv=dhhv)
    compare(kernel_of(FORMS[0]), inputs)


@pytest.mark.parametrize("chunk_size", [None, 1, 16, 37, 64, 100, 4096])
def test_chunk_size_does_not_matter(chunk_size, device):
    inputs = random_inputs(device, s=130, states=True)
    kernel = kernel_of(FORMS[0])
    got = flat(kernel(*inputs, return_last_states=True, chunk_size=chunk_size))
    assert_close(got, flat(recurrence(inputs)), 1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_siging_normalize(normalize, dtype, device):
    inputs = random_inputs(device, dtype, states=True).replace(m=None)
    compare(
        kernel_of("chunkwise--xl_chunk_siging"),
        inputs,
        oracle={"siging": True, "normalize": normalize},
        normalize=normalize,
    )


@pytest.mark.parametrize("options", [{"eps": 0.0}, {"eps": 0.1}, {"qk_scale": 0.7}], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_options(name, options, device):
    inputs = random_inputs(device, torch.float64, states=True)
    got = flat(kernel_of(name)(*inputs, return_last_states=True, **options))
    assert_close(got, flat(recurrence(inputs, **options)), 1e-12)


@pytest.mark.parametrize("name", FORMS)
def test_denominator_straddles_its_floor(name, device):
    """Tokens on either side of the kink, with gradients through both sides."""
    inputs = random_inputs(device, torch.float64, s=200, i_bias=-1.0)
    share = share_above_floor(inputs)
    assert 0.05 < share < 0.95, f"{share:.2f} of the tokens above the floor: a one-sided test"
    compare(kernel_of(name), inputs)


def share_above_floor(inputs):
    """Share of tokens with |N| > exp(-m): with v = 1, h = N / max(|N|, exp(-m)) is +-1 there."""
    ones = torch.ones_like(inputs.v[..., :1])
    h, _ = recurrence(inputs.replace(v=ones, c=None, n=None, m=None), eps=0.0)
    return (h.abs() > 1 - 1e-12).double().mean().item()


@pytest.mark.parametrize("name", FORMS)
def test_detached_denominator(name, device):
    """The peers' gradient, by name: that of the numerator over a constant."""
    inputs = random_inputs(device, torch.float64)
    compare(kernel_of(name), inputs, states=False, detach_denominator=True)
    ours, exact = inputs.leaves(), inputs.leaves()
    kernel = kernel_of(name)
    for leaves, detach in ((ours, True), (exact, False)):
        torch.manual_seed(0)
        h = kernel(*leaves, detach_denominator=detach)
        h.backward(torch.randn(h.shape, dtype=h.dtype).to(h))
    assert error(ours.q.grad, exact.q.grad) > 1e-3, "the two gradients must differ"


# ---- layouts ------------------------------------------------------------------------------------


def token_major(t):
    """The same numbers in memory (B, S, NH, D)."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def feature_strided(t):
    """The same numbers with a feature stride of 2."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype).to(t.device)
    wide[..., ::2] = t
    return wide[..., ::2]


def packed(t):
    """A slice in the middle of a larger tensor."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 5), float("nan"), dtype=t.dtype).to(t.device)
    wide[..., 2:-3] = t
    return wide[..., 2:-3]


@pytest.mark.parametrize("layout", [token_major, feature_strided, packed])
@pytest.mark.parametrize("name", FORMS)
def test_strided_inputs_and_gradients(name, layout, device):
    inputs = random_inputs(device, states=True)
    kernel = kernel_of(name)
    plain = inputs.leaves()
    strided = inputs.map(
        lambda t: layout(t.detach()) if t.shape[-1] > 1 else t
    ).leaves_as_they_are()
    gradient = torch.randn(*inputs.v.shape).to(inputs.v)
    results = []
    for leaves, dh in ((plain, gradient), (strided, layout(gradient))):
        h, states = kernel(*leaves, return_last_states=True)
        h.backward(dh)
        results.append([h, *states, *leaves.gradients()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_output_follows_the_layout_of_v(device):
    inputs = random_inputs(device)
    kernel = kernel_of(FORMS[0])
    assert kernel(*inputs).is_contiguous()
    h = kernel(*inputs.map(token_major))
    assert h.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("name", FORMS)
def test_expanded_inputs_and_gradients(name, device):
    inputs = random_inputs(device, torch.float64, b=3)
    expanded = Inputs(*(t[:1].expand(3, *t.shape[1:]) for t in list(inputs)[:5]))
    expanded.i = inputs.i[:1, :1, :1].expand(inputs.i.shape)
    results = []
    for x in (expanded, expanded.map(torch.clone)):
        leaves = x.map(lambda t: t.detach().requires_grad_())
        kernel_of(name)(*leaves).sum().backward()  # the gradient of h is an expanded scalar
        results.append(leaves.gradients()[:5])
    assert_close(results[0], results[1], 0.0)


# ---- gates --------------------------------------------------------------------------------------


def extreme_gates(inputs, case):
    """Inputs with extreme gates, and finite stand-ins for which the oracle has gradients.

    q and k are positive: where only few tokens count, N could otherwise cancel far above its
    floor exp(-m), and h would be ill-conditioned."""
    inputs = inputs.replace(q=inputs.q.abs(), k=inputs.k.abs())
    i, f = inputs.i.clone(), inputs.f.clone()
    if case == "forget_all":
        f[:] = -1000.0
    elif case == "forget_nothing":
        f[:] = 1000.0
    elif case == "wild":
        f = 1000 * torch.randn(f.shape).to(f)
        i = 10 * torch.randn(i.shape).to(i)
    elif case == "reset":
        f[:, :, 10] = f[:, :, 40] = -math.inf
    elif case == "ignore":
        i[:, :, ::3] = -math.inf
    elif case == "ignore_all":
        i[:] = -math.inf
    elif case == "nothing_at_all":
        i[:], f[:] = -math.inf, -math.inf
    elif case == "loud":
        i[:, :, ::5] = 80.0
    return inputs.replace(i=i, f=f), inputs.replace(i=i.clamp_min(-600), f=f.clamp_min(-600))


@pytest.mark.parametrize("states", [False, True], ids=["from_zero", "from_state"])
@pytest.mark.parametrize(
    "case",
    "forget_all forget_nothing wild reset ignore ignore_all nothing_at_all loud".split(),
)
@pytest.mark.parametrize("name", FORMS)
def test_extreme_gates(name, case, states, device):
    inputs, finite = extreme_gates(random_inputs(device, s=80, states=states), case)
    ours, exact = inputs.leaves(), finite.map(lambda t: t.double()).leaves()
    h = kernel_of(name)(*ours)
    wanted, _ = recurrence(exact)
    if wanted.norm() > 0:
        assert error(h, wanted) < 1e-5
    else:
        assert (h == 0).all()
    dh = torch.randn(h.shape).to(h)
    h.backward(dh)
    wanted.backward(dh.double())
    for got, oracle in zip(ours.gradients()[:5], exact.gradients()[:5], strict=True):
        assert got.isfinite().all()
        scale = max(1.0, oracle.norm().item())
        assert (got.double() - oracle).norm().item() <= 1e-4 * scale


def test_gates_keep_their_precision(device):
    """bfloat16 data with float32 gates: the gates are not rounded."""
    inputs = random_inputs(device, torch.bfloat16, i_bias=-20.0)
    rounded = inputs.replace(i=inputs.i.bfloat16().float())
    wanted, _ = recurrence(inputs)
    got = kernel_of(FORMS[0])(*inputs)
    assert error(got, wanted) < TOLERANCE[torch.bfloat16]
    assert error(recurrence(rounded)[0], wanted) > 2 * TOLERANCE[torch.bfloat16], (
        "the rounding must be visible"
    )


@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gate_dtypes(gate_dtype, device):
    inputs = random_inputs(device, torch.bfloat16)
    inputs = inputs.replace(i=inputs.i.to(gate_dtype), f=inputs.f.to(gate_dtype))
    leaves = inputs.leaves()
    h = kernel_of(FORMS[0])(*leaves)
    assert error(h, recurrence(inputs)[0]) < TOLERANCE[torch.bfloat16]
    h.sum().backward()
    assert leaves.i.grad.dtype == leaves.f.grad.dtype == gate_dtype


# ---- sizes and repeatability --------------------------------------------------------------------


@pytest.mark.parametrize("b, s", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("name", FORMS)
def test_empty(name, b, s, device):
    inputs = random_inputs(device, b=b, s=s, states=True)
    leaves = inputs.leaves()
    h, states = kernel_of(name)(*leaves, return_last_states=True)
    assert h.shape == inputs.v.shape
    assert_close(states, (inputs.c, inputs.n, inputs.m), 1e-6)
    torch.autograd.backward([h, *states], [torch.ones_like(t) for t in (h, *states)])
    assert all(g.shape == t.shape for g, t in zip(leaves.gradients(), leaves, strict=True))


@pytest.mark.parametrize("name", FORMS)
def test_same_bits_twice(name, device):
    inputs = random_inputs(device, s=300, states=True)
    runs = []
    for _ in range(2):
        leaves = inputs.leaves()
        h, states = kernel_of(name)(*leaves, return_last_states=True)
        torch.autograd.backward([h, *states], [torch.ones_like(t) for t in (h, *states)])
        runs.append([h, *states, *leaves.gradients()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_forms_agree(device):
    inputs = random_inputs(device, torch.float64, s=150, states=True)
    results = [flat(kernel_of(name)(*inputs, return_last_states=True)) for name in FORMS]
    assert_close(results[0], results[1], 1e-12)
