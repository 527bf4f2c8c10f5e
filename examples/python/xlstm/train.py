# SPDX-License-Identifier: MIT OR Apache-2.0
"""The training step in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .config import TrainConfig
from .model import XLSTM
from .training import History, run


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 matmuls on a GPU, plain float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def bits_per_byte(model: XLSTM, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of (B, S) targets in bits; 8 is knowing nothing."""
    with autocast(inputs.device):
        logits = model(inputs)
    return cross_entropy(logits.flatten(0, 1), targets.flatten()) / math.log(2)


def make_optimizer(model: XLSTM, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; only matrices decay."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def train(
    model: XLSTM,
    train_data: np.ndarray,
    held_out: np.ndarray,
    config: TrainConfig,
    device: torch.device,
    say: Callable[[str], None] = print,
) -> History:
    """Train `model` in place until the steps or the minutes are used up."""
    optimizer = make_optimizer(model, config)

    def tensors(*arrays: np.ndarray) -> list[Tensor]:
        return [torch.from_numpy(array).to(device) for array in arrays]

    def train_step(inputs: np.ndarray, targets: np.ndarray, rate: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        loss = bits_per_byte(model, *tensors(inputs, targets))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def loss(inputs: np.ndarray, targets: np.ndarray) -> float:
        return bits_per_byte(model.eval(), *tensors(inputs, targets)).item()

    return run(train_step, loss, train_data, held_out, config, say)
