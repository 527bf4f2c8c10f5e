# SPDX-License-Identifier: MIT OR Apache-2.0
"""The demo and its model: what newcomers run first must work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("mlstm.torch")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "python"
sys.path.insert(0, str(EXAMPLES))

import demo  # noqa: E402
from xlstm import TrainConfig, XLSTMConfig  # noqa: E402
from xlstm.agreement import check_kernels, check_logits, relative_difference  # noqa: E402
from xlstm.checks import Check  # noqa: E402
from xlstm.data import drop_repeats, even_windows, load, random_windows  # noqa: E402
from xlstm.generate import generate, prefill, step  # noqa: E402
from xlstm.model import XLSTM  # noqa: E402
from xlstm.training import learning_rate, progress_of  # noqa: E402

CONFIG = XLSTMConfig(d_model=64, n_blocks=2, n_heads=2, chunk_size=16)


@pytest.fixture
def model() -> XLSTM:
    """A small model whose gates depend on the text, as after training."""
    torch.manual_seed(0)
    model = XLSTM(CONFIG)
    for block in model.blocks:
        torch.nn.init.normal_(block.mlstm.input_gate.weight)
        torch.nn.init.normal_(block.mlstm.input_gate.bias)
        torch.nn.init.normal_(block.mlstm.forget_gate.weight)
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    """(2, 48): a multiple of the chunk length."""
    return torch.randint(256, (2, 48), generator=torch.Generator().manual_seed(1))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Relative to the largest value: sums of large terms leave small ones with its error."""
    assert relative_difference(a, b) < 2e-5


def test_initial_gates_follow_the_paper() -> None:
    for block in XLSTM(CONFIG).blocks:
        assert block.mlstm.input_gate.bias.tolist() == [-10.0, -10.0]
        assert block.mlstm.forget_gate.bias.tolist() == [3.0, 6.0]
        assert block.mlstm.input_gate.weight.count_nonzero() == 0


def test_untrained_model_knows_nothing(model: XLSTM, tokens: torch.Tensor) -> None:
    logits = model(tokens)
    assert logits.shape == (2, 48, 256)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())
    assert loss.item() == pytest.approx(torch.log(torch.tensor(256.0)).item(), rel=0.1)


def test_the_future_is_not_seen(model: XLSTM, tokens: torch.Tensor) -> None:
    changed = tokens.clone()
    changed[:, 30:] = (changed[:, 30:] + 1) % 256
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.allclose(before[:, 30:], after[:, 30:])


@pytest.mark.parametrize("length", [1, 5, 16, 31, 48])
def test_byte_by_byte_is_the_full_forward(model: XLSTM, tokens: torch.Tensor, length: int) -> None:
    check = check_logits(model, tokens[:, :length])
    assert check.passed, check


@pytest.mark.parametrize("training", [True, False])
def test_state_carries_across_segments(model: XLSTM, tokens: torch.Tensor, training: bool) -> None:
    model.train(training)
    whole, state_whole = model(tokens, return_state=True)
    first, state = model(tokens[:, :32], return_state=True)
    second, state = model(tokens[:, 32:], state, return_state=True)
    close(torch.cat([first, second], dim=1), whole)
    for one, other in zip(state, state_whole, strict=True):
        (c, n, m), (c_whole, n_whole, m_whole) = one, other
        # The same memory whatever the stabiliser m it is written with.
        close(c * m[..., None].exp(), c_whole * m_whole[..., None].exp())
        close(n * m.exp(), n_whole * m_whole.exp())


def test_prefill_then_step(model: XLSTM, tokens: torch.Tensor) -> None:
    whole = model.eval()(tokens)
    logits, state = prefill(model, tokens[:, :21])
    close(logits, whole[:, 20])
    logits, state = step(model, tokens[:, 21], state)
    close(logits, whole[:, 21])


def test_every_parameter_learns(model: XLSTM, tokens: torch.Tensor) -> None:
    model.train()(tokens).logsumexp(-1).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name


