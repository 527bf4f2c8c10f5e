//! From C structs to the core's types. Only what C can get wrong is checked here: enum values,
//! flags, ranks and sizes; everything else is the core's.

use super::types::*;
use crate::api::Memory;
use crate::error::{Error, Result};
use crate::ops::{BwTensors, FwTensors, StepTensors};
use crate::problem::{Device, Gate, Op, ProblemSpec};
use crate::tensor::{DType, MAX_RANK, View};
use crate::workspace::Workspace;

const KNOWN_FLAGS: u32 = MLSTM_FLAG_NO_NORMALIZE
    | MLSTM_FLAG_DETACH_DENOMINATOR
    | MLSTM_FLAG_NO_EPS
    | MLSTM_FLAG_ALLOW_TF32
    | MLSTM_FLAG_GENERIC_ENGINE
    | MLSTM_FLAG_ALIGNED;

pub(super) fn op(value: mlstm_op) -> Result<Op> {
    match value {
        MLSTM_OP_CHUNKWISE_FW => Ok(Op::ChunkwiseFw),
        MLSTM_OP_CHUNKWISE_BW => Ok(Op::ChunkwiseBw),
        MLSTM_OP_PARALLEL_FW => Ok(Op::ParallelFw),
        MLSTM_OP_PARALLEL_BW => Ok(Op::ParallelBw),
        MLSTM_OP_STEP => Ok(Op::Step),
        _ => Err(Error::invalid("op", "one of MLSTM_OP_*", value)),
    }
}

pub(super) fn device(name: &str, value: mlstm_device) -> Result<Device> {
    match value {
        MLSTM_DEVICE_CPU => Ok(Device::Cpu),
        MLSTM_DEVICE_CUDA => Ok(Device::Cuda),
        _ => Err(Error::invalid(
            name,
            format!(
                "MLSTM_DEVICE_CPU ({MLSTM_DEVICE_CPU}) or MLSTM_DEVICE_CUDA ({MLSTM_DEVICE_CUDA})"
            ),
            value,
        )),
    }
}

/// `owner` has the field `field`.
fn dtype(owner: &str, field: &str, value: mlstm_dtype) -> Result<DType> {
    match value {
        MLSTM_F32 => Ok(DType::F32),
        MLSTM_F64 => Ok(DType::F64),
        MLSTM_BF16 => Ok(DType::Bf16),
        MLSTM_F16 => Ok(DType::F16),
        MLSTM_I32 => Ok(DType::I32),
        MLSTM_I64 => Ok(DType::I64),
        MLSTM_U8 => Ok(DType::U8),
        _ => {
            Err(Error::invalid(format!("{owner}.{field}"), "one of MLSTM_F32 ... MLSTM_U8", value))
        }
    }
}

/// Of a problem's field.
fn dtype_or_default(field: &str, value: mlstm_dtype) -> Result<Option<DType>> {
    if value == MLSTM_DTYPE_DEFAULT { Ok(None) } else { dtype("problem", field, value).map(Some) }
}

fn gate(problem: &mlstm_problem) -> Result<Gate> {
    let normalize = problem.flags & MLSTM_FLAG_NO_NORMALIZE == 0;
    match problem.gate {
        MLSTM_GATE_EXP if normalize => Ok(Gate::Exponential),
        MLSTM_GATE_EXP => Err(Error::invalid(
            "problem.flags",
            "MLSTM_FLAG_NO_NORMALIZE with MLSTM_GATE_SIGMOID only",
            format!("{:#x}", problem.flags),
        )),
        MLSTM_GATE_SIGMOID => Ok(Gate::Sigmoid { normalize }),
        value => Err(Error::invalid(
            "problem.gate",
            format!(
                "MLSTM_GATE_EXP ({MLSTM_GATE_EXP}) or MLSTM_GATE_SIGMOID ({MLSTM_GATE_SIGMOID})"
            ),
            value,
        )),
    }
}

