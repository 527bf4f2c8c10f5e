# SPDX-License-Identifier: MIT OR Apache-2.0
"""A training step, compiled, is one command buffer (CUDA graph) of XLA, with the same results."""

import os
import re
import subprocess
import sys

import pytest

# Prints a digest of the parameters after some steps, with allocations in between.
TRAINING = """
import hashlib
import jax, jax.numpy as jnp, numpy as np
from mlstm.jax.chunkwise import mlstm_chunkwise__xl_chunk

b, nh, s, d = 4, 4, 512, 64
keys = jax.random.split(jax.random.key(0), 6)
x = jax.random.normal(keys[0], (b, s, nh * d))
parameters = {n: jax.random.normal(k, (nh * d, nh * d)) / 16 for n, k in zip("qkvo", keys[1:])}
parameters["gates"] = jax.random.normal(keys[5], (nh * d, 2 * nh)) / 16

def loss(p):
    heads = lambda y: y.reshape(b, s, nh, -1).swapaxes(1, 2)
    q, k, v = (heads(x @ p[n]).astype(jnp.bfloat16) for n in "qkv")
    i, f = jnp.moveaxis(heads(x @ p["gates"]), 3, 0)
    h = mlstm_chunkwise__xl_chunk(q, k, v, i - 3, f + 3).astype(jnp.float32)
    return ((h.swapaxes(1, 2).reshape(x.shape) @ p["o"] - jnp.roll(x, 1, 1)) ** 2).mean()

@jax.jit(donate_argnums=0)
def train_step(p):
    value, gradient = jax.value_and_grad(loss)(p)
    return jax.tree.map(lambda a, b: a - 0.1 * b, p, gradient), value

kept = []
for step in range(12):
    parameters, value = train_step(parameters)
    kept.append(jnp.full(1 << 20, float(value)))
assert float(kept[-1][0]) < float(kept[0][0])
data = [np.asarray(x).tobytes() for x in jax.tree.leaves(parameters)]
print(hashlib.sha1(b"".join(data)).hexdigest())
"""


@pytest.mark.gpu
def test_training_step_is_one_command_buffer(device, tmp_path):
    if device == "cpu":
        pytest.skip("command buffers are for GPUs")

    def train(flags, dump):
        # Tuned by the clock, matrix products may sum in another order in another process.
        flags += " --xla_gpu_autotune_level=0"
        flags += f" --xla_dump_to={dump} --xla_dump_hlo_module_re=.*train_step.*"
        run = subprocess.run(
            [sys.executable, "-c", TRAINING],
            env=os.environ | {"XLA_FLAGS": flags},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stderr
        sequences = [*dump.glob("*train_step*thunk_sequence*")]
        assert sequences, "XLA wrote no sequence of thunks"
        return run.stdout.split()[-1], "".join(path.read_text() for path in sequences)

    digest, thunks = train("", tmp_path / "default")
    # What is inside of the buffer is indented.
    assert len(re.findall(r"^\s+\d+: kCustomCall", thunks, re.MULTILINE)) == 2
    without, thunks = train("--xla_gpu_enable_command_buffer=", tmp_path / "without")
    assert "kCommandBuffer" not in thunks
    assert digest == without
