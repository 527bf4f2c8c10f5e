//! The C types. Layouts are frozen: members are only ever appended to size-tagged structs.

#![allow(non_camel_case_types, reason = "C naming")]

use std::ffi::c_void;

/// Version of the header, major.
pub const MLSTM_VERSION_MAJOR: u32 = 0;
/// Version of the header, minor.
pub const MLSTM_VERSION_MINOR: u32 = 1;
/// Version of the header, patch.
pub const MLSTM_VERSION_PATCH: u32 = 0;

/// Result of a call; `MLSTM_OK` is 0. `mlstm_last_error` has the message.
pub type mlstm_status = i32;
/// The call did (on a GPU: enqueued) its work.
pub const MLSTM_OK: mlstm_status = 0;
/// An argument breaks the contract. Nothing was written.
pub const MLSTM_INVALID_ARGUMENT: mlstm_status = 1;
/// Valid, but this build has no kernel for it: fall back. Nothing was written.
pub const MLSTM_UNSUPPORTED: mlstm_status = 2;
/// The workspace is smaller than `mlstm_query` says. Nothing was written.
pub const MLSTM_WORKSPACE_TOO_SMALL: mlstm_status = 3;
/// The device or its driver is missing or failed.
pub const MLSTM_DEVICE_ERROR: mlstm_status = 4;
/// A bug in the library.
pub const MLSTM_INTERNAL_ERROR: mlstm_status = 5;

/// Element type of a tensor. 0 where a default is allowed.
pub type mlstm_dtype = i32;
/// The documented default of the field.
pub const MLSTM_DTYPE_DEFAULT: mlstm_dtype = 0;
/// IEEE binary32.
pub const MLSTM_F32: mlstm_dtype = 1;
/// IEEE binary64.
pub const MLSTM_F64: mlstm_dtype = 2;
/// bfloat16.
pub const MLSTM_BF16: mlstm_dtype = 3;
/// IEEE binary16.
pub const MLSTM_F16: mlstm_dtype = 4;
/// Signed 32-bit integer.
pub const MLSTM_I32: mlstm_dtype = 5;
/// Signed 64-bit integer.
pub const MLSTM_I64: mlstm_dtype = 6;
/// Byte; any non-zero value is true.
pub const MLSTM_U8: mlstm_dtype = 7;

/// Where the tensors live; numbers follow DLPack.
pub type mlstm_device = i32;
/// Host memory.
pub const MLSTM_DEVICE_CPU: mlstm_device = 1;
/// CUDA device memory.
pub const MLSTM_DEVICE_CUDA: mlstm_device = 2;

/// The cell's input gate.
pub type mlstm_gate = i32;
/// Exponential input gate with the max stabiliser m (mLSTMexp).
pub const MLSTM_GATE_EXP: mlstm_gate = 0;
/// Sigmoid input gate (mLSTMsig); no m anywhere.
pub const MLSTM_GATE_SIGMOID: mlstm_gate = 1;

/// An operation, for `mlstm_query`.
pub type mlstm_op = i32;
/// `mlstm_chunkwise_fw`.
pub const MLSTM_OP_CHUNKWISE_FW: mlstm_op = 1;
/// `mlstm_chunkwise_bw`.
pub const MLSTM_OP_CHUNKWISE_BW: mlstm_op = 2;
/// `mlstm_parallel_fw`.
pub const MLSTM_OP_PARALLEL_FW: mlstm_op = 3;
/// `mlstm_parallel_bw`.
pub const MLSTM_OP_PARALLEL_BW: mlstm_op = 4;
/// `mlstm_step`.
pub const MLSTM_OP_STEP: mlstm_op = 5;

