# SPDX-License-Identifier: MIT OR Apache-2.0
"""The C ABI of libmlstm.so on torch tensors, by ctypes: no binding in between."""

import ctypes
import os
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_double,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_void_p,
)
from pathlib import Path

import torch

DTYPES = {
    torch.float32: 1,
    torch.float64: 2,
    torch.bfloat16: 3,
    torch.float16: 4,
    torch.int32: 5,
    torch.int64: 6,
    torch.uint8: 7,
}
OPS = {"chunkwise_fw": 1, "chunkwise_bw": 2, "parallel_fw": 3, "parallel_bw": 4, "step": 5}
STATUS = {"OK": 0, "INVALID_ARGUMENT": 1, "UNSUPPORTED": 2, "WORKSPACE_TOO_SMALL": 3}
STATUS |= {"DEVICE_ERROR": 4, "INTERNAL_ERROR": 5}
NO_NORMALIZE, DETACH_DENOMINATOR, NO_EPS, ALLOW_TF32, GENERIC_ENGINE = 1, 2, 4, 8, 16
ALIGNED = 32


class Tensor(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("shape", c_int64 * 4),
        ("stride", c_int64 * 4),
        ("dtype", c_int32),
        ("rank", c_int32),
    ]


class Problem(Structure):
    _fields_ = [("struct_size", c_size_t)]
    _fields_ += [(name, c_int64) for name in "b nh s dhqk dhhv num_seqs num_slots".split()]
    _fields_ += [("qk_scale", c_double), ("eps", c_double), ("flags", c_uint32)]
    _fields_ += [(name, c_int32) for name in "gate device device_index dtype".split()]
    _fields_ += [(name, c_int32) for name in "gate_dtype state_dtype chunk_size".split()]


class Requirements(Structure):
    _fields_ = [("struct_size", c_size_t), ("workspace_size", c_size_t)]
    _fields_ += [("workspace_alignment", c_size_t), ("chunk_size", c_int64)]
    _fields_ += [("num_chunks", c_int64)]


def _args(name, tensors):
    fields = [("struct_size", c_size_t), ("problem", POINTER(Problem)), ("stream", c_void_p)]
    fields += [("workspace", c_void_p), ("workspace_size", c_size_t)]
    fields += [(tensor, Tensor) for tensor in tensors.split()]
    return type(name, (Structure,), {"_fields_": fields})


FwArgs = _args(
    "FwArgs",
    "q k v i f c_initial n_initial m_initial cu_seqlens h n m c_last n_last m_last",
)
BwArgs = _args(
    "BwArgs",
    "q k v i f c_initial n_initial m_initial cu_seqlens h n m dh dc_last dn_last dm_last "
    "dq dk dv di df dc_initial dn_initial dm_initial",
)
StepArgs = _args(
    "StepArgs",
    "q k v i f c n m c_dst n_dst m_dst src_slots dst_slots has_state num_tokens h",
)
ARGS = {"fw": FwArgs, "bw": BwArgs, "step": StepArgs}


class Error(Exception):
    """A status that is not OK."""

    def __init__(self, status, message):
        super().__init__(f"{status}: {message}")
        self.status = status


def _load():
    root = Path(__file__).resolve().parents[2]
    default = Path(os.environ.get("CARGO_TARGET_DIR", root / "target")) / "release/libmlstm.so"
    lib = ctypes.CDLL(os.environ.get("MLSTM_LIBRARY", str(default)))
    lib.mlstm_last_error.restype = c_char_p
    return lib


lib = _load()


def check(status):
    if status != 0:
        raise Error(status, lib.mlstm_last_error().decode())


def view(tensor):
    """A torch tensor as the C ABI sees it; None is an absent one."""
    out = Tensor()
    if tensor is None:
        return out
    assert tensor.dim() <= 4
    out.data = tensor.data_ptr()
    out.shape[: tensor.dim()] = tensor.shape
    out.stride[: tensor.dim()] = tensor.stride()
    out.dtype = DTYPES[tensor.dtype]
    out.rank = tensor.dim()
    return out


def problem(x, **options):
    """The problem of token tensors q, v, i on their device."""
    out = Problem(struct_size=ctypes.sizeof(Problem))
    out.b, out.nh, out.s, out.dhqk = x["q"].shape
    out.dhhv = x["v"].shape[3]
    out.device = 2 if x["q"].is_cuda else 1
    out.device_index = x["q"].device.index or 0
    out.dtype = DTYPES[x["q"].dtype]
    out.gate_dtype = DTYPES[x["i"].dtype]
    for name, value in options.items():
        setattr(out, name, value)
    return out


def query(op, p):
    needs = Requirements(struct_size=ctypes.sizeof(Requirements))
    check(lib.mlstm_query(OPS[op], byref(p), byref(needs)))
    return needs


def arguments(op, p, tensors, workspace):
    """The struct of a call on the current stream. It does not keep the memory that it points to."""
    args = ARGS[op.split("_")[-1]](problem=ctypes.pointer(p))
    args.struct_size = ctypes.sizeof(args)
    base = -(-workspace.data_ptr() // 64) * 64
    args.workspace = base
    args.workspace_size = workspace.data_ptr() + workspace.numel() - base
    if p.device == 2:
        args.stream = torch.cuda.current_stream(workspace.device).cuda_stream
    for name, tensor in tensors.items():
        setattr(args, name, view(tensor))
    return args


def call(op, p, tensors, workspace=None):
    """Runs an operation on the current stream. The workspace is poisoned, unless given."""
    first = next(t for t in tensors.values() if t is not None)
    if workspace is None:
        size = query(op, p).workspace_size
        workspace = torch.full((size + 64,), 255, dtype=torch.uint8, device=first.device)
    check(getattr(lib, f"mlstm_{op}")(byref(arguments(op, p, tensors, workspace))))
    return workspace
