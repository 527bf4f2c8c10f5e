# SPDX-License-Identifier: MIT OR Apache-2.0
"""A few small calls of every kernel, for compute-sanitizer."""

import mlstm_c
import torch
from cases import Case
from test_step import Step

for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
    for flags in (0, mlstm_c.GENERIC_ENGINE) if dtype.itemsize == 2 else (0,):
        for dims in ((64, 64), (37, 130), (256, 320)):
            sizes = dict(b=1, nh=2, s=150, dhqk=dims[0], dhhv=dims[1])
            case = Case(dtype, **sizes, dm_last=True, flags=flags)
            case.run("cuda", case.inputs())
        offsets = [0, 0, 3, 70, 130]
        case = Case(dtype, b=1, s=130, cu_seqlens=offsets, dhqk=64, dhhv=128, flags=flags)
        case.run("cuda", case.inputs())
        if dtype.itemsize == 2 and not flags:
            # Parts that catch up, DHQK in halves, DHHV in parts, segments, gates of long sequences.
            sizes = [(2100, 128, 64), (700, 256, 128), (1100, 512, 64), (2100, 64, 1088)]
            for s, *dims in [*sizes, (8300, 64, 64)]:
                case = Case(dtype, b=1, nh=1, s=s, dhqk=dims[0], dhhv=dims[1])
                case.run("cuda", case.inputs(), backward=s < 8000)
    for tokens, width in ((1, 64), (3, 66), (9, 36)):
        Step(dtype, s=tokens, dhhv=width).run("cuda")
torch.cuda.synchronize()
print("ran")
