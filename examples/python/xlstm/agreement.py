# SPDX-License-Identifier: MIT OR Apache-2.0
"""Chunkwise, parallel and step are three ways to the same numbers. Checked on a trained model."""

from __future__ import annotations

import torch
from torch import Tensor

from mlstm.torch import get_mlstm_kernel, get_mlstm_step_kernel

from .checks import H_TOLERANCE, LOGITS_TOLERANCE, Check
from .generate import step
from .model import XLSTM


def relative_difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    return ((a - b).abs().max() / b.abs().max()).item()


@torch.no_grad()
def kernel_inputs(model: XLSTM, tokens: Tensor) -> list[dict[str, Tensor]]:
    """The q, k, v, i, f that each block hands to its kernel while the model reads (B, S)."""
    seen: list[dict[str, Tensor]] = []
    hooks = [
        block.mlstm.backend.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append({key: kwargs[key] for key in "qkvif"}),
            with_kwargs=True,
        )
        for block in model.blocks
    ]
    try:
        model.eval()(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def step_through(name: str, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    """h (B, NH, S, DHHV) by calling the step kernel once per position."""
    kernel = get_mlstm_step_kernel(name)
    b, nh, s, dhqk = q.shape
    state = (q.new_zeros(b, nh, dhqk, v.shape[-1]), q.new_zeros(b, nh, dhqk), q.new_zeros(b, nh, 1))
    outputs = []
    for t in range(s):
        h, state = kernel(
            q[:, :, t], k[:, :, t], v[:, :, t], i[:, :, t, None], f[:, :, t, None], *state
        )
        outputs.append(h)
    return torch.stack(outputs, dim=2)


@torch.no_grad()
def check_kernels(model: XLSTM, tokens: Tensor) -> list[Check]:
    """h of the three kernels on the model's own q, k, v, i, f; the worst block counts."""
    config = model.blocks[0].mlstm.backend.config
    chunkwise = get_mlstm_kernel(config.chunkwise_kernel)
    parallel = get_mlstm_kernel("parallel--limit_headdim")
    errors: dict[str, list[float]] = {}
    for inputs in kernel_inputs(model, tokens):
        h_step = step_through(config.step_kernel, **inputs)
        h_chunkwise = chunkwise(**inputs, chunk_size=config.chunk_size)
        h_parallel = parallel(**inputs)
        for name, a, b in (
            ("h: chunkwise = step", h_chunkwise, h_step),
            ("h: parallel = step", h_parallel, h_step),
            ("h: chunkwise = parallel", h_chunkwise, h_parallel),
        ):
            errors.setdefault(name, []).append(relative_difference(a, b))
    # max() may overlook a NaN, a tensor's maximum does not.
    return [Check(n, torch.tensor(e).max().item(), H_TOLERANCE) for n, e in errors.items()]


@torch.no_grad()
def check_logits(model: XLSTM, tokens: Tensor) -> Check:
    """Logits of the whole model, all of (B, S) at once against byte by byte."""
    at_once = model.eval()(tokens)
    logits, state = [], None
    for token in tokens.unbind(1):
        last, state = step(model, token, state)
        logits.append(last)
    error = relative_difference(torch.stack(logits, dim=1), at_once)
    return Check("logits of the model: chunkwise = byte by byte", error, LOGITS_TOLERANCE)
