# SPDX-License-Identifier: MIT OR Apache-2.0
"""The model of `model.py` in Flax (nnx), on `mlstm.jax`.

Shapes: B batch, S sequence, D model width, NH heads, DHQK and DHHV head widths.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mlstm.jax.backend_module import mLSTMBackend, mLSTMBackendConfig

from .config import XLSTMConfig

LayerState = tuple[jax.Array, jax.Array, jax.Array]
"""What one layer remembers: c (B, NH, DHQK, DHHV), n (B, NH, DHQK), m (B, NH, 1)."""

State = list[LayerState]
"""What the model remembers: one `LayerState` per block."""


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """Squash `x` into (-cap, cap), leaving small values as they are."""
    return cap * jnp.tanh(x / cap)


def linear(inputs: int, outputs: int, std: float, rngs: nnx.Rngs) -> nnx.Linear:
    """A matrix with normal weights."""
    init = nnx.initializers.normal(std)
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, rngs=rngs)


def gate(config: XLSTMConfig, bias: tuple[float, float], rngs: nnx.Rngs) -> nnx.Linear:
    """A gate per head that starts from its bias alone, given for the first and the last head."""
    return nnx.Linear(
        config.d_model,
        config.n_heads,
        kernel_init=nnx.initializers.zeros,
        bias_init=lambda _key, shape, dtype: jnp.linspace(*bias, *shape, dtype=dtype),
        rngs=rngs,
    )


class MLSTMLayer(nnx.Module):
    """Projections and gates around the mLSTM kernels: with a state to hand on, the backend takes
    whatever fits, the chunkwise kernel for a prompt, the step kernel for a single byte."""

    def __init__(self, config: XLSTMConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        d, heads = config.d_model, config.n_heads
        std = (2 / (5 * d)) ** 0.5
        self.q = linear(d, heads * config.qk_head_dim, std, rngs)
        self.k = linear(d, heads * config.qk_head_dim, std, rngs)
        self.v = linear(d, heads * config.v_head_dim, std, rngs)
        self.input_gate = gate(config, (config.input_gate_bias,) * 2, rngs)
        self.forget_gate = gate(config, config.forget_gate_bias, rngs)
        self.output_gate = linear(d, d, std, rngs)
        # Every branch adds to the same residual: smaller with depth.
        self.out = linear(d, d, 2 / (config.n_blocks * d**0.5), rngs)
        self.norm_weight = nnx.Param(jnp.ones(heads * config.v_head_dim, jnp.float32))
        self.backend = mLSTMBackend(
            mLSTMBackendConfig(
                chunk_size=config.chunk_size, return_last_states=False, layout="BSHD"
            )
        )

    def kernel_inputs(self, x: jax.Array) -> dict[str, jax.Array]:
        """q, k (B, NH, S, DHQK), v (B, NH, S, DHHV), i, f (B, NH, S) of (B, S, D)."""

        def split_heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], self.config.n_heads, -1).swapaxes(1, 2)

        cap = self.config.gate_cap
        return {
            "q": split_heads(self.q(x)),
            "k": split_heads(self.k(x)),
            "v": split_heads(self.v(x)),
            "i": soft_cap(self.input_gate(x), cap).swapaxes(1, 2),
            "f": soft_cap(self.forget_gate(x), cap).swapaxes(1, 2),
        }

    def __call__(
        self, x: jax.Array, state: LayerState | None, inference: bool
    ) -> tuple[jax.Array, LayerState | None]:
        """(B, S, D) -> (B, S, D) and, in inference, the state after the last byte."""
        result = self.backend(
            **self.kernel_inputs(x),
            **dict(zip(("c_initial", "n_initial", "m_initial"), state or (), strict=False)),
            mode="inference" if inference else "train",
        )
        h, last = result if inference else (result, None)
        # Each head by itself, so that heads of any magnitude weigh the same.
        h = h.swapaxes(1, 2).astype(jnp.float32)
        h = jax.nn.standardize(h, axis=-1, epsilon=self.config.norm_eps)
        h = h.reshape(x.shape) * self.norm_weight[...]
        return self.out(h * jax.nn.sigmoid(self.output_gate(x))), last


class FeedForward(nnx.Module):
    """Gated feed-forward (SwiGLU)."""

    def __init__(self, config: XLSTMConfig, rngs: nnx.Rngs) -> None:
        d, std = config.d_model, (2 / (5 * config.d_model)) ** 0.5
        self.gate = linear(d, config.d_ffn, std, rngs)
        self.up = linear(d, config.d_ffn, std, rngs)
        self.down = linear(config.d_ffn, d, 2 / (config.n_blocks * d**0.5), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, S, D) -> (B, S, D)."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One mLSTM layer and one feed-forward, each pre-normed and residual."""

    def __init__(self, config: XLSTMConfig, rngs: nnx.Rngs) -> None:
        self.norm_mlstm = nnx.RMSNorm(config.d_model, epsilon=config.norm_eps, rngs=rngs)
        self.mlstm = MLSTMLayer(config, rngs)
        self.norm_ffn = nnx.RMSNorm(config.d_model, epsilon=config.norm_eps, rngs=rngs)
        self.ffn = FeedForward(config, rngs)

    def __call__(
        self, x: jax.Array, state: LayerState | None, inference: bool
    ) -> tuple[jax.Array, LayerState | None]:
        """(B, S, D) -> (B, S, D) and, in inference, the layer's state."""
        y, last = self.mlstm(self.norm_mlstm(x), state, inference)
        x = x + y
        return x + self.ffn(self.norm_ffn(x)), last


class XLSTM(nnx.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, config: XLSTMConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        d, std = config.d_model, (2 / (5 * config.d_model)) ** 0.5
        init = nnx.initializers.normal(std)
        self.embed = nnx.Embed(config.vocab_size, d, embedding_init=init, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.n_blocks)])
        self.norm = nnx.RMSNorm(d, epsilon=config.norm_eps, rngs=rngs)
        self.head = linear(d, config.vocab_size, std, rngs)

    def __call__(
        self, tokens: jax.Array, state: State | None = None, inference: bool = False
    ) -> jax.Array | tuple[jax.Array, State]:
        """Logits (B, S, vocab) of the byte after each of `tokens` (B, S); in inference
        `(logits, state)`, where `state` continues an earlier call."""
        x = self.embed(tokens)
        states: State = []
        for index, block in enumerate(self.blocks):
            x, last = block(x, state[index] if state else None, inference)
            states.append(last)
        logits = soft_cap(self.head(self.norm(x)).astype(jnp.float32), self.config.logit_cap)
        return (logits, states) if inference else logits
