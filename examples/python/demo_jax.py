# SPDX-License-Identifier: MIT OR Apache-2.0
"""Train a small xLSTM in JAX on real text, let it write, check that the kernels agree.

    python examples/python/demo_jax.py                  # Python's own documentation
    python examples/python/demo_jax.py --text book.txt  # your text

The model and the data of `demo.py`, on jax's default device. Writes a loss curve and all numbers to
./demo_out and exits non-zero if anything disagrees.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from xlstm import TrainConfig, XLSTMConfig, session
from xlstm.checks import Check
from xlstm.flax_generate import check_kernels, check_logits, decode, generate, prefill
from xlstm.flax_model import XLSTM
from xlstm.flax_train import train
from xlstm.training import History


class FlaxSubject:
    """The model in JAX."""

    def __init__(self, config: XLSTMConfig, seed: int) -> None:
        self.model = XLSTM(config, nnx.Rngs(seed))
        leaves = jax.tree.leaves(nnx.state(self.model, nnx.Param))
        self.parameters = sum(x.size for x in leaves)
        self.where = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"

    def train(self, train_data: np.ndarray, held_out: np.ndarray, config: TrainConfig) -> History:
        return train(self.model, train_data, held_out, config)

    def generate(self, prompt: str, length: int, temperature: float, seed: int) -> str:
        return generate(self.model, prompt, length, temperature, seed)

    def throughput(self, prompt: np.ndarray) -> dict[str, float]:
        tokens = jnp.asarray(prompt)[None]
        _, state = prefill(self.model, tokens)

        def seconds(run: Callable[[], object]) -> float:
            jax.block_until_ready(run())  # warm-up
            start = time.perf_counter()
            jax.block_until_ready(run())
            return time.perf_counter() - start

        return {
            "prefill": tokens.size / seconds(lambda: prefill(self.model, tokens)),
            "decode": 256 / seconds(lambda: decode(self.model, tokens[:, :256], state)),
        }

    def check(self, tokens: np.ndarray) -> list[Check]:
        some = jnp.asarray(tokens)
        return [*check_kernels(self.model, some), check_logits(self.model, some[:, :250])]


def main(argv: list[str] | None = None) -> int:
    """Run the demo; 0 if the held-out loss fell and all kernels agree."""
    args = session.parser(__doc__.split("\n\n")[0]).parse_args(argv)
    return session.run(args, FlaxSubject(session.model_config(args), args.seed))


if __name__ == "__main__":
    sys.exit(main())