/// With the sigmoid gate: h = s q^T C, without a denominator.
pub const MLSTM_FLAG_NO_NORMALIZE: u32 = 1;
/// Gradient without the denominator's part, as NX-AI's `mlstm_kernels` computes it; right only
/// where a scale-invariant norm follows. The default is the exact gradient.
pub const MLSTM_FLAG_DETACH_DENOMINATOR: u32 = 2;
/// eps is really 0 (a zero in the field means its default, 1e-6).
pub const MLSTM_FLAG_NO_EPS: u32 = 4;
/// Float32 matrix products may be rounded to TF32: relative errors near 5e-4, larger in gradients of
/// tokens whose denominator is close to its floor. Ignored where there is nothing to gain: other
/// dtypes, the CPU, a step. The default keeps errors within 1e-5.
pub const MLSTM_FLAG_ALLOW_TF32: u32 = 8;
/// Take the portable engine even where one for the device at hand fits the problem, to compare
/// them; `mlstm_query` wants the same flag.
pub const MLSTM_FLAG_GENERIC_ENGINE: u32 = 16;
/// For `mlstm_query`: the rows of q, k, v, h and their gradients will start at multiples of 16 bytes
/// and have strides above 0. A call on tensors that do not keep it may need more workspace than the
/// query said: it then fails with `MLSTM_WORKSPACE_TOO_SMALL` and can be repeated with what a query
/// without the flag says.
pub const MLSTM_FLAG_ALIGNED: u32 = 32;

/// A strided tensor in the caller's memory. All-zero means absent. The last dimension of q, k, v,
/// h, C and n states (and of their gradients) must have stride 1; other strides are free, also 0
/// or negative for inputs. Unused entries of `shape` and `stride` are ignored.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct mlstm_tensor {
    /// The first element; aligned to the element's size.
    pub data: *mut c_void,
    /// Sizes of the `rank` dimensions.
    pub shape: [i64; 4],
    /// Strides of the `rank` dimensions, in elements.
    pub stride: [i64; 4],
    /// `MLSTM_F32` ... `MLSTM_U8`.
    pub dtype: mlstm_dtype,
    /// Number of dimensions, at most 4.
    pub rank: i32,
}

/// What is to be computed. Zero always means the default.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct mlstm_problem {
    /// sizeof(mlstm_problem) of the caller's header.
    pub struct_size: usize,
    /// B: batch size; 1 with packed sequences.
    pub b: i64,
    /// NH: number of heads.
    pub nh: i64,
    /// S: tokens per row, any number >= 0; with packed sequences all tokens together; in a step 1
    /// to 16.
    pub s: i64,
    /// DHQK: head dim of q and k.
    pub dhqk: i64,
    /// DHHV: head dim of v and h.
    pub dhhv: i64,
    /// Number of sequences packed along S (with `cu_seqlens`); 0 for none.
    pub num_seqs: i64,
    /// Slots in the state pool of a step; 0 for `b`.
    pub num_slots: i64,
    /// s: factor on q; 0 for DHQK^-0.5. Finite, also as a float32 (but with F64 data); so is eps.
    pub qk_scale: f64,
    /// Added to the denominator; 0 for 1e-6 (see `MLSTM_FLAG_NO_EPS`).
    pub eps: f64,
    /// Or of `MLSTM_FLAG_*`.
    pub flags: u32,
    /// `MLSTM_GATE_EXP` or `MLSTM_GATE_SIGMOID`.
    pub gate: mlstm_gate,
    /// `MLSTM_DEVICE_CPU` or `MLSTM_DEVICE_CUDA`; required.
    pub device: mlstm_device,
    /// Number of the CUDA device; -1 in `mlstm_query` for a bound over all devices.
    pub device_index: i32,
    /// dtype of q, k, v, h and their gradients: F32, F64, BF16 or F16; required.
    pub dtype: mlstm_dtype,
    /// dtype of i, f and their gradients: F32 or the data's; 0 for the data's.
    pub gate_dtype: mlstm_dtype,
    /// dtype of C states and their gradients: F32, BF16 or F16 (F64 with F64 data); 0 for F32
    /// (F64). n and m states, and the per-token n and m, are always F32 (F64 with F64 data).
    pub state_dtype: mlstm_dtype,
    /// L: tokens per chunk of the chunkwise form, a hint; 0 lets the library choose. Any value
    /// gives the same numbers up to rounding.
    pub chunk_size: i32,
}

/// What a call needs; filled by `mlstm_query`. Members that an older library does not know stay as
/// the caller set them.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct mlstm_requirements {
    /// sizeof(mlstm_requirements) of the caller's header; set it before the call.
    pub struct_size: usize,
    /// Bytes of workspace, possibly 0.
    pub workspace_size: usize,
    /// Alignment of the workspace in bytes.
    pub workspace_alignment: usize,
    /// L that will be used.
    pub chunk_size: i64,
    /// NC: number of chunks (an upper bound with packed sequences).
    pub num_chunks: i64,
}

