# SPDX-License-Identifier: MIT OR Apache-2.0
"""Steps of the CUDA kernels against the CPU in float64."""

import mlstm_c
import pytest
import torch
from cases import TOLERANCE, error

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


class Step:
    """Random inputs of a step, in float64 on the CPU."""

    def __init__(self, dtype=F32, state=None, b=3, nh=2, s=1, dhqk=64, dhhv=128, slots=None,
                 sigmoid=False, normalize=True, gates=None, seed=0):  # fmt: skip
        self.acc = F64 if dtype == F64 else F32
        self.dtype, self.state = dtype, state or self.acc
        self.gates = gates or self.acc
        self.sigmoid, self.normalize, self.slots = sigmoid, normalize, slots or b
        g = torch.Generator().manual_seed(seed)

        def normal(dtype, *shape):
            x = torch.randn(*shape, dtype=F64, generator=g)
            return x.to(dtype).double()

        self.x = {
            "q": normal(dtype, b, nh, s, dhqk),
            "k": normal(dtype, b, nh, s, dhqk),
            "v": normal(dtype, b, nh, s, dhhv),
            "i": normal(self.gates, b, nh, s),
            "f": normal(self.gates, b, nh, s),
        }
        self.pools = {
            "c": normal(self.state, self.slots, nh, dhqk, dhhv),
            "n": normal(self.acc, self.slots, nh, dhqk),
            "m": normal(self.acc, self.slots, nh),
        }
        if sigmoid:
            del self.pools["m"]

    def run(self, device, exact=False, rows=None, out_of_place=False, workspace=None, prepare=None):
        """(h, pools): h starts as NaN, a destination pool too."""
        kinds = {"c": self.state, "n": self.acc, "m": self.acc, "i": self.gates, "f": self.gates}

        def to(name, t):
            t = t.to(device, F64 if exact else kinds.get(name, self.dtype)).clone()
            return t if prepare is None else prepare(name, t)

        x = {name: to(name, t) for name, t in self.x.items()}
        pools = {name: to(name, t) for name, t in self.pools.items()}
        h = torch.full_like(x["v"], float("nan"))
        tensors = x | pools | {"h": h}
        target = pools
        if out_of_place:
            target = {name: torch.full_like(t, float("nan")) for name, t in pools.items()}
            tensors |= {f"{name}_dst": t for name, t in target.items()}
        tensors |= {name: t.to(device) for name, t in (rows or {}).items()}
        flags = 0 if self.normalize else mlstm_c.NO_NORMALIZE
        p = mlstm_c.problem(
            x,
            num_slots=self.slots,
            gate=int(self.sigmoid),
            flags=flags,
            state_dtype=mlstm_c.DTYPES[F64 if exact else self.state],
        )
        mlstm_c.call("step", p, tensors, workspace)
        return h, target

    def check(self, **options):
        h, pools = self.run("cuda", **options)
        options.pop("prepare", None)
        exact_h, exact_pools = self.run("cpu", exact=True, **options)
        written = ~exact_h.isnan()
        assert torch.equal(written, ~h.isnan().cpu())
        assert error(h.cpu()[written], exact_h[written]) <= TOLERANCE[self.dtype]
        for name, exact in exact_pools.items():
            real = ~exact.isnan()
            got = pools[name].cpu()
            assert torch.equal(real, ~got.isnan()), name
            assert error(got[real], exact[real]) <= TOLERANCE[got.dtype], name


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("s", [1, 2, 4, 5, 16])
@pytest.mark.parametrize("out_of_place", [False, True])
def test_tokens(dtype, s, out_of_place):
    Step(dtype, s=s).check(out_of_place=out_of_place)


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize(
    "dims", [(1, 1), (3, 5), (24, 80), (100, 36), (64, 66), (256, 512), (1500, 64), (300, 1000)]
)
def test_dims(dtype, dims):
    Step(dtype, dhqk=dims[0], dhhv=dims[1]).check()
    Step(dtype, dhqk=dims[0], dhhv=dims[1], s=7).check()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("state", [F32, BF16, F16])
