# SPDX-License-Identifier: MIT OR Apache-2.0
"""Text for a byte-level model: read it, split it, cut windows out of it."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

HELD_OUT_EVERY = 16
"""One document in so many is never trained on."""

_SKIPPED_DIRS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


def python_documentation() -> Iterator[str]:
    """Python's language reference and the docstrings of each standard library module.

    Sources are parsed, not imported: some modules do things when imported.
    """
    yield from topics.values()
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED_DIRS.isdisjoint(path.relative_to(root).parts):
            tree = ast.parse(path.read_bytes())
            owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            found = (ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, owners))
            yield "\n\n".join(doc for doc in found if doc)


def text_file(path: Path, document_bytes: int = 4096) -> Iterator[str]:
    """A text file in pieces of about `document_bytes`, cut between paragraphs."""
    piece: list[str] = []
    size = 0
    for paragraph in path.read_text(encoding="utf-8", errors="replace").split("\n\n"):
        piece.append(paragraph)
        size += len(paragraph)
        if size >= document_bytes:
            yield "\n\n".join(piece)
            piece, size = [], 0
    yield "\n\n".join(piece)


def drop_repeats(documents: Iterator[str]) -> Iterator[str]:
    """Drop paragraphs seen before, so that held-out text is really new to the model."""
    seen: set[str] = set()
    for document in documents:
        fresh = []
        for paragraph in document.split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        if fresh:
            yield "\n\n".join(fresh).strip("\n") + "\n\n"


def load(path: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out text as two uint8 arrays; Python's documentation by default."""
    documents = list(drop_repeats(text_file(path) if path else python_documentation()))

    def join(chosen: list[str]) -> np.ndarray:
        return np.frombuffer("".join(chosen).encode(), dtype=np.uint8)

    if len(documents) <= HELD_OUT_EVERY:
        raise ValueError(f"{path}: {len(documents)} documents, more than {HELD_OUT_EVERY} needed")
    held_out = documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    train = [d for n, d in enumerate(documents) if n % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    return join(train), join(held_out)


def windows(data: np.ndarray, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and next-byte targets, int64 (len(starts), length), beginning at `starts`."""
    rows = data[starts[:, None] + np.arange(length + 1)].astype(np.int64)
    return rows[:, :-1], rows[:, 1:]


def random_windows(
    data: np.ndarray, batch: int, length: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A training batch from random places."""
    return windows(data, generator.integers(len(data) - length, size=batch), length)


def even_windows(data: np.ndarray, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `count` windows without overlap, spread evenly: the same ones at every call."""
    count = min(count, (len(data) - 1) // length)
    starts = np.linspace(0, len(data) - 1 - length, count).astype(np.int64)
    return windows(data, starts, length)
