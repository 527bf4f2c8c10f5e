# SPDX-License-Identifier: MIT OR Apache-2.0
"""A byte-level xLSTM language model made of mLSTM blocks, laid out like xLSTM-7B.

Each block is two residual branches, both behind an RMSNorm:

    x = x + mlstm_layer(norm(x))        mixes along time: the only place where bytes see each other
    x = x + feed_forward(norm(x))       mixes along features

The matrix memory itself is `mlstm.torch`; this file is what a model puts around it.
Shapes: B batch, S sequence, D model width, NH heads, DHQK and DHHV head widths.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from mlstm.torch.backend_module import mLSTMBackend, mLSTMBackendConfig

from .config import XLSTMConfig

LayerState = tuple[Tensor, Tensor, Tensor]
"""What one layer remembers: c (B, NH, DHQK, DHHV), n (B, NH, DHQK), m (B, NH, 1)."""

State = list[LayerState]
"""What the model remembers: one `LayerState` per block. Its size does not grow with the text."""


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """Squash `x` into (-cap, cap), leaving small values as they are."""
    return cap * torch.tanh(x / cap)


class HeadNorm(nn.Module):
    """LayerNorm over each head's features by itself: heads of any magnitude weigh the same."""

    def __init__(self, n_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n_heads * head_dim))

    def forward(self, h: Tensor) -> Tensor:
        """(B, S, NH, DHHV) -> (B, S, D)."""
        h = layer_norm(h.float(), h.shape[-1:], eps=self.eps)
        return h.flatten(2) * self.weight


class MLSTMLayer(nn.Module):
    """Projections and gates around the mLSTM kernels.

    In training mode the sequence goes through the chunkwise kernel; in eval mode the backend
    takes whatever fits: the chunkwise kernel for a prompt, the step kernel for a single byte.
    """

    def __init__(self, config: XLSTMConfig) -> None:
        super().__init__()
        self.config = config
        d, heads = config.d_model, config.n_heads
        self.q = nn.Linear(d, heads * config.qk_head_dim, bias=False)
        self.k = nn.Linear(d, heads * config.qk_head_dim, bias=False)
        self.v = nn.Linear(d, heads * config.v_head_dim, bias=False)
        self.input_gate = nn.Linear(d, heads)
        self.forget_gate = nn.Linear(d, heads)
        self.output_gate = nn.Linear(d, d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.norm = HeadNorm(heads, config.v_head_dim, config.norm_eps)
        self.backend = mLSTMBackend(
            mLSTMBackendConfig(
                chunkwise_kernel="chunkwise--xl_chunk",
                mode="train",
                chunk_size=config.chunk_size,
                return_last_states=False,
            )
        )

    def forward(
        self, x: Tensor, state: LayerState | None, return_state: bool
    ) -> tuple[Tensor, LayerState | None]:
        """(B, S, D) -> (B, S, D) and, if asked for, the state after the last byte."""

        def split_heads(y: Tensor) -> Tensor:  # (B, S, NH * DH) -> (B, NH, S, DH), a view
            return y.unflatten(-1, (self.config.n_heads, -1)).transpose(1, 2)

        cap = self.config.gate_cap
        c, n, m = state or (None, None, None)
        result = self.backend(
            q=split_heads(self.q(x)),
            k=split_heads(self.k(x)),
            v=split_heads(self.v(x)),
            i=soft_cap(self.input_gate(x), cap).transpose(1, 2),  # (B, NH, S)
            f=soft_cap(self.forget_gate(x), cap).transpose(1, 2),
            c_initial=c,
            n_initial=n,
            m_initial=m,
            return_last_states=return_state,
            mode="train" if self.training else "inference",
        )
        # Inference always hands the state back, training only on request.
        h, last = result if isinstance(result, tuple) else (result, None)
        h = self.norm(h.transpose(1, 2)) * torch.sigmoid(self.output_gate(x))
        return self.out(h), last


class FeedForward(nn.Module):
    """Gated feed-forward (SwiGLU)."""

    def __init__(self, config: XLSTMConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.d_ffn, bias=False)
        self.up = nn.Linear(config.d_model, config.d_ffn, bias=False)
        self.down = nn.Linear(config.d_ffn, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return self.down(silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One mLSTM layer and one feed-forward, each pre-normed and residual."""

    def __init__(self, config: XLSTMConfig) -> None:
        super().__init__()
        self.norm_mlstm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlstm = MLSTMLayer(config)
        self.norm_ffn = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(
        self, x: Tensor, state: LayerState | None, return_state: bool
    ) -> tuple[Tensor, LayerState | None]:
        """(B, S, D) -> (B, S, D) and, if asked for, the layer's state."""
        y, last = self.mlstm(self.norm_mlstm(x), state, return_state)
        x = x + y
        return x + self.ffn(self.norm_ffn(x)), last


class XLSTM(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, config: XLSTMConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_blocks))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights; gates start from their bias alone."""
        d, blocks = self.config.d_model, self.config.n_blocks
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=(2 / (5 * d)) ** 0.5)
        nn.init.normal_(self.embed.weight, std=(2 / (5 * d)) ** 0.5)
        for block in self.blocks:
            # Every branch adds to the same residual: smaller with depth.
            nn.init.normal_(block.mlstm.out.weight, std=2 / (blocks * d**0.5))
            nn.init.normal_(block.ffn.down.weight, std=2 / (blocks * d**0.5))
            for gate in (block.mlstm.input_gate, block.mlstm.forget_gate):
                nn.init.zeros_(gate.weight)
            nn.init.constant_(block.mlstm.input_gate.bias, self.config.input_gate_bias)
            first, last = self.config.forget_gate_bias
            with torch.no_grad():
                block.mlstm.forget_gate.bias.copy_(torch.linspace(first, last, self.config.n_heads))

    def forward(
        self, tokens: Tensor, state: State | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, State]:
        """Logits (B, S, vocab) of the byte after each of `tokens` (B, S).

        `state` continues an earlier call; with `return_state` the result is `(logits, state)`.
        """
        x = self.embed(tokens)
        states: State = []
        for index, block in enumerate(self.blocks):
            x, last = block(x, state[index] if state else None, return_state)
            states.append(last)
        logits = soft_cap(self.head(self.norm(x)).float(), self.config.logit_cap)
        return (logits, states) if return_state else logits
