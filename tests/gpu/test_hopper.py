# SPDX-License-Identifier: MIT OR Apache-2.0
"""Problems that the kernels for the H100 and H200 take, against float64."""

import mlstm_c
import pytest
import torch
from cases import Case, check, compare
from test_chunkwise import swapped

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="no H100 or H200",
)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    "dims",
    [
        (64, 64),
        (64, 128),
        (128, 64),
        (128, 192),
        (192, 128),
        (256, 64),
        (256, 512),
        (64, 1024),
        (320, 64),
        (512, 192),
        (64, 576),
        (192, 640),
        (320, 832),
        (512, 1024),
    ],
)
def test_dims(dtype, dims):
    check(Case(dtype=dtype, s=200, dhqk=dims[0], dhhv=dims[1], b=2, seed=dims[0]))


@pytest.mark.parametrize("dims", [(64, 64), (256, 128), (512, 64)])
@pytest.mark.parametrize("s", [1, 2, 7, 63, 64, 65, 127, 128, 129, 192, 1000])
def test_lengths(s, dims):
    check(Case(dtype=BF16, s=s, dhqk=dims[0], dhhv=dims[1], seed=s))


@pytest.mark.parametrize("options", [{}, {"sigmoid": True}, {"state_dtype": BF16}], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("s", [1, 2, 3, 4])
@pytest.mark.parametrize("dims", [(64, 64), (128, 320)])
def test_few_tokens_between_states(dims, s, dtype, options):
    """Without what a backward needs some are a step: one token, or up to three of larger states."""
    sizes = dict(s=s, dhqk=dims[0], dhhv=dims[1])
    case = Case(dtype=dtype, **sizes, vectors=False, seed=s, **options)
    inputs = case.inputs()
    wanted = case.run("cpu", inputs, exact=True, backward=False)
    assert wanted.keys() == {"h", "c_last", "n_last"} | (set() if case.sigmoid else {"m_last"})
    assert not compare(case, case.run("cuda", inputs, backward=False), wanted)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    "options",
    [
        {"sigmoid": True},
        {"sigmoid": True, "normalize": False},
        {"eps": 0.0},
        {"eps": 0.3},
        {"qk_scale": -0.7},
        {"initial": False, "last": False},
        {"initial": False},
        {"last": False},
        {"i_bias": -10.0, "f_bias": 3.0},
        {"gate_dtype": F32},
        {"state_dtype": BF16},
        {"state_dtype": F16},
        {"form": "parallel"},
        {"detach": True},
        {"dm_last": True},
        {"qk_scale": 0.3},
        {"dm_last": True, "i_bias": 3.0, "eps": 0.3},
    ],
    ids=str,
)
def test_options(dtype, options):
    check(Case(dtype=dtype, s=193, dhqk=128, dhhv=128, **options))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sigmoid": True},
        {"sigmoid": True, "normalize": False},
        {"initial": False, "last": False},
        {"initial": False},
        {"last": False},
        {"state_dtype": BF16},
        {"detach": True},
        {"dm_last": True, "i_bias": 3.0, "eps": 0.3},
        {"qk_scale": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("dims", [(128, 576), (64, 1600)])
def test_options_of_parts(dims, options, dtype):
    """dq and dk take columns of DHHV in turns: here two, and four of which some add and leave."""
    check(Case(dtype=dtype, s=193, dhqk=dims[0], dhhv=dims[1], **options))


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("dims", [(64, 128), (256, 192)])
@pytest.mark.parametrize("s", [2048, 4000, 8192, 8200])
def test_segments(s, dims, initial):
    """Few heads and long sequences: parts of a sequence run side by side."""
    check(Case(dtype=BF16, b=1, nh=2, s=s, dhqk=dims[0], dhhv=dims[1], initial=initial, f_bias=4.0))


@pytest.mark.parametrize(
    "options",
    [{}, {"initial": False}, {"state_dtype": F16}, {"sigmoid": True}, {"f_bias": 6.0}],
    ids=str,
)
@pytest.mark.parametrize("dims", [(64, 64), (64, 128), (128, 64), (128, 320), (256, 192)])
@pytest.mark.parametrize("s", [100, 700, 1500])
def test_parts_that_catch_up(s, dims, options):
    """Few heads and short sequences: each part of a forward makes the state before it itself."""
    check(Case(dtype=BF16, b=1, nh=2, s=s, dhqk=dims[0], dhhv=dims[1], seed=s, **options))


@pytest.mark.parametrize("dims", [(64, 64), (256, 128)])
def test_parts_that_catch_up_after_a_reset(dims):
    """Nothing of before counts, not even where it is no number."""
    case = Case(dtype=BF16, b=1, nh=1, s=900, dhqk=dims[0], dhhv=dims[1], f_bias=4.0)
    inputs = case.inputs()
    inputs["f"][:, :, [130, 640]] = float("-inf")
    check(case, inputs)
    for name in ("k", "v"):
        inputs[name][:, :, :100] = float("nan")
    inputs["c_initial"][:] = inputs["n_initial"][:] = float("nan")
    got = case.run("cuda", inputs, backward=False)
    assert got["h"][:, :, 192:].isfinite().all()
    assert got["c_last"].isfinite().all() and got["n_last"].isfinite().all()


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize(
    "s, dims",
    [
        (1500, (64, 64)),
        (1500, (64, 128)),
        (1500, (128, 64)),
        (1500, (128, 128)),
        (4200, (128, 128)),
    ],
)
def test_many_heads(s, dims, sigmoid):
    """Sequences in one piece each, of more chunks than the warps for the gates hold at a time; and,
    where such warps would cost too much, with the gates of many rows made beforehand."""
    sizes = dict(b=10, nh=7, s=s, dhqk=dims[0], dhhv=dims[1], sigmoid=sigmoid)
    inputs = Case(dtype=BF16, **sizes).inputs()
    got, wanted = (
        Case(dtype=BF16, **sizes, flags=flags).run("cuda", inputs, backward=False)
        for flags in (0, mlstm_c.GENERIC_ENGINE)
    )
    for name, reference in wanted.items():
        error = (got[name].double() - reference.double()).norm() / reference.double().norm()
        assert error < (1e-5 if name in ("m", "m_last") else 6e-3), name


@pytest.mark.parametrize(
    "options", [{}, {"last": False}, {"dm_last": True}, {"sigmoid": True}], ids=str
)
@pytest.mark.parametrize("dims", [(128, 512), (512, 320), (64, 1600), (256, 640)])
def test_segments_of_large_states(dims, options):
    check(Case(dtype=BF16, b=1, nh=1, s=4500, dhqk=dims[0], dhhv=dims[1], f_bias=5.0, **options))


def test_segments_that_reset():
    """Segments that keep nothing of the ones before, or nothing at all."""
    case = Case(dtype=BF16, b=1, nh=1, s=4500, dhqk=64, dhhv=64, f_bias=4.0)
    inputs = case.inputs()
    inputs["f"][:, :, [1500, 2100, 4200]] = float("-inf")
    check(case, inputs)


VARLEN = [
    [0, 15, 100, 300, 1200, 2000],
    [0, 0, 1, 1, 65, 65, 193, 321, 321],
    [0, 64, 128, 256],
    [0, 3000, 3010, 7000],
]


@pytest.mark.parametrize("dims", [(64, 64), (256, 128), (512, 64), (128, 1088)])
@pytest.mark.parametrize("offsets", VARLEN, ids=str)
def test_packed(offsets, dims):
    check(
        Case(dtype=BF16, b=1, s=offsets[-1], cu_seqlens=offsets, dhqk=dims[0], dhhv=dims[1], nh=1)
    )


def test_many_packed_sequences():
    offsets = list(range(0, 1200, 2))
    check(Case(dtype=BF16, b=1, s=offsets[-1], cu_seqlens=offsets, dhqk=64, dhhv=64, nh=1))


def test_packed_sequences_do_not_touch_each_other():
    case = Case(dtype=BF16, b=1, s=300, cu_seqlens=[0, 70, 170, 300], dhqk=64, dhhv=128)
    inputs = case.inputs()
    clean = case.run("cuda", inputs, backward=False)
    dirty = {name: t.clone() for name, t in inputs.items()}
    for name in ("q", "k", "v"):
        dirty[name][:, :, 70:170] = float("nan")
    got = case.run("cuda", dirty, backward=False)
    for part in (slice(0, 70), slice(170, 300)):
        assert torch.equal(got["h"][:, :, part], clean["h"][:, :, part])


@pytest.mark.parametrize("dims", [(64, 128), (128, 512), (128, 1088)])
def test_gradients_of_packed_sequences_do_not_touch_each_other(dims):
    case = Case(dtype=BF16, b=1, s=300, cu_seqlens=[0, 70, 170, 300], dhqk=dims[0], dhhv=dims[1])
    inputs = case.inputs()
    clean = case.run("cuda", inputs)
    dirty = {name: t.clone() for name, t in inputs.items()}
    for name in ("q", "k", "v", "dh"):
        dirty[name][:, :, 70:170] = float("nan")
    got = case.run("cuda", dirty)
    for part in (slice(0, 70), slice(170, 300)):
        for name in ("dq", "dk", "dv", "di", "df"):
            assert torch.equal(got[name][:, :, part], clean[name][:, :, part]), name
    for name in ("dc_initial", "dn_initial", "dm_initial"):
        assert torch.equal(got[name][[0, 2]], clean[name][[0, 2]]), name


@pytest.mark.parametrize("dhhv", [256, 1088])
def test_strides(dhhv):
    check(Case(dtype=BF16, s=193, dhqk=128, dhhv=dhhv), prepare=swapped)


def test_resets_forget_everything():
    case = Case(dtype=BF16, s=200, dhqk=64, dhhv=64)
    inputs = case.inputs()
    inputs["f"][:, :, 70] = float("-inf")
    inputs["c_initial"][:] = float("nan")
    got = case.run("cuda", inputs, backward=False)
    assert got["h"][:, :, 70:].isfinite().all()
    assert got["c_last"].isfinite().all()


@pytest.mark.parametrize("gate", ["f", "i"])
@pytest.mark.parametrize("value", [1000.0, -1000.0, float("-inf"), 80.0])
def test_extreme_gates(gate, value):
    case = Case(dtype=BF16, s=200, dhqk=64, dhhv=128, initial=False)
    inputs = case.inputs()
    inputs[gate][:, :, 30:190:7] = value
    check(case, inputs)


@pytest.mark.parametrize("dhhv", [256, 1024])
def test_agrees_with_the_generic_engine(dhhv):
    case = Case(dtype=BF16, s=1000, dhqk=256, dhhv=dhhv)
    other = Case(dtype=BF16, s=1000, dhqk=256, dhhv=dhhv, flags=mlstm_c.GENERIC_ENGINE)
    inputs = case.inputs()
    got, wanted = (x.run("cuda", inputs) for x in (case, other))
    for name, reference in wanted.items():
        error = (got[name].double() - reference.double()).norm() / reference.double().norm()
        # Gradients add up more roundings; those of the forget gates are sums that nearly cancel.
        limit = 2.5e-2 if name in ("df", "dm_initial") else 1e-2 if name[0] == "d" else 6e-3
        assert error < limit, name
        both = "both ran on the same engine"
        assert not (name in ("h", "dq", "dk", "dv") and error == 0), both


@pytest.mark.parametrize("dims", [(256, 256), (128, 512), (64, 64), (128, 1088)])
@pytest.mark.parametrize("s", [500, 4096])
def test_repeats_bit_for_bit(s, dims):
    case = Case(dtype=BF16, b=1, nh=4, s=s, dhqk=dims[0], dhhv=dims[1])
    inputs = case.inputs()
    first = case.run("cuda", inputs)
    for _ in range(5):
        again = case.run("cuda", inputs)
        for name, wanted in first.items():
            assert torch.equal(again[name], wanted), name


def test_addresses_of_other_tensors():
    """Calls one after another on tensors at the same addresses but of other shapes, strides and
    types: what the library keeps of an address must not stand for another tensor."""
    memory = {}

    def placed(name, t):
        whole = memory.setdefault(name, torch.empty(1 << 20, device="cuda")).view(t.dtype)
        return whole[: t.numel()].view(t.shape).copy_(t)

    def placed_by_token(name, t):
        tokens = t.dim() == 4 and "_" not in name
        return placed(name, t.transpose(1, 2)).transpose(1, 2) if tokens else placed(name, t)

    for _ in range(2):
        check(Case(dtype=BF16, b=2, nh=2, s=200, dhqk=64, dhhv=128), prepare=placed)
        check(Case(dtype=F16, b=2, nh=2, s=200, dhqk=64, dhhv=128), prepare=placed)
        check(Case(dtype=BF16, b=1, nh=2, s=200, dhqk=128, dhhv=64), prepare=placed)
        check(Case(dtype=BF16, b=1, nh=2, s=100, dhqk=128, dhhv=64), prepare=placed)
        check(Case(dtype=BF16, b=2, nh=2, s=200, dhqk=64, dhhv=128), prepare=placed_by_token)


def test_workspace_for_aligned_tensors_says_when_they_are_not():
    """A call that needs more than the query promised for aligned tensors writes nothing, and its
    status says how to go on."""
    case = Case(dtype=BF16, b=1, s=100, dhqk=64, dhhv=64, initial=False, last=False)
    x = {n: t.to("cuda", case.dtype_of(n)) for n, t in case.inputs().items() if n != "dh"}
    whole = torch.zeros(x["q"].numel() + 1, dtype=BF16, device="cuda")
    x["q"] = whole[1:].view_as(x["q"]).copy_(x["q"])
    out = {"h": torch.full_like(x["v"], float("nan"))}
    p = mlstm_c.problem(x)
    small, large = (
        mlstm_c.query("chunkwise_fw", mlstm_c.problem(x, flags=flags)).workspace_size
        for flags in (mlstm_c.ALIGNED, 0)
    )
    assert small + 64 < large
    memory = torch.empty(large + 64, dtype=torch.uint8, device="cuda")
    with pytest.raises(mlstm_c.Error) as error:
        mlstm_c.call("chunkwise_fw", p, x | out, memory[: small + 64])
    assert error.value.status == mlstm_c.STATUS["WORKSPACE_TOO_SMALL"]
    torch.cuda.synchronize()
    assert out["h"].isnan().all()
    mlstm_c.call("chunkwise_fw", p, x | out, memory)
    assert out["h"].isfinite().all()