@pytest.mark.parametrize("s", [1, 3, 9])
def test_state_dtypes(dtype, state, s):
    step = Step(dtype, state=state, s=s)
    step.gates = dtype
    step.x["i"], step.x["f"] = (step.x[g].to(dtype).double() for g in "if")
    h, pools = step.run("cuda")
    exact_h, exact = step.run("cpu", exact=True)
    assert error(h, exact_h) <= max(TOLERANCE[dtype], TOLERANCE[F32])
    assert error(pools["c"], exact["c"]) <= TOLERANCE[state]


@pytest.mark.parametrize("normalize", [True, False])
def test_sigmoid(normalize):
    Step(sigmoid=True, normalize=normalize, s=3).check()


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_slots(index):
    step = Step(b=6, slots=9, s=3)
    nan = float("nan")
    for t in step.pools.values():
        t[2] = nan  # not used by any row
        t[7] = nan  # used by a row without a state
    rows = {
        "src_slots": torch.tensor([5, -1, 7, 0, 8, 3], dtype=index),
        "dst_slots": torch.tensor([5, 1, 7, -1, 4, 3], dtype=index),
        "has_state": torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.uint8),
        "num_tokens": torch.tensor([3, 3, 2, 1, 3, 0], dtype=index),
    }
    step.check(rows=rows)
    rows["has_state"] = rows["has_state"].int()
    step.check(rows=rows, out_of_place=True)


def test_all_padding():
    step = Step(b=4)
    step.check(rows={"src_slots": torch.full((4,), -1)})


@pytest.mark.parametrize("slot", [1 << 40, -5, 9])
def test_slots_outside_are_padding(slot):
    step = Step(b=2, slots=3)
    h, pools = step.run("cuda", rows={"src_slots": torch.tensor([slot, 1])})
    assert h[0].isnan().all() and not h[1].isnan().any()
    assert torch.equal(pools["c"][0].cpu(), step.pools["c"][0].float())


def test_strided_pools():
    def prepare(name, t):
        if name not in "cnm":
            return t
        wide = torch.full((t.shape[0], 2, *t.shape[1:]), float("nan")).to(t)
        wide[:, 1] = t
        return wide[:, 1]

    Step(s=2, dhhv=36).check(prepare=prepare)

    def shifted(name, t):
        if name != "c":
            return t
        wide = torch.full((*t.shape[:3], t.shape[3] + 1), float("nan")).to(t)
        wide[..., 1:] = t
        return wide[..., 1:]

    Step(s=2).check(prepare=shifted)


@pytest.mark.parametrize("f", [float("-inf"), -1000.0, 1000.0])
@pytest.mark.parametrize("i", [float("-inf"), -100.0, 80.0])
def test_extreme_gates(f, i):
    step = Step(s=4)
    step.x["f"][:, :, 1] = f
    step.x["i"][:, :, 1:3] = i
    step.check()


def test_steps_are_a_forward():
    step = Step(s=16, b=2, dhqk=40, dhhv=72)
    h, _ = step.run("cuda")
    parts, pools = [], dict(step.pools)
    for t in range(16):
        one = Step(s=1, b=2, dhqk=40, dhhv=72)
        one.x = {name: x[:, :, t : t + 1] for name, x in step.x.items()}
        one.pools = pools
        out, new = one.run("cuda")
        pools = {name: t.double().cpu() for name, t in new.items()}
        parts.append(out)
    assert error(torch.cat(parts, 2), h) < 1e-6


def test_a_row_does_not_depend_on_its_batch():
    step = Step(BF16, b=40, nh=4, dhqk=64, dhhv=128, s=2)
    h, _ = step.run("cuda")
    one = Step(BF16, b=1, nh=4, dhqk=64, dhhv=128, s=2)
    one.x = {name: x[7:8] for name, x in step.x.items()}
    one.pools = {name: x[7:8] for name, x in step.pools.items()}
    assert torch.equal(one.run("cuda")[0], h[7:8])


def test_many_rows():
    Step(b=3000, nh=30, dhqk=4, dhhv=4).check()
