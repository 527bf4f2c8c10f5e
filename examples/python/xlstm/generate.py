# SPDX-License-Identifier: MIT OR Apache-2.0
"""Writing text: the prompt in one go, then one byte at a time from a state of fixed size."""

from __future__ import annotations

import torch
from torch import Tensor

from .model import XLSTM, State


@torch.inference_mode()
def prefill(model: XLSTM, tokens: Tensor) -> tuple[Tensor, State]:
    """Read a prompt (B, S) with the chunkwise kernel: logits (B, vocab) of the next byte, state."""
    logits, state = model.eval()(tokens, return_state=True)
    return logits[:, -1], state


@torch.inference_mode()
def step(model: XLSTM, token: Tensor, state: State | None) -> tuple[Tensor, State]:
    """Read one byte per sequence (B,) with the step kernel: logits (B, vocab), new state."""
    logits, state = model.eval()(token[:, None], state, return_state=True)
    return logits[:, -1], state


def sample(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Draw one byte per row of (B, vocab); temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    # Drawn on the CPU: the same seed gives the same text on every device.
    probabilities = torch.softmax(logits.float().cpu() / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)


def generate(
    model: XLSTM, prompt: str, length: int, temperature: float = 0.6, seed: int = 0
) -> str:
    """Continue `prompt` by `length` bytes and return the continuation."""
    device = model.embed.weight.device
    generator = torch.Generator().manual_seed(seed)
    logits, state = prefill(model, torch.tensor([list(prompt.encode())], device=device))
    written = bytearray()
    for _ in range(length):
        token = sample(logits, temperature, generator)
        written.append(int(token))
        logits, state = step(model, token, state)
    return written.decode(errors="replace")
