# SPDX-License-Identifier: MIT OR Apache-2.0
"""The oracle: the float64 recurrence, token by token, with PyTorch's autograd for gradients."""

from dataclasses import dataclass, fields, replace

import torch
from torch.nn.functional import logsigmoid

# Relative Frobenius error against float64 that outputs and gradients of a dtype may have. Rounding
# alone makes 1.7e-3 in bfloat16 and 2.1e-4 in float16; float32 gradients are typically at 1e-6, but
# that of f is a sum over all tokens, in which much may cancel.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 3e-3,
    torch.float16: 4e-4,
}
GRADIENT_TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 5e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}


@dataclass
class Inputs:
    """q, k (B, NH, S, DHQK), v (B, NH, S, DHHV), i, f (B, NH, S) and states c (B, NH, DHQK, DHHV),
    n (B, NH, DHQK), m (B, NH, 1) or None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    i: torch.Tensor
    f: torch.Tensor
    c: torch.Tensor | None = None
    n: torch.Tensor | None = None
    m: torch.Tensor | None = None

    def __iter__(self):
        """In the order of the kernels' positional arguments."""
        return (getattr(self, field.name) for field in fields(self))

    def map(self, function):
        """`function` of every tensor that is there."""
        return Inputs(*(None if t is None else function(t) for t in self))

    def leaves(self):
        """Copies that collect gradients."""
        return self.map(lambda t: t.detach().clone().requires_grad_())

    def leaves_as_they_are(self):
        """The tensors themselves, strides and all, collecting gradients."""
        return self.map(lambda t: t.detach().requires_grad_())

    def tokens(self, start, stop):
        """Tokens start ... stop with the initial state."""
        part = [t[:, :, start:stop] for t in (self.q, self.k, self.v, self.i, self.f)]
        return Inputs(*part, self.c, self.n, self.m)

    def replace(self, **tensors):
        """With other tensors."""
        return replace(self, **tensors)

    def gradients(self):
        """Gradients of leaves."""
        return [None if t is None else t.grad for t in self]


def random_inputs(
    device,
    dtype=torch.float32,
    *,
    b=2,
    nh=2,
    s=65,
    dhqk=16,
    dhhv=24,
    states=False,
    i_bias=-1.0,
    f_bias=2.0,
    gate_dtype=None,
):
    """Random inputs, rounded to `dtype`; i_bias -1 puts many tokens on either side of
    |N| = exp(-m), where the denominator has its kink."""
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    gate_dtype = gate_dtype or state_dtype

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, dtype=torch.float64).to(device, dtype)

    inputs = Inputs(
        normal(b, nh, s, dhqk),
        normal(b, nh, s, dhqk),
        normal(b, nh, s, dhhv),
        normal(b, nh, s, dtype=gate_dtype) + i_bias,
        normal(b, nh, s, dtype=gate_dtype) + f_bias,
    )
    if states:
        inputs.c = normal(b, nh, dhqk, dhhv, dtype=state_dtype)
        inputs.n = normal(b, nh, dhqk, dtype=state_dtype)
        inputs.m = normal(b, nh, 1, dtype=state_dtype)
    return inputs


