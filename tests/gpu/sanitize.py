# SPDX-License-Identifier: MIT OR Apache-2.0
"""A few small calls of every kernel, for compute-sanitizer."""

import mlstm_c
import torch
from cases import Case
from test_step import Step

for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
    for dims in ((64, 64), (37, 130), (256, 320)):
        for flags in (0, mlstm_c.GENERIC_ENGINE) if dtype.itemsize == 2 else (0,):
            sizes = dict(b=1, nh=2, s=150, dhqk=dims[0], dhhv=dims[1])
            case = Case(dtype, **sizes, dm_last=True, flags=flags)
            case.run("cuda", case.inputs())
    case = Case(dtype, b=1, s=130, cu_seqlens=[0, 0, 3, 70, 130], dhqk=64, dhhv=128)
    case.run("cuda", case.inputs())
    if dtype.itemsize == 2:
        # For the H100 and H200: segments, DHQK in halves, and gates of long sequences.
        for s, dhqk in ((2100, 128), (130, 512), (8300, 64)):
            case = Case(dtype, b=1, nh=1, s=s, dhqk=dhqk, dhhv=64)
            case.run("cuda", case.inputs(), backward=False)
    for tokens, width in ((1, 64), (3, 66), (9, 36)):
        Step(dtype, s=tokens, dhhv=width).run("cuda")
torch.cuda.synchronize()
print("ran")