/// Arguments of `mlstm_chunkwise_fw` and `mlstm_parallel_fw`. R is B, or `num_seqs` when packed.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct mlstm_fw_args {
    /// sizeof(mlstm_fw_args) of the caller's header.
    pub struct_size: usize,
    /// What to compute.
    pub problem: *const mlstm_problem,
    /// The CUDA stream (cudaStream_t); ignored on the CPU.
    pub stream: *mut c_void,
    /// Scratch memory on the device, sized and aligned as `mlstm_query` says; contents undefined
    /// before and after. NULL if the size is 0.
    pub workspace: *mut c_void,
    /// Bytes at `workspace`.
    pub workspace_size: usize,
    /// In: queries (B, NH, S, DHQK).
    pub q: mlstm_tensor,
    /// In: keys (B, NH, S, DHQK).
    pub k: mlstm_tensor,
    /// In: values (B, NH, S, DHHV).
    pub v: mlstm_tensor,
    /// In: input gate pre-activations (B, NH, S); -inf ignores the token.
    pub i: mlstm_tensor,
    /// In: forget gate pre-activations (B, NH, S); -inf resets the state.
    pub f: mlstm_tensor,
    /// In, optional: C before the first token (R, NH, DHQK, DHHV). c, n (and m with the
    /// exponential gate) come all together or not at all; absent means zero.
    pub c_initial: mlstm_tensor,
    /// In, optional: n before the first token (R, NH, DHQK).
    pub n_initial: mlstm_tensor,
    /// In, optional: m before the first token (R, NH).
    pub m_initial: mlstm_tensor,
    /// In, optional: packed sequences, (num_seqs + 1) int32 or int64 offsets into S on the device,
    /// from 0, not decreasing, to S. Sequences may be empty. Contents are checked on the CPU only.
    pub cu_seqlens: mlstm_tensor,
    /// Out: h (B, NH, S, DHHV).
    pub h: mlstm_tensor,
    /// Out, optional: N = s q^T n per token, signed (B, NH, S); the backward reads it.
    pub n: mlstm_tensor,
    /// Out, optional: m per token (B, NH, S); the backward reads it. Absent with the sigmoid gate.
    pub m: mlstm_tensor,
    /// Out, optional: C after the last token (R, NH, DHQK, DHHV). All of c, n (and m) or none.
    pub c_last: mlstm_tensor,
    /// Out, optional: n after the last token (R, NH, DHQK).
    pub n_last: mlstm_tensor,
    /// Out, optional: m after the last token (R, NH). Absent with the sigmoid gate.
    pub m_last: mlstm_tensor,
}

