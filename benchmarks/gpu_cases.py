# SPDX-License-Identifier: MIT OR Apache-2.0
"""What benchmarks/gpu.py times: shapes, peers, and the least time a card can take for them."""

from __future__ import annotations

from dataclasses import dataclass

SHAPES = {  # B, NH, S, DHQK, DHHV
    "7b": (8, 8, 8192, 256, 512),
    "7b_long": (1, 8, 65536, 256, 512),
    "7b_short": (32, 8, 2048, 256, 512),
    "tfla": (8, 16, 8192, 128, 256),
    "small": (16, 8, 4096, 64, 64),
}
# With 7b, 7b_long and 7b_short: time against sequence length at 65536 tokens.
SERIES = {f"7b_s{s}": (65536 // s, 8, s, 256, 512) for s in (4096, 16384, 32768)}
# One sequence, which does not fill the card.
SHORT = {f"one_s{s}": (1, 8, s, 256, 512) for s in (512, 1024, 2048, 4096)}
PARALLEL = {f"parallel_d{d}_s{s}": (1, 8, s, d, d) for d in (64, 128, 256) for s in (1024, 4096)}
STEPS = {f"step_b{b}": (b, 8, 1, 256, 512) for b in (1, 16, 128)}
QUICK = ("7b", "tfla", "small", "parallel_d128_s1024", "step_b1", "step_b128")

LAUNCH_MS = 2e-3  # a kernel that does nothing
FLOOR_CHUNK = 128  # the chunk length that the floor's arithmetic assumes

# Not a peer but ourselves, with the kernels for every GPU where others would be taken.
GENERIC = "generic_engine"
SEQUENCE_PEERS = ("xl_chunk128", "limit_chunk64", "xl_chunk128_siging")
# Those that try many configurations take longest to compile and start first.
TRITON_PEERS = ("fla_simple_gla", "limit_headdim", *SEQUENCE_PEERS, "triton_step")
# What matters most comes first, in case time runs out.
PEERS = ("xl_chunk128", GENERIC, "triton_step", "limit_headdim", "sdpa", "limit_chunk64")
PEERS += ("xl_chunk128_siging", "fla_simple_gla")
QUICK_PEERS = ("xl_chunk128", GENERIC, "triton_step")


@dataclass(frozen=True)
class Case:
    """One shape done one way: "fw", "fw+bw", or a step: "eager", "graph", "graph in place"."""

    shape_name: str
    kind: str

    @property
    def shape(self) -> tuple[int, ...]:
        return (SHAPES | SERIES | SHORT | PARALLEL | STEPS)[self.shape_name]

    @property
    def name(self) -> str:
        return f"{self.shape_name} {self.kind}"

    @property
    def is_step(self) -> bool:
        return self.shape_name in STEPS

    def peers(self) -> tuple[str, ...]:
        """The peers that do what this case does."""
        if self.is_step:
            return ("triton_step",)
        if self.shape_name in PARALLEL:
            return (GENERIC, "limit_headdim")
        if self.shape_name in SERIES:
            return (GENERIC, "xl_chunk128", "sdpa")
        if self.shape_name in SHORT:
            return (GENERIC, "xl_chunk128")
        peers = (GENERIC, *SEQUENCE_PEERS)
        if self.kind == "fw":  # flash-linear-attention refuses its backward on Triton 3.6
            peers += ("fla_simple_gla",)
        return peers + ("sdpa",) if self.shape_name.startswith("7b") else peers

    def floor_ms(self, copy_gbs: float, matmul_tflops: float) -> float:
        """The larger of bytes over copy bandwidth and operations over matmul rate.

        Bytes: every input read and every output written once (the state of a step, read and
        written). Operations: the chunkwise algorithm at FLOOR_CHUNK with causal skipping; the
        backward computes the states and the scores again.
        """
        b, nh, s, dhqk, dhhv = self.shape
        if self.is_step:
            return max(LAUNCH_MS, 2 * 4 * b * nh * dhqk * dhhv / copy_gbs / 1e6)
        # (elements of 2 bytes, multiply-adds) per token: q, k, v, h; and q, k, v, h, dh, dq, dk, dv
        inter, pairs = dhqk * dhhv, FLOOR_CHUNK / 2
        parts = [(2 * dhqk + 2 * dhhv, 2 * inter + pairs * (dhqk + dhhv))]
        if self.kind == "fw+bw":
            parts.append((4 * dhqk + 4 * dhhv, 5 * inter + pairs * (3 * dhqk + 2 * dhhv)))
        tokens = b * nh * s
        bounds = (
            max(2 * size * tokens / copy_gbs / 1e6, 2 * work * tokens / matmul_tflops / 1e9)
            for size, work in parts
        )
        return max(LAUNCH_MS, sum(bounds))


def all_cases(quick: bool) -> list[Case]:
    """The cases of a run, largest family first."""
    sequences = SHAPES | PARALLEL if quick else SHAPES | SERIES | SHORT | PARALLEL
    cases = [Case(name, kind) for name in sequences for kind in ("fw", "fw+bw")]
    cases += [Case(name, kind) for name in STEPS for kind in ("eager", "graph", "graph in place")]
    return [case for case in cases if case.shape_name in QUICK] if quick else cases
