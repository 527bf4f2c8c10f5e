# SPDX-License-Identifier: MIT OR Apache-2.0
"""Relative Frobenius errors against float64 at B1 NH4 S2048 128x256, in both gate regimes."""

import sys

import torch
from cases import Case, error

NAMES = ("h", "dq", "dk", "dv", "di", "df")
print("| dtype | i bias | " + " | ".join(NAMES) + " |")
worst = {}
for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
    for bias in (-1.0, -10.0):
        sizes = dict(b=1, nh=4, s=2048, dhqk=128, dhhv=256)
        case = Case(dtype, **sizes, i_bias=bias, f_bias=3.0, initial=False, last=False)
        inputs = case.inputs()
        got, wanted = case.run("cuda", inputs), case.run("cpu", inputs, exact=True)
        errors = [error(got[name], wanted[name]) for name in NAMES]
        print(f"| {dtype} | {bias} | " + " | ".join(f"{e:.2e}" for e in errors) + " |")
        worst[dtype, bias] = max(errors)
sys.exit(worst[torch.float32, -1.0] > 1e-5)