/// Arguments of `mlstm_chunkwise_bw` and `mlstm_parallel_bw`. Gradients have shape and dtype of
/// what they are the gradient of.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct mlstm_bw_args {
    /// sizeof(mlstm_bw_args) of the caller's header.
    pub struct_size: usize,
    /// As in the forward.
    pub problem: *const mlstm_problem,
    /// As in the forward.
    pub stream: *mut c_void,
    /// As in the forward; the backward's own size.
    pub workspace: *mut c_void,
    /// Bytes at `workspace`.
    pub workspace_size: usize,
    /// In: as in the forward.
    pub q: mlstm_tensor,
    /// In: as in the forward.
    pub k: mlstm_tensor,
    /// In: as in the forward.
    pub v: mlstm_tensor,
    /// In: as in the forward.
    pub i: mlstm_tensor,
    /// In: as in the forward.
    pub f: mlstm_tensor,
    /// In, optional: as in the forward.
    pub c_initial: mlstm_tensor,
    /// In, optional: as in the forward.
    pub n_initial: mlstm_tensor,
    /// In, optional: as in the forward.
    pub m_initial: mlstm_tensor,
    /// In, optional: as in the forward.
    pub cu_seqlens: mlstm_tensor,
    /// In: the forward's h; not needed with `MLSTM_FLAG_NO_NORMALIZE`.
    pub h: mlstm_tensor,
    /// In: the forward's n; not needed with `MLSTM_FLAG_NO_NORMALIZE`.
    pub n: mlstm_tensor,
    /// In: the forward's m. Absent with the sigmoid gate.
    pub m: mlstm_tensor,
    /// In: gradient of h.
    pub dh: mlstm_tensor,
    /// In, optional: gradient of c_last; absent means zero.
    pub dc_last: mlstm_tensor,
    /// In, optional: gradient of n_last; absent means zero.
    pub dn_last: mlstm_tensor,
    /// In, optional: gradient of m_last. Present: c_last, n_last and m_last count as three separate
    /// outputs and the gradient is literally theirs. Absent: the last state counts as the frame-
    /// invariant C e^m, n e^m, which is what a state handed on to another call is (there the two
    /// agree, since dm_initial then cancels the difference).
    pub dm_last: mlstm_tensor,
    /// Out: gradient of q.
    pub dq: mlstm_tensor,
    /// Out: gradient of k.
    pub dk: mlstm_tensor,
    /// Out: gradient of v.
    pub dv: mlstm_tensor,
    /// Out: gradient of i.
    pub di: mlstm_tensor,
    /// Out: gradient of f.
    pub df: mlstm_tensor,
    /// Out, optional, only with c_initial: its gradient. All of dc, dn (and dm) or none.
    pub dc_initial: mlstm_tensor,
    /// Out, optional: gradient of n_initial.
    pub dn_initial: mlstm_tensor,
    /// Out, optional: gradient of m_initial. Absent with the sigmoid gate.
    pub dm_initial: mlstm_tensor,
}

/// Arguments of `mlstm_step`: S = 1 to 16 tokens per row on a pool of states.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct mlstm_step_args {
    /// sizeof(mlstm_step_args) of the caller's header.
    pub struct_size: usize,
    /// As in the forward.
    pub problem: *const mlstm_problem,
    /// As in the forward.
    pub stream: *mut c_void,
    /// As in the forward.
    pub workspace: *mut c_void,
    /// Bytes at `workspace`.
    pub workspace_size: usize,
    /// In: queries (B, NH, S, DHQK).
    pub q: mlstm_tensor,
    /// In: keys (B, NH, S, DHQK).
    pub k: mlstm_tensor,
    /// In: values (B, NH, S, DHHV).
    pub v: mlstm_tensor,
    /// In: input gate pre-activations (B, NH, S).
    pub i: mlstm_tensor,
    /// In: forget gate pre-activations (B, NH, S).
    pub f: mlstm_tensor,
    /// In, and out without `c_dst`: pool of C (num_slots, NH, DHQK, DHHV).
    pub c: mlstm_tensor,
    /// In, and out without `n_dst`: pool of n (num_slots, NH, DHQK).
    pub n: mlstm_tensor,
    /// In, and out without `m_dst`: pool of m (num_slots, NH). Absent with the sigmoid gate.
    pub m: mlstm_tensor,
    /// Out, optional: another pool for the new C, of the same shape. All of c, n (and m) or none.
    pub c_dst: mlstm_tensor,
    /// Out, optional: another pool for the new n.
    pub n_dst: mlstm_tensor,
    /// Out, optional: another pool for the new m.
    pub m_dst: mlstm_tensor,
    /// In, optional (B), int32 or int64: the slot each row reads. -1 marks a padding row: nothing
    /// is read or written for it. Absent: row b uses slot b.
    pub src_slots: mlstm_tensor,
    /// In, optional (B), int32 or int64: the slot each row writes, no two rows the same; -1 stores
    /// no state (h is still written). Absent: `src_slots`. A row must not write a slot that another
    /// row reads from the same pool. Contents are checked on the CPU only.
    pub dst_slots: mlstm_tensor,
    /// In, optional (B), uint8 or int32: 0 starts the row from a zero state without reading its
    /// slot. Absent: all rows have a state.
    pub has_state: mlstm_tensor,
    /// In, optional (B), int32 or int64: tokens of the row that count, 0 to S; the others change
    /// no state and their h is not written. Absent: S.
    pub num_tokens: mlstm_tensor,
    /// Out: h (B, NH, S, DHHV).
    pub h: mlstm_tensor,
}
