# SPDX-License-Identifier: MIT OR Apache-2.0
"""The XLA FFI targets of xla_ffi/handlers.cpp: registered on import, described by `Call`, run by
`run`."""

import ctypes
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mlstm._library import native


def _parse(words):
    return dict(word.split(":") for word in words.split())


# Operands and results of the targets, in order, and a letter for each of their dimensions: b B,
# h NH, s S, d DHQK, e DHHV, r rows of states (B, or the number of packed sequences), u r + 1,
# p slots of a pool.
_TOKENS = "q:bhsd k:bhsd v:bhse i:bhs f:bhs"
_INITIAL = "c_initial:rhde n_initial:rhd m_initial:rh cu_seqlens:u"
_POOLS = "c:phde n:phd m:ph"
OPERANDS = {
    "fw": _parse(f"{_TOKENS} {_INITIAL}"),
    "bw": _parse(
        f"{_TOKENS} {_INITIAL} h:bhse n:bhs m:bhs dh:bhse dc_last:rhde dn_last:rhd dm_last:rh"
    ),
    "step": _parse(f"{_TOKENS} {_POOLS} src_slots:b dst_slots:b has_state:b num_tokens:b h:bhse"),
}
RESULTS = {
    "fw": _parse("h:bhse n:bhs m:bhs c_last:rhde n_last:rhd m_last:rh"),
    "bw": _parse(
        "dq:bhsd dk:bhsd dv:bhse di:bhs df:bhs dc_initial:rhde dn_initial:rhd dm_initial:rh"
    ),
    "step": _parse(f"h:bhse {_POOLS}"),
}
# Numbers in mlstm.h.
_OPS = {"chunkwise_fw": 1, "chunkwise_bw": 2, "parallel_fw": 3, "parallel_bw": 4, "step": 5}
_DTYPES = {"float32": 1, "float64": 2, "bfloat16": 3, "float16": 4}
_DEVICES = {"cpu": 1, "cuda": 2}
NO_NORMALIZE, DETACH_DENOMINATOR, NO_EPS, ALLOW_TF32 = 1, 2, 4, 8
EXPONENTIAL, SIGMOID = 0, 1


class Attributes(NamedTuple):
    """Attributes of the targets: members of mlstm_problem."""

    flags: int = 0
    gate: int = EXPONENTIAL
    chunk_size: int = 0
    qk_scale: float = 0.0
    eps: float = 0.0


class Call(NamedTuple):
    """What is known of a call when it is traced."""

    op: str
    operands: tuple[str, ...]  # the names of those that are there
    results: tuple[str, ...]  # the names of those that are wanted
    attributes: Attributes
    state_dtype: np.dtype  # of c
    tokens_first: bool = False  # the target is called with (B, S, NH, ...)

    @property
    def kind(self) -> str:
        """ "fw", "bw" or "step"."""
        return self.op.split("_")[-1]

    @property
    def packed(self) -> bool:
        """Whether sequences are packed along S."""
        return "cu_seqlens" in self.operands

    @property
    def slots(self) -> bool:
        """Whether rows choose their slots in a pool."""
        return "src_slots" in self.operands

    def dims(self, table) -> list[str]:
        """The letters of the operands or results, given OPERANDS or RESULTS; b for every dimension
        in which a row is one of the batch."""
        names = self.operands if table is OPERANDS else self.results
        letters = [table[self.kind][name] for name in names]
        if not self.packed:
            letters = [word.replace("r", "b") for word in letters]
        return letters if self.slots else [word.replace("p", "b") for word in letters]


def compute_dtype(q):
    """dtype of n and m: float64 for float64 data, else float32."""
    return jnp.dtype(jnp.float64 if q.dtype == jnp.float64 else jnp.float32)


def run(call: Call, *operands):
    """Calls the target. Arrays that are wrong in any way are left to the library to refuse."""
    # Scratch memory that the call allocates does not outlive it, but the recorded call would use
    # it again and again: on a GPU, XLA must plan the workspace.
    by_platform = {"cpu": partial(_invoke, call, None), "cuda": partial(_invoke, call, "cuda")}
    return jax.lax.platform_dependent(*operands, **by_platform)


def _invoke(call, device, *operands):
    named = dict(zip(call.operands, operands, strict=True))
    absent = jax.ShapeDtypeStruct((0,), jnp.bool_)
    sizes = _sizes(call, named)
    types = {name: _type(call, name, named, sizes) for name in call.results}
    given = jax.eval_shape(partial(_turned, call, table=RESULTS), types)
    results = [given.get(name, absent) for name in RESULTS[call.kind]]
    if device:
        workspace = _workspace_size(call, named, sizes, device)
        results.append(jax.ShapeDtypeStruct((workspace,), jnp.uint8))
    results, nothing = _vary_like(operands[0], results)
    positions = {name: index for index, name in enumerate(OPERANDS[call.kind])}
    # Results that are operands too are updated in place. Those that do not fit are refused.
    shared = [name for name in call.results if name in named]
    fits = all(named[name].shape == types[name].shape for name in shared)
    order = list(RESULTS[call.kind])
    aliases = {positions[name]: order.index(name) for name in shared if fits}
    target = f"mlstm_{call.op}_graph" if device else f"mlstm_{call.op}"
    function = jax.ffi.ffi_call(target, results, input_output_aliases=aliases)
    named = _turned(call, named, OPERANDS)
    outputs = function(
        *(named.get(name, nothing) for name in positions),
        **call.attributes._asdict(),
        tokens_first=call.tokens_first,
    )
    outputs = dict(zip(RESULTS[call.kind], outputs, strict=False))
    outputs = _turned(call, {name: outputs[name] for name in call.results}, RESULTS)
    return tuple(outputs.values())


