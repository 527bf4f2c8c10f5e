# SPDX-License-Identifier: MIT OR Apache-2.0
"""The training step in JAX."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import numpy as np
import optax
from flax import nnx

from .config import TrainConfig
from .flax_model import XLSTM
from .training import History, run


def bits_per_byte(model: XLSTM, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross-entropy of (B, S) targets in bits; 8 is knowing nothing."""
    losses = optax.softmax_cross_entropy_with_integer_labels(model(inputs), targets)
    return losses.mean() / math.log(2)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW without its learning rate; only matrices decay."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(
            config.weight_decay, mask=lambda tree: jax.tree.map(lambda x: x.ndim >= 2, tree)
        ),
    )


def train(
    model: XLSTM,
    train_data: np.ndarray,
    held_out: np.ndarray,
    config: TrainConfig,
    say: Callable[[str], None] = print,
) -> History:
    """Train `model` in place until the steps or the minutes are used up."""
    optimizer = make_optimizer(config)
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    moments = optimizer.init(parameters)

    def loss_of(parameters: nnx.State, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        return bits_per_byte(nnx.merge(graph, parameters, rest), inputs, targets)

    # Donated: parameters and moments are updated in place.
    @jax.jit(donate_argnums=(0, 1))
    def update(parameters, moments, inputs, targets, rate):
        loss, gradient = jax.value_and_grad(loss_of)(parameters, inputs, targets)
        change, moments = optimizer.update(gradient, moments, parameters)
        parameters = jax.tree.map(lambda p, x: p - rate * x, parameters, change)
        return parameters, moments, loss

    measure = jax.jit(loss_of)

    def train_step(inputs: np.ndarray, targets: np.ndarray, rate: float) -> float:
        nonlocal parameters, moments
        parameters, moments, loss = update(parameters, moments, inputs, targets, rate)
        return float(loss)

    def loss(inputs: np.ndarray, targets: np.ndarray) -> float:
        return float(measure(parameters, inputs, targets))

    history = run(train_step, loss, train_data, held_out, config, say)
    nnx.update(model, parameters)
    return history
