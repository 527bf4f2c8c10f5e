# SPDX-License-Identifier: MIT OR Apache-2.0
"""Random cases, run on a device and, in float64, on the CPU: there the library itself is held
against the recurrence by tests of its own."""

from dataclasses import dataclass

import mlstm_c
import torch

# Relative Frobenius error against float64 that a dtype may have.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 8e-3,
    torch.float16: 1.5e-3,
}
TOKENS = ("q", "k", "v", "i", "f")
STATES = ("c_initial", "n_initial", "m_initial")
LAST = ("c_last", "n_last", "m_last")
GRADIENTS = ("dq", "dk", "dv", "di", "df")


@dataclass
class Case:
    """Sizes and options of one forward and backward."""

    dtype: torch.dtype = torch.float32
    gate_dtype: torch.dtype | None = None
    state_dtype: torch.dtype | None = None
    b: int = 2
    nh: int = 2
    s: int = 65
    dhqk: int = 16
    dhhv: int = 24
    sigmoid: bool = False
    normalize: bool = True
    detach: bool = False
    eps: float | None = None
    qk_scale: float = 0.0
    chunk_size: int = 0
    initial: bool = True
    last: bool = True
    dm_last: bool = False
    cu_seqlens: list | None = None
    i_bias: float = -1.0
    f_bias: float = 2.0
    form: str = "chunkwise"
    seed: int = 0
    flags: int = 0  # more of them
    vectors: bool = True  # n and m of the tokens, which a backward needs

    @property
    def acc(self):
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def rows(self):
        return self.b if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    def inputs(self):
        """float64 tensors on the CPU, holding values of the case's dtypes."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(dtype, *shape):
            x = torch.randn(*shape, dtype=torch.float64, generator=generator)
            return x.to(dtype).double()

        gate = self.gate_dtype or self.acc
        state = self.state_dtype or self.acc
        tokens = (self.b, self.nh, self.s)
        heads = (self.rows, self.nh)
        x = {
            "q": normal(self.dtype, *tokens, self.dhqk),
            "k": normal(self.dtype, *tokens, self.dhqk),
            "v": normal(self.dtype, *tokens, self.dhhv),
            "i": (normal(gate, *tokens) + self.i_bias).to(gate).double(),
            "f": (normal(gate, *tokens) + self.f_bias).to(gate).double(),
            "dh": normal(self.dtype, *tokens, self.dhhv),
        }
        if self.initial:
            x["c_initial"] = normal(state, *heads, self.dhqk, self.dhhv)
            x["n_initial"] = normal(self.acc, *heads, self.dhqk)
            x["m_initial"] = normal(self.acc, *heads)
        if self.last:
            x["dc_last"] = normal(state, *heads, self.dhqk, self.dhhv)
            x["dn_last"] = normal(self.acc, *heads, self.dhqk)
        if self.dm_last:
            x["dm_last"] = normal(self.acc, *heads)
        if self.sigmoid:
            x.pop("m_initial", None)
            x.pop("dm_last", None)
        if self.cu_seqlens is not None:
            x["cu_seqlens"] = torch.tensor(self.cu_seqlens)
        return x

    def dtype_of(self, name):
        if name == "cu_seqlens":
            return torch.int64
        if name in ("i", "f", "di", "df"):
            return self.gate_dtype or self.acc
        if name in ("c_initial", "dc_last", "c_last", "dc_initial"):
            return self.state_dtype or self.acc
        if name[-1] in "qkvh" and name[-2:] != "_h":
            return self.dtype
        return self.acc

    def problem(self, x, exact):
        flags = self.flags | (0 if self.normalize else mlstm_c.NO_NORMALIZE)
        flags |= mlstm_c.DETACH_DENOMINATOR if self.detach else 0
        eps = 0.0
        if self.eps is not None:
            flags |= mlstm_c.NO_EPS if self.eps == 0 else 0
            eps = self.eps
        return mlstm_c.problem(
            x,
            num_seqs=0 if self.cu_seqlens is None else self.rows,
            gate=int(self.sigmoid),
            flags=flags,
            eps=eps,
            qk_scale=self.qk_scale,
            chunk_size=self.chunk_size,
            state_dtype=mlstm_c.DTYPES[torch.float64 if exact else self.state_dtype or self.acc],
        )

    def run(self, device, inputs=None, exact=False, backward=True, prepare=None):
        """All outputs by name, on `device`; `exact` in float64. Outputs start as NaN."""
        x = self.inputs() if inputs is None else dict(inputs)

        def to(name, t):
            dtype = torch.float64 if exact and name != "cu_seqlens" else self.dtype_of(name)
            return t.to(device, dtype)

        x = {name: to(name, t) for name, t in x.items()}
        if prepare is not None:
            x = {name: prepare(name, t) for name, t in x.items()}

        def empty(name, *shape):
            dtype = torch.float64 if exact else self.dtype_of(name)
            t = torch.full(shape, float("nan"), dtype=dtype, device=device)
            return t if prepare is None else prepare(name, t)

        p = self.problem(x, exact)
        tokens = (self.b, self.nh, self.s)
        heads = (self.rows, self.nh)
        out = {"h": empty("h", *tokens, self.dhhv)}
        if self.vectors:
            out["n"] = empty("n", *tokens)
        if self.vectors and not self.sigmoid:
            out["m"] = empty("m", *tokens)
        if self.last:
            out["c_last"] = empty("c_last", *heads, self.dhqk, self.dhhv)
            out["n_last"] = empty("n_last", *heads, self.dhqk)
            if not self.sigmoid:
                out["m_last"] = empty("m_last", *heads)
        names = TOKENS + STATES + ("cu_seqlens",)
        shared = {name: x[name] for name in names if name in x}
        mlstm_c.call(f"{self.form}_fw", p, shared | out)
        if not backward:
            return out
        saved = {name: out[name] for name in ("h", "n", "m") if name in out}
        incoming = {name: x[name] for name in ("dh", "dc_last", "dn_last", "dm_last") if name in x}
        grads = {name: empty(name, *x[name[1:]].shape) for name in GRADIENTS}
        for name in STATES:
            if name in x:
                grads["d" + name] = empty("d" + name, *x[name].shape)
        mlstm_c.call(f"{self.form}_bw", p, shared | saved | incoming | grads)
        return out | grads


def error(got, wanted, scale=0.0):
    """Relative Frobenius error, to `scale` at least; NaN counts as infinite."""
    got, wanted = got.double().cpu(), wanted.double().cpu()
    assert got.shape == wanted.shape
    if wanted.numel() == 0:
        return 0.0
    same = got == wanted  # infinities too
    difference = torch.where(same, torch.zeros_like(got), got - wanted)
    finite = wanted.masked_fill(wanted.isinf(), 0.0)
    result = (difference.norm() / finite.norm().clamp_min(max(scale, 1e-30))).item()
    return result if result == result else float("inf")


def compare(case, got, wanted, scale=1.0):
    """Names and errors of what is off."""
    base = TOLERANCE[case.dtype] * scale
    failures = {}
    for name, reference in wanted.items():
        # What is stored in float32 may still be computed from 16-bit products.
        limit = max(base, TOLERANCE[got[name].dtype])
        terms = 0.0
        if name in ("di", "df", "dm_initial", "dn_initial"):
            limit *= 4  # sums with cancellation,
            terms = wanted["di"].norm().item()  # possibly to nothing
        e = error(got[name], reference, terms)
        if not e <= limit:
            failures[name] = e
    return failures


def check(case, inputs=None, scale=1.0, **options):
    """Runs a case on the GPU and holds it against float64."""
    inputs = case.inputs() if inputs is None else inputs
    wanted = case.run("cpu", inputs, exact=True)
    got = case.run("cuda", inputs, **options)
    torch.cuda.synchronize()
    failures = compare(case, got, wanted, scale)
    assert not failures, f"{case}: {failures}"
    return got