def test_kernels_agree(model: XLSTM, tokens: torch.Tensor) -> None:
    checks = check_kernels(model, tokens)
    assert len(checks) == 3
    for check in checks:
        assert check.passed, check


def test_a_check_can_fail() -> None:
    assert Check("", 1e-5, 1e-4).passed
    assert not Check("", 1e-3, 1e-4).passed
    assert not Check("", float("nan"), 1e-4).passed


def test_generation_repeats(model: XLSTM) -> None:
    text = generate(model, "def ", 20, temperature=1.0, seed=3)
    assert text == generate(model, "def ", 20, temperature=1.0, seed=3)
    assert text != generate(model, "def ", 20, temperature=1.0, seed=4)
    greedy = generate(model, "def ", 20, temperature=0)
    assert greedy == generate(model, "def ", 20, temperature=0, seed=9)


def test_held_out_text_is_new(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    paragraphs = [f"{n % 700} is a number among others. " * 40 for n in range(1000)]
    path.write_text("\n\n".join(paragraphs))
    train, held_out = (bytes(part.tolist()).decode() for part in load(path))
    seen = set(train.split("\n\n"))
    new = [p for p in held_out.split("\n\n") if p]
    assert new
    assert seen.isdisjoint(new)


def test_too_little_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Not much.")
    with pytest.raises(ValueError, match="documents"):
        load(path)


def test_repeats_are_dropped() -> None:
    assert list(drop_repeats(iter(["a\n\nb", "b\n\nc  d", "c d"]))) == ["a\n\nb\n\n", "c  d\n\n"]


def test_windows_are_shifted_by_one() -> None:
    data = np.arange(200, dtype=np.uint8)
    for x, y in (
        random_windows(data, 4, 16, np.random.default_rng(0)),
        even_windows(data, 4, 16),
    ):
        assert x.shape == y.shape == (4, 16)
        assert np.array_equal(x + 1, y)


def test_schedule_follows_the_smaller_budget() -> None:
    config = TrainConfig(steps=100, minutes=1)
    assert progress_of(50, seconds=30.5, config=config) == 0.5  # within time: steps alone
    assert progress_of(10, seconds=30, config=config) == 0.5  # slow: time decides
    assert progress_of(99, seconds=60, config=config) == 1.0
    assert progress_of(100, seconds=10, config=config) == 1.0
    assert learning_rate(0.0, config) < learning_rate(0.05, config) == pytest.approx(config.lr)
    assert learning_rate(1.0, config) == pytest.approx(0.02 * config.lr)


def test_demo_falls_back_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel for this GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", refuse)
    assert demo.pick_device("auto", CONFIG).type == "cpu"
    assert "no kernel for this GPU" in capsys.readouterr().out
    with pytest.raises(RuntimeError):
        demo.pick_device("cuda", CONFIG)


@pytest.mark.slow
def test_demo_runs(tmp_path: Path) -> None:
    # One thread: many wait for each other on a busy machine.
    command = [sys.executable, EXAMPLES / "demo.py", "--device", "cpu", "--threads", "1"]
    command += ["--out", "results", "--steps", "10", "--minutes", "0.2", "--batch", "2"]
    command += ["--seq-len", "64", "--d-model", "64", "--blocks", "2", "--heads", "2"]
    command += ["--length", "20"]
    run = subprocess.run(
        [str(part) for part in command],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("pass") == 5
    assert "FAIL" not in run.stdout

    assert (tmp_path / "results" / "loss.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    history = results["history"]
    assert history["train"][-1] < history["train"][0]
    assert history["held_out"][0][0] == 0
    assert history["held_out"][-1][0] == len(history["train"])
    assert history["held_out"][-1][1] < history["held_out"][0][1]
    assert all(check["passed"] for check in results["agreement"])
    assert all(rate > 0 for rate in results["bytes_per_second"].values())
    assert len(results["sample"]["text"]) > 0
