//! What the kernels are passed: the structs of `kernels/params.cuh` and `kernels/step_params.cuh`,
//! field by field. The meaning of each field is documented there.

use std::ptr::null_mut;

use crate::error::{Error, Result};
use crate::problem::{Gate, Problem};
use crate::tensor::{DType, View};

type Pointer = *mut u8;

/// `mlstm::Tensor`: strides of (row, head, token or state row).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Tensor {
    pub(super) data: Pointer,
    stride: [i64; 3],
}

impl Tensor {
    pub(super) const ABSENT: Self = Self { data: null_mut(), stride: [0; 3] };

    /// States [rows][nh][dhqk][dhhv], dense.
    pub(super) const fn dense(data: Pointer, problem: &Problem) -> Self {
        let matrix = problem.dhqk * problem.dhhv;
        Self { data, stride: [problem.nh * matrix, matrix, problem.dhhv] }
    }

    pub(super) fn is_absent(&self) -> bool {
        self.data.is_null()
    }

    /// States in float from a column on.
    pub(super) fn at_column(self, column: i64) -> Self {
        if self.is_absent() {
            return self;
        }
        Self { data: self.data.wrapping_add(column as usize * 4), ..self }
    }
}

impl From<&View> for Tensor {
    fn from(view: &View) -> Self {
        let stride = |dim: usize| if dim < view.rank { view.stride[dim] } else { 0 };
        Self { data: view.data, stride: [stride(0), stride(1), stride(2)] }
    }
}

impl From<&Option<View>> for Tensor {
    fn from(view: &Option<View>) -> Self {
        view.as_ref().map_or(Self::ABSENT, Self::from)
    }
}

/// `mlstm::Args`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Args {
    pub(super) s: i64,
    pub(super) num_chunks: i64,
    pub(super) b: i32,
    pub(super) nh: i32,
    pub(super) rows: i32,
    pub(super) dhqk: i32,
    pub(super) dhhv: i32,
    pub(super) chunk_len: i32,
    pub(super) chunks_per_row: i32,
    pub(super) flags: i32,
    pub(super) gate_dtype: i32,
    pub(super) state_dtype: i32,
    pub(super) vector_ok: i32,
    pub(super) qk_tiles: i32,
    pub(super) e_tiles: i32,
    pub(super) write_m: i32,
    pub(super) qk_scale: f64,
    pub(super) eps: f64,
    pub(super) q: Tensor,
    pub(super) k: Tensor,
    pub(super) v: Tensor,
    pub(super) i: Tensor,
    pub(super) f: Tensor,
    pub(super) c_initial: Tensor,
    pub(super) n_initial: Tensor,
    pub(super) m_initial: Tensor,
    pub(super) h: Tensor,
    pub(super) n: Tensor,
    pub(super) m: Tensor,
    pub(super) c_last: Tensor,
    pub(super) n_last: Tensor,
    pub(super) m_last: Tensor,
    pub(super) dh: Tensor,
    pub(super) dc_last: Tensor,
    pub(super) dn_last: Tensor,
    pub(super) dm_last: Tensor,
    pub(super) dq: Tensor,
    pub(super) dk: Tensor,
    pub(super) dv: Tensor,
    pub(super) di: Tensor,
    pub(super) df: Tensor,
    pub(super) dc_initial: Tensor,
    pub(super) dn_initial: Tensor,
    pub(super) dm_initial: Tensor,
    pub(super) cu_seqlens: Pointer,
    pub(super) cu_seqlens_stride: i64,
    pub(super) cu_seqlens_wide: i64,
    pub(super) buffers: Buffers,
    pub(super) segments: i32,
    pub(super) group_chunks: i32,
    pub(super) boundary_parts: i32,
    pub(super) rho_parts: i32,
    pub(super) segment_columns: i32,
    pub(super) parts_before: i32,
    pub(super) parts_after: i32,
}

/// The workspace's part of `mlstm::Args`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Buffers {
    pub(super) chunks: Pointer,
    pub(super) first_chunk: Pointer,
    pub(super) seq_starts: Pointer,
    pub(super) chunk_gates: Pointer,
    pub(super) row: Pointer,
    pub(super) col: Pointer,
    pub(super) w: Pointer,
    pub(super) a: Pointer,
    pub(super) floor: Pointer,
    pub(super) g: Pointer,
    pub(super) c_states: Pointer,
    pub(super) n_states: Pointer,
    pub(super) dc_states: Pointer,
    pub(super) dn_states: Pointer,
    pub(super) inv: Pointer,
    pub(super) delta: Pointer,
    pub(super) dm: Pointer,
    pub(super) q_dq: Pointer,
    pub(super) k_dk: Pointer,
    pub(super) e: Pointer,
    pub(super) e_first: Pointer,
    pub(super) packed: Pointer,
    pub(super) segment_c: Pointer,
    pub(super) segment_n: Pointer,
    pub(super) segment_g: Pointer,
    pub(super) scores: Pointer,
    pub(super) rho: Pointer,
    pub(super) boundary_c: Pointer,
    pub(super) boundary_n: Pointer,
    pub(super) boundary_e: Pointer,
    pub(super) state_copies: Pointer,
    pub(super) part_sums: Pointer,
}

