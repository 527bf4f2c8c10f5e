# SPDX-License-Identifier: MIT OR Apache-2.0
"""The demo in JAX: the PyTorch model with the same weights says the same."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "python"
sys.path.insert(0, str(EXAMPLES))

from xlstm import XLSTMConfig, flax_model, model  # noqa: E402
from xlstm.flax_generate import check_kernels, check_logits, generate  # noqa: E402
from xlstm.flax_train import bits_per_byte  # noqa: E402
from xlstm.train import bits_per_byte as torch_bits_per_byte  # noqa: E402

CONFIG = XLSTMConfig(d_model=64, n_blocks=2, n_heads=2, chunk_size=16)


@pytest.fixture
def ours(rng):
    """A small model whose gates depend on the text, but so little that denominators stay at their
    floor: next to zero they would magnify every rounding."""
    result = flax_model.XLSTM(CONFIG, nnx.Rngs(int(rng.integers(2**31))))
    for block in result.blocks:
        for gate in (block.mlstm.input_gate, block.mlstm.forget_gate):
            gate.kernel[...] = jnp.asarray(0.1 * rng.standard_normal((64, 2)), jnp.float32)
    return result


@pytest.fixture
def tokens(rng):
    return jnp.asarray(rng.integers(0, 256, (2, 48)))


def in_torch(ours):
    """The PyTorch model with these weights: the same parameters in the same order but for names."""
    theirs = model.XLSTM(CONFIG)

    def copy(target, source, transposed=False):
        x = np.array(source[...])
        target.data = torch.from_numpy(x.T.copy() if transposed else x)

    def copy_linear(target, source):
        copy(target.weight, source.kernel, transposed=True)
        if target.bias is not None:
            copy(target.bias, source.bias)

    copy(theirs.embed.weight, ours.embed.embedding)
    copy(theirs.norm.weight, ours.norm.scale)
    copy_linear(theirs.head, ours.head)
    for target, source in zip(theirs.blocks, ours.blocks, strict=True):
        copy(target.norm_mlstm.weight, source.norm_mlstm.scale)
        copy(target.norm_ffn.weight, source.norm_ffn.scale)
        copy(target.mlstm.norm.weight, source.mlstm.norm_weight)
        for name in ("q", "k", "v", "input_gate", "forget_gate", "output_gate", "out"):
            copy_linear(getattr(target.mlstm, name), getattr(source.mlstm, name))
        for name in ("gate", "up", "down"):
            copy_linear(getattr(target.ffn, name), getattr(source.ffn, name))
    return theirs


def test_same_logits_and_gradients_as_in_torch(ours, tokens):
    theirs = in_torch(ours)
    assert sum(p.numel() for p in theirs.parameters()) == sum(
        x.size for x in jax.tree.leaves(nnx.state(ours, nnx.Param))
    )
    x = torch.from_numpy(np.array(tokens))
    np.testing.assert_allclose(ours(tokens), theirs(x).detach(), rtol=1e-4, atol=1e-4)
    gradient = nnx.grad(bits_per_byte)(ours, tokens, jnp.roll(tokens, -1, 1))
    torch_bits_per_byte(theirs, x, x.roll(-1, 1)).backward()
    wanted = theirs.embed.weight.grad
    np.testing.assert_allclose(gradient.embed.embedding[...], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("length", [2, 16, 31, 48])
def test_kernels_agree(length, ours, tokens):
    for check in [*check_kernels(ours, tokens), check_logits(ours, tokens[:, :length])]:
        assert check.passed, check


def test_generation_repeats(ours):
    text = generate(ours, "def ", 20, temperature=1.0, seed=3)
    assert text == generate(ours, "def ", 20, temperature=1.0, seed=3)
    assert text != generate(ours, "def ", 20, temperature=1.0, seed=4)
    assert generate(ours, "def ", 20, 0) == generate(ours, "def ", 20, 0, seed=9)


@pytest.mark.slow
def test_demo_runs(tmp_path):
    command = [sys.executable, EXAMPLES / "demo_jax.py", "--out", "results", "--steps", "10"]
    command += "--minutes 0.2 --batch 2 --seq-len 64 --d-model 64 --blocks 2 --heads 2".split()
    run = subprocess.run(
        [*map(str, command), "--length", "20"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("pass") == 5
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["history"]["held_out"][-1][1] < results["history"]["held_out"][0][1]
    assert all(rate > 0 for rate in results["bytes_per_second"].values())
