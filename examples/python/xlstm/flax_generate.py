# SPDX-License-Identifier: MIT OR Apache-2.0
"""Writing text in JAX, and checks that chunkwise, parallel and step give the same numbers."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from mlstm.jax import get_mlstm_kernel, get_mlstm_step_kernel

from .checks import H_TOLERANCE, LOGITS_TOLERANCE, Check
from .flax_model import XLSTM, State


@nnx.jit
def prefill(model: XLSTM, tokens: jax.Array) -> tuple[jax.Array, State]:
    """Read a prompt (B, S) with the chunkwise kernel: logits (B, vocab) of the next byte, state."""
    logits, state = model(tokens, inference=True)
    return logits[:, -1], state


@nnx.jit
def decode(model: XLSTM, tokens: jax.Array, state: State) -> tuple[jax.Array, State]:
    """Read (B, S) byte by byte with the step kernel: logits (B, S, vocab), state. The loop carries
    the state, so that it is updated in place."""

    def step(state: State, token: jax.Array) -> tuple[State, jax.Array]:
        logits, state = model(token[:, None], state, inference=True)
        return state, logits[:, 0]

    state, logits = jax.lax.scan(step, state, tokens.T)
    return logits.swapaxes(0, 1), state


@partial(nnx.jit, static_argnums=(4,))
def write(
    model: XLSTM, logits: jax.Array, state: State, temperature: jax.Array, length: int, key
) -> jax.Array:
    """`length` bytes (length, B) after a prompt that left these logits and this state."""

    def step(carry, key):
        logits, state = carry
        # At temperature 0 the likeliest byte.
        noise = temperature * jax.random.gumbel(key, logits.shape)
        token = (logits + noise).argmax(-1)
        logits, state = model(token[:, None], state, inference=True)
        return (logits[:, 0], state), token

    return jax.lax.scan(step, (logits, state), jax.random.split(key, length))[1]


def generate(
    model: XLSTM, prompt: str, length: int, temperature: float = 0.6, seed: int = 0
) -> str:
    """Continue `prompt` by `length` bytes and return the continuation."""
    logits, state = prefill(model, jnp.array([list(prompt.encode())]))
    tokens = write(model, logits, state, temperature, length, jax.random.key(seed))
    return bytes(tokens[:, 0].tolist()).decode(errors="replace")


def relative_difference(a: jax.Array, b: jax.Array) -> float:
    """max |a - b| / max |b|."""
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


def kernel_inputs(model: XLSTM, tokens: jax.Array) -> list[dict[str, jax.Array]]:
    """The q, k, v, i, f that each block hands to its kernel while the model reads (B, S)."""
    x, inputs = model.embed(tokens), []
    for block in model.blocks:
        inputs.append(block.mlstm.kernel_inputs(block.norm_mlstm(x)))
        x, _ = block(x, None, inference=False)
    return inputs


@jax.jit
def step_through(q, k, v, i, f) -> jax.Array:
    """h (B, NH, S, DHHV) by calling the step kernel once per position."""
    kernel = get_mlstm_step_kernel("step")
    b, nh, _, dhqk = q.shape
    shapes = (b, nh, dhqk, v.shape[-1]), (b, nh, dhqk), (b, nh, 1)
    state = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)

    def step(state, x):
        h, state = kernel(*x, *state)
        return state, h

    tokens = [jnp.moveaxis(x, 2, 0) for x in (q, k, v, i[..., None], f[..., None])]
    return jnp.moveaxis(jax.lax.scan(step, state, tokens)[1], 0, 2)


def check_kernels(model: XLSTM, tokens: jax.Array) -> list[Check]:
    """h of the three kernels on the model's own q, k, v, i, f; the worst block counts."""
    errors: dict[str, list[float]] = {}
    for inputs in kernel_inputs(model, tokens):
        h_step = step_through(**inputs)
        h_chunkwise = get_mlstm_kernel("chunkwise--xl_chunk")(**inputs)
        h_parallel = get_mlstm_kernel("parallel--limit_headdim")(**inputs)
        for name, a, b in (
            ("h: chunkwise = step", h_chunkwise, h_step),
            ("h: parallel = step", h_parallel, h_step),
            ("h: chunkwise = parallel", h_chunkwise, h_parallel),
        ):
            errors.setdefault(name, []).append(relative_difference(a, b))
    # max() may overlook a NaN, an array's maximum does not.
    return [Check(name, float(jnp.array(e).max()), H_TOLERANCE) for name, e in errors.items()]


def check_logits(model: XLSTM, tokens: jax.Array) -> Check:
    """Logits of the whole model, all of (B, S) at once against byte by byte."""
    at_once = model(tokens)
    first, state = prefill(model, tokens[:, :1])
    rest, _ = decode(model, tokens[:, 1:], state)
    byte_by_byte = jnp.concatenate([first[:, None], rest], 1)
    error = relative_difference(byte_by_byte, at_once)
    return Check("logits of the model: chunkwise = byte by byte", error, LOGITS_TOLERANCE)