def recurrence(
    inputs, *, siging=False, normalize=True, detach_denominator=False, eps=1e-6, qk_scale=None
):
    """(h, (c, n, m)) in float64, m None with the sigmoid gate. Gates may be -inf in the forward;
    for gradients they have to be finite."""
    x = inputs.map(lambda t: t.double())
    b, nh, s, dhqk = x.q.shape
    scale = dhqk**-0.5 if qk_scale is None else qk_scale
    c = x.c if x.c is not None else x.q.new_zeros(b, nh, dhqk, x.v.shape[3])
    n = x.n if x.n is not None else x.q.new_zeros(b, nh, dhqk)
    m = x.m.squeeze(-1) if x.m is not None else x.q.new_zeros(b, nh)
    rows = []
    for t in range(s):
        q, k, v, i = x.q[:, :, t], x.k[:, :, t], x.v[:, :, t], x.i[:, :, t]
        logf = logsigmoid(x.f[:, :, t])
        if siging:
            decay, gain = logf.exp(), i.sigmoid()
        else:
            last, m = m, torch.maximum(logf + m, i)
            if detach_denominator:
                m = m.detach()
            # Nothing remembered and nothing new: all is zero.
            frame = torch.where(m.isinf(), torch.zeros_like(m), m)
            decay, gain = (logf + last - frame).exp(), (i - frame).exp()
        c = decay[..., None, None] * c + gain[..., None, None] * k[..., :, None] * v[..., None, :]
        n = decay[..., None] * n + gain[..., None] * k
        numerator = scale * torch.einsum("bhd,bhde->bhe", q, c)
        normalizer = scale * torch.einsum("bhd,bhd->bh", q, n)
        floor = torch.ones_like(normalizer) if siging else (-m).exp()
        denominator = torch.maximum(normalizer.abs(), floor) + eps
        if detach_denominator:
            denominator = denominator.detach()
        rows.append(numerator / denominator[..., None] if normalize else numerator)
    h = torch.stack(rows, 2) if rows else torch.zeros_like(x.v)
    return h, (c, n, None if siging else m[..., None])


def error(got, wanted):
    """Relative Frobenius error; NaN counts as infinite."""
    assert got.shape == wanted.shape, f"shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    difference = (got.double() - wanted.double()).norm()
    result = (difference / wanted.double().norm().clamp_min(1e-30)).item()
    return result if result == result else float("inf")


def assert_close(got, wanted, tolerance, label=""):
    """Pairs of tensors (None matches None) within a relative error."""
    got, wanted = list(got), list(wanted)
    assert len(got) == len(wanted)
    errors = {}
    for position, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert (a is None) == (b is None), f"{label} {position}: got {a}, wanted {b}"
        if a is not None and b.numel() > 0:
            errors[position] = error(a, b)
    assert all(e <= tolerance for e in errors.values()), f"{label}: errors {errors} > {tolerance}"


def assert_gradients_close(ours, exact, tolerance):
    """Gradients of q, k, v, i, f within a relative error. Those of the first state are few sums
    over all tokens, in which much may cancel: ten times that."""
    got, wanted = ours.gradients(), exact.gradients()
    assert_close(got[:5], wanted[:5], tolerance, "gradients of q, k, v, i, f")
    assert_close(got[5:7], wanted[5:7], 10 * tolerance, "gradients of c, n")
    if exact.m is not None and exact.m.numel() > 0:
        # dm = <dc, c> + <dn, n> cancels most of all, and so is measured by its terms.
        terms = [(t.grad * t).norm() for t in (exact.c, exact.n)]
        difference = (got[7].double() - wanted[7].double()).norm()
        assert difference <= 10 * tolerance * (wanted[7].norm() + sum(terms)), "gradient of m"


def random_like(outputs):
    """Random incoming gradients, one per output."""
    return [torch.randn_like(t) for t in outputs]


def flat(result):
    """[h, c, n, (m)] of what a kernel returned."""
    if isinstance(result, torch.Tensor):
        return [result]
    h, states = result
    return [h, *(t for t in states if t is not None)]


def compare(kernel, inputs, *, states=True, oracle=None, precision=None, **options):
    """Holds a kernel's outputs and gradients against the oracle, on random incoming gradients of
    h and, with `states`, of the last states too.

    `oracle` has the options under the oracle's names where they differ; `precision` is the dtype
    that sets the tolerance, that of q by default.
    """
    precision = precision or inputs.q.dtype
    ours, exact = inputs.leaves(), inputs.map(lambda t: t.double()).leaves()
    got = flat(kernel(*ours, return_last_states=states, **options))
    wanted = flat(recurrence(exact, **(options if oracle is None else oracle)))[: len(got)]
    assert_close(got, wanted, TOLERANCE[precision], "outputs")
    gradients = random_like(got)
    torch.autograd.backward(got, gradients)
    torch.autograd.backward(wanted, [g.double() for g in gradients])
    assert_gradients_close(ours, exact, GRADIENT_TOLERANCE[precision])