def _turned(call, arrays, table):
    """Arrays by name as the target takes or gives them, or from there: those over tokens with S
    before NH, if the call says so. XLA drops transpositions that undo each other."""
    if not call.tokens_first:
        return arrays
    dims = table[call.kind]
    return {
        name: x.swapaxes(1, 2) if dims[name].startswith("bhs") and x.ndim >= 3 else x
        for name, x in arrays.items()
    }


def _vary_like(operand, types):
    """Under shard_map, types that vary over the devices as the operand does, and an absent array
    that does."""
    typ = jax.typeof(operand)
    nothing = jnp.zeros(0, jnp.bool_)
    if not typ.manual_axis_type.varying:
        return types, nothing
    where = dict(
        sharding=NamedSharding(typ.sharding.mesh, PartitionSpec()),
        manual_axis_type=typ.manual_axis_type,
    )
    types = [jax.ShapeDtypeStruct(t.shape, t.dtype, **where) for t in types]
    return types, jax.lax.pcast(nothing, tuple(typ.manual_axis_type.varying), to="varying")


def _sizes(call, operands):
    """Sizes by letter; 1 for what an array of the wrong rank lacks."""
    sizes = dict.fromkeys("bhsdep", 1)
    for name in ("c", "v", "q"):
        if name in operands:
            sizes.update(zip(OPERANDS[call.kind][name], operands[name].shape, strict=False))
    sizes["r"] = max(operands["cu_seqlens"].size - 1, 0) if call.packed else sizes["b"]
    return sizes


def _type(call, name, operands, sizes):
    if call.kind == "bw":
        return jax.ShapeDtypeStruct(operands[name[1:]].shape, operands[name[1:]].dtype)
    like = name[0]
    if like == "c":
        dtype = call.state_dtype
    elif like in "nm":
        dtype = compute_dtype(operands["q"])
    else:
        dtype = operands[like if like in "if" else "q"].dtype
    shape = [sizes[letter] for letter in RESULTS[call.kind][name]]
    return jax.ShapeDtypeStruct(shape, dtype)


_ALIGNED = 32  # MLSTM_FLAG_ALIGNED


class _Problem(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        *((name, ctypes.c_int64) for name in "b nh s dhqk dhhv num_seqs num_slots".split()),
        ("qk_scale", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("flags", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in "gate device device_index dtype".split()),
        *((name, ctypes.c_int32) for name in "gate_dtype state_dtype chunk_size".split()),
    ]


class _Requirements(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_size_t) for name in "struct_size workspace_size alignment".split()),
        *((name, ctypes.c_int64) for name in "chunk_size num_chunks".split()),
    ]


def _workspace_size(call, operands, sizes, device):
    """Bytes of workspace; 0 for a problem that the library will refuse."""
    b, nh, s, dhqk, dhhv = (sizes[letter] for letter in "bhsde")
    attributes = call.attributes._asdict()
    # XLA's arrays are dense and start at multiples of 16 bytes; then their rows do, too, or not.
    if all(dim * operands["q"].dtype.itemsize % 16 == 0 for dim in (dhqk, dhhv)):
        attributes["flags"] |= _ALIGNED
    problem = _Problem(
        **attributes,
        struct_size=ctypes.sizeof(_Problem),
        b=b,
        nh=nh,
        s=s,
        dhqk=dhqk,
        dhhv=dhhv,
        num_seqs=sizes["r"] if call.packed else 0,
        num_slots=sizes["p"] if call.kind == "step" else 0,
        device=_DEVICES[device],
        device_index=-1,
        dtype=_DTYPES.get(operands["q"].dtype.name, 0),
        gate_dtype=_DTYPES.get(operands["i"].dtype.name, 0),
        state_dtype=_DTYPES.get(call.state_dtype.name, 0),
    )
    needs = _Requirements(struct_size=ctypes.sizeof(_Requirements))
    _library.mlstm_query(_OPS[call.op], ctypes.byref(problem), ctypes.byref(needs))
    return needs.workspace_size


def _register():
    handlers = ctypes.CDLL(native("mlstm_xla.so"))

    def handler(name):
        return jax.ffi.pycapsule(getattr(handlers, name))

    initialize = handler("mlstm_load_kernels_cuda")
    for op in _OPS:
        for variant in ("", "_graph"):
            target = f"mlstm_{op}{variant}"
            jax.ffi.register_ffi_target(target, handler(f"mlstm_{op}_cpu"), platform="cpu")
            cuda = {"initialize": initialize, "execute": handler(f"{target}_cuda")}
            jax.ffi.register_ffi_target(target, cuda, platform="CUDA")


_library = ctypes.CDLL(native("libmlstm.so.0"))
_register()
