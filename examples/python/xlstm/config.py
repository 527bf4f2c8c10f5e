# SPDX-License-Identifier: MIT OR Apache-2.0
"""Sizes of the model and of its training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class XLSTMConfig:
    """Sizes and constants of an `XLSTM`."""

    d_model: int = 128
    n_blocks: int = 3
    n_heads: int = 4
    vocab_size: int = 256
    qk_factor: float = 0.5
    """Queries and keys are narrower than values: the state is half the size at the same quality."""
    ffn_factor: float = 8 / 3
    """Three matrices of this width cost as much as two of width 4 D."""
    gate_cap: float = 15.0
    logit_cap: float = 30.0
    input_gate_bias: float = -10.0
    """The memory starts almost closed and opens where that lowers the loss: no loss spikes."""
    forget_gate_bias: tuple[float, float] = (3.0, 6.0)
    """First and last head: a spread of time scales, from about 20 to about 400 bytes."""
    norm_eps: float = 1e-6
    chunk_size: int = 64

    @property
    def qk_head_dim(self) -> int:
        """DHQK."""
        return int(self.d_model * self.qk_factor) // self.n_heads

    @property
    def v_head_dim(self) -> int:
        """DHHV."""
        return self.d_model // self.n_heads

    @property
    def d_ffn(self) -> int:
        """Hidden width of the feed-forward branch, a multiple of 64."""
        return -(-int(self.d_model * self.ffn_factor) // 64) * 64


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides how training runs."""

    steps: int = 2500
    minutes: float = 2.0
    batch: int = 4
    seq_len: int = 256
    lr: float = 3e-3
    warmup: float = 0.05
    """Part of the run in which the learning rate rises; then it falls along a cosine."""
    weight_decay: float = 0.1
    clip: float = 1.0
    evaluations: int = 6
    """Held-out measurements after the one at the start, evenly spread; the last at the end."""
    held_out_windows: int = 96
    seed: int = 0
