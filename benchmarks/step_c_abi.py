"""`mlstm_step` as an inference engine calls it: through the C ABI, arguments filled in once."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from mlstm._library import native

MLSTM_F32, MLSTM_DEVICE_CPU, MLSTM_OP_STEP = 1, 1, 5


class Tensor(ctypes.Structure):
    """mlstm_tensor"""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("shape", ctypes.c_int64 * 4),
        ("stride", ctypes.c_int64 * 4),
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
    ]


class Problem(ctypes.Structure):
    """mlstm_problem"""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        *((name, ctypes.c_int64) for name in "b nh s dhqk dhhv num_seqs num_slots".split()),
        ("qk_scale", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("flags", ctypes.c_uint32),
        *(
            (name, ctypes.c_int32)
            for name in "gate device device_index dtype gate_dtype state_dtype chunk_size".split()
        ),
    ]


class Requirements(ctypes.Structure):
    """mlstm_requirements"""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("workspace_size", ctypes.c_size_t),
        ("workspace_alignment", ctypes.c_size_t),
        ("chunk_size", ctypes.c_int64),
        ("num_chunks", ctypes.c_int64),
    ]


class StepArgs(ctypes.Structure):
    """mlstm_step_args"""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("problem", ctypes.POINTER(Problem)),
        ("stream", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_size", ctypes.c_size_t),
        *(
            (name, Tensor)
            for name in (
                "q k v i f c n m c_dst n_dst m_dst src_slots dst_slots has_state num_tokens h"
            ).split()
        ),
    ]


def tensor(x: torch.Tensor) -> Tensor:
    """A float32 tensor's description."""
    pad = [0] * (4 - x.dim())
    shape, stride = (ctypes.c_int64 * 4)(*x.shape, *pad), (ctypes.c_int64 * 4)(*x.stride(), *pad)
    return Tensor(x.data_ptr(), shape, stride, MLSTM_F32, x.dim())


def step_call(**tensors: torch.Tensor) -> Callable[[], None]:
    """A call of `mlstm_step` on float32 tensors named as in mlstm_step_args."""
    library = ctypes.CDLL(str(native("libmlstm.so.0")))
    library.mlstm_last_error.restype = ctypes.c_char_p
    (b, nh, s, dhqk), dhhv = tensors["q"].shape, tensors["v"].shape[3]
    problem = Problem(ctypes.sizeof(Problem), b, nh, s, dhqk, dhhv)
    problem.device, problem.dtype = MLSTM_DEVICE_CPU, MLSTM_F32
    needs = Requirements(ctypes.sizeof(Requirements))

    def check(status: int) -> None:
        if status:
            raise RuntimeError(library.mlstm_last_error().decode())

    check(library.mlstm_query(MLSTM_OP_STEP, ctypes.byref(problem), ctypes.byref(needs)))
    workspace = torch.empty(needs.workspace_size + 64, dtype=torch.uint8)
    args = StepArgs(ctypes.sizeof(StepArgs), ctypes.pointer(problem))
    args.workspace = -(-workspace.data_ptr() // 64) * 64
    args.workspace_size = needs.workspace_size
    for name, value in tensors.items():
        setattr(args, name, tensor(value))
    # The defaults keep what the pointers point to alive.
    return lambda args=args, keep=(workspace, tensors): check(
        library.mlstm_step(ctypes.byref(args))
    )