const _: () = assert!(size_of::<Args>() == 1232, "kernels/params.cuh has the same size");

/// `mlstm::TensorMap`: a tensor as the copy engine sees it.
pub(super) type TensorMap = cudarc::driver::sys::CUtensorMap;

/// `mlstm::HopperArgs`.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct HopperArgs {
    pub(super) q: TensorMap,
    pub(super) k: TensorMap,
    pub(super) v: TensorMap,
    pub(super) h: TensorMap,
    pub(super) packed: TensorMap,
    pub(super) args: Args,
}

/// `mlstm::BackwardArgs`.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct BackwardArgs {
    pub(super) maps: [TensorMap; 8],
    pub(super) args: Args,
}

/// `mlstm::CopyArgs`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct CopyArgs {
    pub(super) from: Tensor,
    pub(super) to: Tensor,
    pub(super) nh: i32,
    pub(super) dhqk: i32,
    pub(super) dhhv: i32,
    pub(super) from_dtype: i32,
    pub(super) to_dtype: i32,
}

/// `mlstm::RowIndex`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct RowIndex {
    data: Pointer,
    stride: i64,
    size: i64,
}

impl From<&Option<View>> for RowIndex {
    fn from(view: &Option<View>) -> Self {
        view.as_ref().map_or(Self { data: null_mut(), stride: 0, size: 0 }, |view| Self {
            data: view.data,
            stride: view.stride[0],
            size: view.dtype.size() as i64,
        })
    }
}

/// `mlstm::StepArgs`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct StepArgs {
    pub(super) num_slots: i64,
    pub(super) b: i32,
    pub(super) nh: i32,
    pub(super) tokens: i32,
    pub(super) dhqk: i32,
    pub(super) dhhv: i32,
    pub(super) flags: i32,
    pub(super) dtype: i32,
    pub(super) gate_dtype: i32,
    pub(super) qk_scale: f64,
    pub(super) eps: f64,
    pub(super) q: Tensor,
    pub(super) k: Tensor,
    pub(super) v: Tensor,
    pub(super) i: Tensor,
    pub(super) f: Tensor,
    pub(super) h: Tensor,
    pub(super) c: Tensor,
    pub(super) n: Tensor,
    pub(super) m: Tensor,
    pub(super) c_dst: Tensor,
    pub(super) n_dst: Tensor,
    pub(super) m_dst: Tensor,
    pub(super) src_slots: RowIndex,
    pub(super) dst_slots: RowIndex,
    pub(super) has_state: RowIndex,
    pub(super) num_tokens: RowIndex,
    pub(super) scalars: Pointer,
}

const _: () = assert!(size_of::<StepArgs>() == 544, "kernels/step_params.cuh has the same size");

/// `mlstm::DType`.
pub(super) const fn dtype(dtype: DType) -> i32 {
    match dtype {
        DType::F64 => 1,
        DType::Bf16 => 2,
        DType::F16 => 3,
        DType::F32 | DType::I32 | DType::I64 | DType::U8 => 0,
    }
}

/// The suffix of kernels for a dtype.
pub(super) const fn suffix(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "f64",
        DType::Bf16 => "bf16",
        DType::F16 => "f16",
        DType::F32 | DType::I32 | DType::I64 | DType::U8 => "f32",
    }
}

/// `mlstm::Flags`.
pub(super) fn flags(problem: &Problem) -> i32 {
    i32::from(problem.gate == Gate::Exponential)
        | i32::from(problem.gate.has_normalizer()) << 1
        | i32::from(problem.detach_denominator) << 2
}

/// Sizes are 32-bit on the device; offsets are not.
pub(super) fn size(name: &str, size: i64) -> Result<i32> {
    i32::try_from(size).map_err(|_| {
        Error::unsupported(format!("problem.{name}"), format!("{size} exceeds 2^31 - 1 on CUDA"))
    })
}
