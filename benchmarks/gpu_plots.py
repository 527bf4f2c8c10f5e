# SPDX-License-Identifier: MIT OR Apache-2.0
"""Plots of what benchmarks/gpu.py measured; from a saved file: python gpu_plots.py FILE DIR."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt  # noqa: E402
from gpu_cases import GENERIC, SERIES, SHAPES  # noqa: E402


def label_of(row) -> str:
    """A peer's name in the plots."""
    name = "mlstm, generic engine" if row["peer"] == GENERIC else row["peer"]
    return name if row["gates"] == "float32" else f"{name}, {row['gates']} gates"


def by_sequence_length(rows, machine, path):
    """Time against sequence length at 65536 tokens."""
    names = {name for name in SHAPES if name.startswith("7b")} | set(SERIES)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5))
    for kind, axes in zip(("fw", "fw+bw"), panels, strict=True):
        lines: dict[str, list] = {}
        for row in rows:
            if row["shape_name"] not in names or row["kind"] != kind or "failed" in row:
                continue
            if row["gates"] != "float32":
                continue
            ours, *theirs = row["ms"]
            s = row["shape"][2]
            if row["peer"]:
                lines.setdefault(label_of(row), []).append((s, theirs[0]))
            else:
                lines.setdefault("mlstm", []).append((s, ours))
                lines.setdefault("floor", []).append((s, row["floor_ms"]))
        for label, points in lines.items():
            style = {"mlstm": "o-", "floor": "k:"}.get(label, "s--")
            width = 2.5 if label == "mlstm" else 1.2
            axes.plot(*zip(*sorted(points), strict=True), style, label=label, linewidth=width)
        axes.set(xscale="log", yscale="log", xlabel="sequence length", ylabel="ms")
        axes.set_xscale("log", base=2)
        axes.set_title(f"{kind}, 65536 tokens, 8 heads 256x512, bfloat16")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    save(figure, machine, path)


def bars(rows, machine, path):
    """How many times longer each peer takes than we do, for each case."""
    done = [row for row in rows if row["peer"] and "failed" not in row]
    labels = [f"{row['shape_name']} {row['kind']}: {label_of(row)}" for row in done]
    ratios = [row["ms"][1] / row["ms"][0] for row in done]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.2 * len(done)))
    colors = ["tab:green" if ratio >= 1 else "tab:red" for ratio in ratios]
    axes.barh(labels, ratios, color=colors)
    for index, ratio in enumerate(ratios):
        axes.text(ratio, index, f" {ratio:.2f}", va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="time of the peer / time of mlstm")
    axes.tick_params(axis="y", labelsize=7)
    axes.set_ylim(len(done) - 0.5, -0.5)
    save(figure, machine, path)


def save(figure, machine, path):
    figure.suptitle(f"{machine['gpu']}, {machine['date']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"saved {path}")


def draw(rows, machine, folder: Path, prefix: str) -> None:
    """Draws all plots into a folder."""
    if any(row["shape_name"].startswith("7b") for row in rows):
        by_sequence_length(rows, machine, folder / f"{prefix}-length.png")
    if any(row["peer"] and "failed" not in row for row in rows):
        bars(rows, machine, folder / f"{prefix}-peers.png")


if __name__ == "__main__":
    saved = json.loads(Path(sys.argv[1]).read_text())
    draw(saved["rows"], saved["machine"], Path(sys.argv[2]), Path(sys.argv[1]).stem)
