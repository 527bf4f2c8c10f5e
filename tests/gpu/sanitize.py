# SPDX-License-Identifier: MIT OR Apache-2.0
"""A few small calls of every kernel, for compute-sanitizer; with --generic, of the kernels for
every GPU alone."""

import sys

import mlstm_c
import torch
from cases import Case
from test_step import Step

flags = mlstm_c.GENERIC_ENGINE if "--generic" in sys.argv else 0

for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
    for dims in ((64, 64), (37, 130), (256, 320)):
        case = Case(dtype, b=1, nh=2, s=150, dhqk=dims[0], dhhv=dims[1], dm_last=True, flags=flags)
        case.run("cuda", case.inputs())
    case = Case(dtype, b=1, s=130, cu_seqlens=[0, 0, 3, 70, 130], dhqk=64, dhhv=128, flags=flags)
    case.run("cuda", case.inputs())
    if dtype.itemsize == 2 and not flags:
        # Segments, and DHQK in halves: kernels for the H100 and H200.
        for s, dhqk in ((2100, 128), (130, 512)):
            case = Case(dtype, b=1, nh=1, s=s, dhqk=dhqk, dhhv=64)
            case.run("cuda", case.inputs(), backward=False)
    for tokens, width in ((1, 64), (3, 66), (9, 36)):
        Step(dtype, s=tokens, dhhv=width).run("cuda")
torch.cuda.synchronize()
print("ran")
