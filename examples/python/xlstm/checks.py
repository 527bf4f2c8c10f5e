# SPDX-License-Identifier: MIT OR Apache-2.0
"""What counts as agreement."""

from __future__ import annotations

from dataclasses import dataclass

H_TOLERANCE = 1e-4
LOGITS_TOLERANCE = 1e-3
"""Looser: differences of float32 rounding pass through every block."""


@dataclass(frozen=True)
class Check:
    """One comparison: the largest difference, relative to the largest value."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        verdict = "pass" if self.passed else "FAIL"
        return f"{verdict}  {self.name:<50} {self.error:.1e} (limit {self.tolerance:.0e})"