pub(super) fn problem(problem: &mlstm_problem) -> Result<ProblemSpec> {
    let unknown = problem.flags & !KNOWN_FLAGS;
    if unknown != 0 {
        return Err(Error::unsupported(
            "problem.flags",
            format!("this library does not know the flags {unknown:#x}; install a newer one"),
        ));
    }
    let eps = match problem.flags & MLSTM_FLAG_NO_EPS {
        0 if problem.eps == 0.0 => None,
        0 => Some(problem.eps),
        _ if problem.eps == 0.0 => Some(0.0),
        _ => {
            return Err(Error::invalid("problem.eps", "0 with MLSTM_FLAG_NO_EPS", problem.eps));
        }
    };
    Ok(ProblemSpec {
        device: device("problem.device", problem.device)?,
        device_index: problem.device_index,
        b: problem.b,
        nh: problem.nh,
        s: problem.s,
        dhqk: problem.dhqk,
        dhhv: problem.dhhv,
        num_seqs: problem.num_seqs,
        num_slots: problem.num_slots,
        qk_scale: problem.qk_scale,
        eps,
        gate: gate(problem)?,
        detach_denominator: problem.flags & MLSTM_FLAG_DETACH_DENOMINATOR != 0,
        allow_tf32: problem.flags & MLSTM_FLAG_ALLOW_TF32 != 0,
        generic_engine: problem.flags & MLSTM_FLAG_GENERIC_ENGINE != 0,
        aligned: problem.flags & MLSTM_FLAG_ALIGNED != 0,
        dtype: dtype("problem", "dtype", problem.dtype)?,
        gate_dtype: dtype_or_default("gate_dtype", problem.gate_dtype)?,
        state_dtype: dtype_or_default("state_dtype", problem.state_dtype)?,
        chunk_size: i64::from(problem.chunk_size),
    })
}

fn optional(name: &str, tensor: &mlstm_tensor) -> Result<Option<View>> {
    if tensor.data.is_null() && tensor.rank == 0 && tensor.dtype == MLSTM_DTYPE_DEFAULT {
        return Ok(None);
    }
    let Some(rank) = usize::try_from(tensor.rank).ok().filter(|rank| *rank <= MAX_RANK) else {
        return Err(Error::invalid(
            format!("{name}.rank"),
            format!("0 to {MAX_RANK}"),
            tensor.rank,
        ));
    };
    let shape = tensor.shape.get(..rank).unwrap_or_default();
    if shape.iter().any(|&size| size < 0) {
        return Err(Error::invalid(format!("{name}.shape"), "sizes >= 0", format!("{shape:?}")));
    }
    let dtype = dtype(name, "dtype", tensor.dtype)?;
    Ok(Some(View::new(tensor.data.cast(), dtype, rank, tensor.shape, tensor.stride)))
}

fn required(name: &str, tensor: &mlstm_tensor) -> Result<View> {
    optional(name, tensor)?.ok_or_else(|| Error::invalid(name, "a tensor", "none"))
}

pub(super) fn workspace(data: *mut std::ffi::c_void, len: usize) -> Memory<'static> {
    Memory::Caller(Workspace { data: data.cast(), len })
}

/// Builds a tensors struct from the equally named members of a C one.
macro_rules! tensors {
    ($ty:ident from $args:ident { $($req:ident),* } optional { $($opt:ident),* }) => {
        $ty {
            $($req: required(stringify!($req), &$args.$req)?,)*
            $($opt: optional(stringify!($opt), &$args.$opt)?,)*
        }
    };
}

pub(super) fn fw_tensors(args: &mlstm_fw_args) -> Result<FwTensors> {
    Ok(tensors!(FwTensors from args { q, k, v, i, f, h } optional {
        c_initial, n_initial, m_initial, cu_seqlens, n, m, c_last, n_last, m_last
    }))
}

pub(super) fn bw_tensors(args: &mlstm_bw_args) -> Result<BwTensors> {
    Ok(tensors!(BwTensors from args { q, k, v, i, f, dh, dq, dk, dv, di, df } optional {
        c_initial, n_initial, m_initial, cu_seqlens, h, n, m, dc_last, dn_last, dm_last,
        dc_initial, dn_initial, dm_initial
    }))
}

pub(super) fn step_tensors(args: &mlstm_step_args) -> Result<StepTensors> {
    Ok(tensors!(StepTensors from args { q, k, v, i, f, c, n, h } optional {
        m, c_dst, n_dst, m_dst, src_slots, dst_slots, has_state, num_tokens
    }))
}
