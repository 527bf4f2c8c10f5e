# SPDX-License-Identifier: MIT OR Apache-2.0
"""Forward and backward of the CUDA kernels against float64."""

import itertools

import mlstm_c
import pytest
import torch
from cases import Case, check, compare, error

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [F32, F64, BF16, F16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("s", [1, 7, 17, 63, 64, 65, 127, 128, 129, 300])
def test_lengths(dtype, s):
    check(Case(dtype=dtype, s=s, dhqk=32, dhhv=48, seed=s))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "dims", [(1, 1), (3, 5), (24, 80), (64, 64), (100, 36), (128, 256), (256, 128), (72, 200)]
)
def test_dims(dtype, dims):
    check(Case(dtype=dtype, s=200, dhqk=dims[0], dhhv=dims[1], b=1, seed=dims[0]))


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("dims", [(256, 512), (512, 256), (1024, 64)])
def test_large_dims(dtype, dims):
    check(Case(dtype=dtype, s=260, dhqk=dims[0], dhhv=dims[1], b=1, nh=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"sigmoid": True},
        {"sigmoid": True, "normalize": False},
        {"sigmoid": True, "detach": True},
        {"detach": True},
        {"eps": 0.0},
        {"eps": 0.3},
        {"qk_scale": 0.7},
        {"initial": False, "last": False},
        {"initial": False},
        {"last": False},
        {"dm_last": True},
        {"dm_last": True, "eps": 0.3, "i_bias": 1.0},
        {"i_bias": -10.0, "f_bias": 3.0},
        {"chunk_size": 64},
        {"form": "parallel"},
    ],
    ids=str,
)
def test_options(dtype, options):
    check(Case(dtype=dtype, s=193, dhqk=40, dhhv=72, **options))


@pytest.mark.parametrize("gate_dtype", [F32, None])
@pytest.mark.parametrize("state_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_dtypes(dtype, gate_dtype, state_dtype):
    # Outputs of 16 bits have an error of their own, also with float32 data.
    coarse = 4e-3 if BF16 in (state_dtype,) else 5e-4 if state_dtype == F16 else 0
    case = Case(dtype=dtype, gate_dtype=gate_dtype or dtype, state_dtype=state_dtype, s=150)
    inputs = case.inputs()
    wanted, got = case.run("cpu", inputs, exact=True), case.run("cuda", inputs)
    scale = max(1.0, coarse / 1e-5) if dtype == F32 else 1.0
    assert not compare(case, got, wanted, scale)


VARLEN = [
    [0, 15, 100, 300, 1200, 2000],
    [0, 0, 1, 1, 65, 65, 193, 321, 321],
    [0, 0],
    [0, 64, 128, 256],
]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("offsets", VARLEN, ids=str)
def test_packed(dtype, offsets):
    check(Case(dtype=dtype, b=1, s=offsets[-1], cu_seqlens=offsets, dhqk=24, dhhv=100))


def test_packed_many():
    lengths = torch.randint(0, 5, (3000,), generator=torch.Generator().manual_seed(1))
    offsets = [0, *lengths.cumsum(0).tolist()]
    check(Case(b=1, nh=4, s=offsets[-1], cu_seqlens=offsets, dhqk=8, dhhv=8))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_bad_offsets_stay_inside(dtype):
    """Contents of cu_seqlens are not checked on the device, but must not lead out of memory."""
    case = Case(dtype=dtype, b=1, s=100, cu_seqlens=[0, 50, 100])
    inputs = case.inputs()
    for offsets in ([-7, 1 << 40, 3], [90, 20, 1000], [5, 5, 5]):
        case.run("cuda", inputs | {"cu_seqlens": torch.tensor(offsets)})
    torch.cuda.synchronize()


def swapped(name, t):
    """(B, S, NH, D) memory."""
    return t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 4 and name[0] != "c" else t


def odd(name, t):
    """Rows that start at no multiple of 16 bytes."""
    if t.dim() < 3:
        return t
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), float("nan"), dtype=t.dtype).to(t.device)
    wide[..., 1 : 1 + t.shape[-1]] = t
    return wide[..., 1 : 1 + t.shape[-1]]


