//! The exported functions.

#![allow(non_camel_case_types, reason = "C naming")]

use std::ffi::c_char;

use super::types::*;
use super::{convert, reader, status};
use crate::api;
use crate::problem::{Op, ProblemSpec};
use crate::workspace::Stream;

/// Version of the library: major << 16 | minor << 8 | patch.
#[unsafe(no_mangle)]
pub extern "C" fn mlstm_version() -> u32 {
    MLSTM_VERSION_MAJOR << 16 | MLSTM_VERSION_MINOR << 8 | MLSTM_VERSION_PATCH
}

/// The name of a status, e.g. "MLSTM_OK"; never NULL, static memory.
#[unsafe(no_mangle)]
pub extern "C" fn mlstm_status_name(status: mlstm_status) -> *const c_char {
    status::name(status).as_ptr()
}

/// What went wrong in this thread's last call that returned a status, naming the argument, what
/// was expected and what came; "" after a success. Valid until the thread's next such call or end.
#[unsafe(no_mangle)]
pub extern "C" fn mlstm_last_error() -> *const c_char {
    status::last_message()
}

/// Workspace and chunking that `op` needs for this problem.
///
/// # Safety
/// `problem` and `out` are NULL or point to their structs, `struct_size` set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mlstm_query(
    op: mlstm_op,
    problem: *const mlstm_problem,
    out: *mut mlstm_requirements,
) -> mlstm_status {
    status::guard(|| {
        let op = convert::op(op)?;
        // SAFETY: the caller's contract.
        let spec = unsafe { read_problem(problem) }?;
        let needs = api::query(op, &spec)?;
        let value = mlstm_requirements {
            struct_size: size_of::<mlstm_requirements>(),
            workspace_size: needs.workspace_size,
            workspace_alignment: needs.workspace_alignment,
            chunk_size: needs.chunk_size,
            num_chunks: needs.num_chunks,
        };
        // SAFETY: the caller's contract.
        unsafe { reader::write("out", out, value) }
    })
}

/// Does ahead of time what the first call on a device would do: starts the CPU's worker threads,
/// loads a GPU's kernels. Needed only before CUDA graph capture.
#[unsafe(no_mangle)]
pub extern "C" fn mlstm_preload(device: mlstm_device, device_index: i32) -> mlstm_status {
    status::guard(|| api::preload(convert::device("device", device)?, device_index))
}

/// Forward over a sequence in chunks: time linear in S.
///
/// # Safety
/// `args` is NULL or points to its struct, `struct_size` set; tensors are valid memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mlstm_chunkwise_fw(args: *const mlstm_fw_args) -> mlstm_status {
    // SAFETY: the caller's contract.
    status::guard(|| unsafe { forward(Op::ChunkwiseFw, args) })
}

/// The exact gradient of `mlstm_chunkwise_fw`.
///
/// # Safety
/// As for `mlstm_chunkwise_fw`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mlstm_chunkwise_bw(args: *const mlstm_bw_args) -> mlstm_status {
    // SAFETY: the caller's contract.
    status::guard(|| unsafe { backward(Op::ChunkwiseBw, args) })
}

/// Forward with all pairs of tokens: time quadratic in S, like attention.
///
/// # Safety
/// As for `mlstm_chunkwise_fw`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mlstm_parallel_fw(args: *const mlstm_fw_args) -> mlstm_status {
    // SAFETY: the caller's contract.
    status::guard(|| unsafe { forward(Op::ParallelFw, args) })
}

/// The exact gradient of `mlstm_parallel_fw`.
///
/// # Safety
/// As for `mlstm_chunkwise_fw`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mlstm_parallel_bw(args: *const mlstm_bw_args) -> mlstm_status {
    // SAFETY: the caller's contract.
    status::guard(|| unsafe { backward(Op::ParallelBw, args) })
}

/// Generation: 1 to 16 tokens per row on a pool of states.
///
/// # Safety
/// As for `mlstm_chunkwise_fw`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mlstm_step(args: *const mlstm_step_args) -> mlstm_status {
    status::guard(|| {
        // SAFETY: the caller's contract.
        let (args, spec) = unsafe {
            let args = reader::read("args", args)?;
            (args, read_problem(args.problem)?)
        };
        let workspace = convert::workspace(args.workspace, args.workspace_size);
        api::step_views(&spec, convert::step_tensors(&args)?, workspace, Stream(args.stream))
    })
}

/// # Safety
/// As for `reader::read`.
unsafe fn read_problem(problem: *const mlstm_problem) -> crate::Result<ProblemSpec> {
    // SAFETY: the caller's contract.
    convert::problem(&unsafe { reader::read("problem", problem) }?)
}

/// # Safety
/// As for `mlstm_chunkwise_fw`.
unsafe fn forward(op: Op, args: *const mlstm_fw_args) -> crate::Result<()> {
    // SAFETY: the caller's contract.
    let (args, spec) = unsafe {
        let args = reader::read("args", args)?;
        (args, read_problem(args.problem)?)
    };
    let workspace = convert::workspace(args.workspace, args.workspace_size);
    api::forward_views(op, &spec, convert::fw_tensors(&args)?, workspace, Stream(args.stream))
}

/// # Safety
/// As for `mlstm_chunkwise_fw`.
unsafe fn backward(op: Op, args: *const mlstm_bw_args) -> crate::Result<()> {
    // SAFETY: the caller's contract.
    let (args, spec) = unsafe {
        let args = reader::read("args", args)?;
        (args, read_problem(args.problem)?)
    };
    let workspace = convert::workspace(args.workspace, args.workspace_size);
    api::backward_views(op, &spec, convert::bw_tensors(&args)?, workspace, Stream(args.stream))
}