def reversed_tokens(name, t):
    """Gates with a token stride of 2."""
    return torch.stack([t, t], -1)[..., 0] if name in ("i", "f", "di", "df", "n", "m") else t


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("prepare", [swapped, odd, reversed_tokens])
def test_strides(dtype, prepare):
    check(Case(dtype=dtype, s=140, nh=3, dhqk=64, dhhv=64), prepare=prepare)


def test_expanded_inputs():
    case = Case(s=90, last=False)
    inputs = case.inputs()
    for name in ("dh", "i", "f"):
        inputs[name] = inputs[name][:, :, :1].expand_as(inputs[name])
    seen = []

    def prepare(name, t):
        if name in ("dh", "i", "f"):
            t = t[:, :, :1].expand(t.shape)
            seen.append(t.stride())
        return t

    check(case, inputs, prepare=prepare)
    assert all(stride[2] == 0 for stride in seen)


INF = float("inf")
GATES = {
    "resets": lambda i, f, at: f.masked_fill_(at % 7 == 3, -INF),
    "ignored": lambda i, f, at: i.masked_fill_(at % 3 == 1, -INF),
    "both": lambda i, f, at: (f.masked_fill_(at % 7 == 3, -INF), i.masked_fill_(at % 7 < 5, -INF)),
    "closed": lambda i, f, at: f.fill_(-1000.0),
    "open": lambda i, f, at: f.fill_(1000.0),
    "mixed": lambda i, f, at: f.copy_(torch.where(at % 2 == 0, 200.0, -200.0)),
    "large": lambda i, f, at: i.add_(80.0),
    "spikes": lambda i, f, at: i.masked_fill_(at % 50 == 9, 60.0),
    "far": lambda i, f, at: f.masked_fill_(at % 64 == 5, -1000.0),
}


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("name", GATES)
def test_extreme_gates(dtype, name):
    case = Case(dtype=dtype, s=300, dhqk=32, dhhv=32)
    inputs = case.inputs()
    at = torch.arange(case.s).expand_as(inputs["i"])
    # Without a floor the denominator is |N|, which must not come near 0 by chance.
    inputs["q"].abs_()
    inputs["k"].abs_()
    inputs["n_initial"].abs_()
    GATES[name](inputs["i"], inputs["f"], at)
    # Where one token is all that is remembered, gradients cancel to what rounding h has left.
    check(case, inputs, scale=3.0 if dtype == BF16 else 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_at_all(dtype):
    """m0 = -inf and nothing but ignored tokens: h and gradients are 0, not NaN."""
    case = Case(dtype=dtype, s=70, initial=True)
    inputs = case.inputs()
    inputs["i"].fill_(-INF)
    inputs["m_initial"].fill_(-INF)
    inputs["c_initial"].zero_()
    inputs["n_initial"].zero_()
    got = case.run("cuda", inputs)
    for name in ("h", "dq", "dk", "dv", "di"):
        assert (got[name] == 0).all(), name
    assert not any(t.isnan().any() for t in got.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_reset_forgets_nan(dtype):
    """What a state held before a reset does not matter, not even NaN."""
    case = Case(dtype=dtype, s=200, dhqk=64, dhhv=64)
    inputs = case.inputs()
    inputs["f"][:, :, 0] = -INF
    wanted = case.run("cuda", inputs)
    inputs["c_initial"].fill_(float("nan"))
    inputs["n_initial"].fill_(float("nan"))
    got = case.run("cuda", inputs)
    # It is the last that is asked of a NaN state (0 x NaN).
    wanted.pop("dm_initial")
    assert not compare(case, got, wanted)


def test_empty():
    for sizes in ({"s": 0}, {"b": 0}, {"nh": 0}):
        check(Case(**sizes))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits(dtype):
    case = Case(dtype=dtype, s=700, dhqk=64, dhhv=128)
    inputs = case.inputs()
    first, second = case.run("cuda", inputs), case.run("cuda", inputs)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_two_segments_are_one_run():
    whole = Case(s=200, initial=True)
    inputs = whole.inputs()
    one = whole.run("cuda", inputs, backward=False)
    cut = 77
    first = {k: v[:, :, :cut] if k in "qkvif" or k == "dh" else v for k, v in inputs.items()}
    head = Case(s=cut).run("cuda", first, backward=False)
    second = {k: v[:, :, cut:] if k in "qkvif" or k == "dh" else v for k, v in inputs.items()}
    for name in ("c", "n", "m"):
        second[f"{name}_initial"] = head[f"{name}_last"].double().cpu()
    tail = Case(s=200 - cut).run("cuda", second, backward=False)
    h = torch.cat([head["h"], tail["h"]], 2)
    assert (h - one["h"]).norm() / one["h"].norm() < 1e-6
    assert (tail["c_last"] - one["c_last"]).norm() / one["c_last"].norm() < 1e-6


@pytest.mark.parametrize("i_bias", [-1.0, -10.0])
def test_tf32(i_bias):
    case = Case(s=300, dhqk=96, dhhv=80, i_bias=i_bias, flags=mlstm_c.ALLOW_TF32)
    inputs = case.inputs()
    got, wanted = case.run("cuda", inputs), case.run("cpu", inputs, exact=True)
    # Where the denominator may be at its floor, rounding it decides about terms of dq and dk.
    for name in ("h", "dv") if i_bias > -10 else ("h", "dq", "dk", "dv"):
        assert 1e-5 < error(got[name], wanted[name]) < 2e-3, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_generic_engine(dtype):
    for dims in ((64, 64), (128, 256)):
        check(Case(dtype, s=300, dhqk=dims[0], dhhv=dims[1], flags=mlstm_c.GENERIC_ENGINE))


def test_many_heads():
    """More rows and chunks than a grid dimension other than x holds."""
    check(Case(b=1100, nh=61, s=2, dhqk=4, dhhv=4))
    check(Case(b=1, nh=4, s=70000, dhqk=4, dhhv=4, last=False))


def test_more_than_two_to_the_31_elements():
    case = dict(dhqk=64, dhhv=64, nh=8)
    s, b = 66000, 64
    shape = (b, 8, s, 64)
    assert torch.Size(shape).numel() > 2**31
    generator = torch.Generator("cuda").manual_seed(3)
    x = {
        name: torch.randn(shape, dtype=BF16, device="cuda", generator=generator)
        for name in ("q", "k", "v")
    }
    x["i"] = torch.randn(shape[:3], device="cuda", generator=generator) - 1
    x["f"] = torch.randn(shape[:3], device="cuda", generator=generator) + 2
    out = {"h": torch.full_like(x["v"], float("nan"))}
    p = mlstm_c.problem(x)
    mlstm_c.call("chunkwise_fw", p, x | out)
    # Enough rows to fill the device: fewer sequences would be cut in segments, whose sums round
    # otherwise.
    rows = {name: t[-16:].clone() for name, t in x.items()}
    alone = {"h": torch.full_like(rows["v"], float("nan"))}
    mlstm_c.call("chunkwise_fw", mlstm_c.problem(rows), rows | alone)
    assert torch.equal(out["h"][-16:], alone["h"]), case


@pytest.mark.parametrize("seed", range(12))
def test_random_problems(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(options):
        return options[torch.randint(len(options), (1,), generator=generator).item()]

    dims = list(itertools.chain(range(1, 40), [64, 96, 128, 130]))
    sigmoid = pick([False, False, True])
    check(
        Case(
            dtype=pick(DTYPES),
            s=pick(list(range(1, 400))),
            b=pick([1, 2, 3]),
            nh=pick([1, 2, 5]),
            dhqk=pick(dims),
            dhhv=pick(dims),
            sigmoid=sigmoid,
            normalize=pick([True, False]) if sigmoid else True,
            detach=pick([False, True]),
            initial=pick([False, True]),
            last=pick([False, True]),
            chunk_size=pick([0, 64]),
            i_bias=pick([-10.0, -1.0, 3.0]),
            f_bias=pick([-2.0, 2.0, 6.0]),
            seed=seed,
        )
    )
