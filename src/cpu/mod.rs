//! The CPU backend: SIMD by level, threads of its own, results that do not depend on either the
//! number of threads or the run.
//!
//! `level` picks a table of vector kernels (`table`, whose bodies are `gemm`, `vecops` and
//! `step_tile` on the vectors of `simd`); `forward`, `backward` and `step` arrange them into
//! operations on lanes (`lanes`), with everything they keep in the caller's workspace (`layout`).

mod backward;
mod codec;
mod forward;
mod gates;
mod gemm;
mod lanes;
mod layout;
mod level;
mod pool;
mod real;
#[allow(
    clippy::indexing_slicing,
    reason = "the oracle is read by people; its sizes are checked by its callers"
)]
pub mod reference;
mod simd;
#[cfg(target_arch = "x86_64")]
mod simd_x86;
mod states;
mod step;
mod step_tile;
mod table;
#[cfg(test)]
mod tests;
mod vecops;
mod wave;

use crate::dispatch::Plan;
use crate::error::Result;
use crate::ops::{Bw, Fw, Step};
use crate::problem::{Op, Problem};
use crate::tensor::DType;
use crate::workspace::Workspace;

use layout::Layout;
use level::Level;
use step::StepLayout;

/// Multiply-adds that are worth waking other threads for.
const WORTH_THREADS: i64 = 1 << 21;

/// Starts the threads and looks at the CPU.
pub(crate) fn preload() {
    pool::threads();
    Level::current();
}

/// Bytes of workspace that a plan needs.
pub(crate) fn workspace_size(problem: &Problem, plan: &Plan) -> Result<usize> {
    Ok(match (plan.op, problem.compute_dtype()) {
        (Op::Step, DType::F64) => StepLayout::new::<f64>(problem)?.bytes,
        (Op::Step, _) => StepLayout::new::<f32>(problem)?.bytes,
        (_, DType::F64) => Layout::new::<f64>(problem, plan)?.bytes,
        (_, _) => Layout::new::<f32>(problem, plan)?.bytes,
    })
}

/// Threads for a problem with chunks of this length.
fn threads_for(problem: &Problem, chunk: i64) -> usize {
    let p = problem;
    let per_token = p.dhqk * p.dhhv * 2 + chunk * (p.dhqk + p.dhhv);
    let total = p.b.saturating_mul(p.nh).saturating_mul(p.s).saturating_mul(per_token);
    if total < WORTH_THREADS { 1 } else { pool::threads() }
}

/// Runs a forward.
pub(crate) fn forward(op: &Fw, plan: &Plan, workspace: Workspace) -> Result<()> {
    let threads = threads_for(&op.problem, plan.chunk_size);
    forward_at(op, plan, workspace, Level::current(), threads)
}

fn forward_at(
    op: &Fw,
    plan: &Plan,
    workspace: Workspace,
    level: Level,
    threads: usize,
) -> Result<()> {
    match op.problem.compute_dtype() {
        DType::F64 => forward::run::<f64>(op, plan, workspace, level, threads),
        _ => forward::run::<f32>(op, plan, workspace, level, threads),
    }
}

/// Runs a backward.
pub(crate) fn backward(op: &Bw, plan: &Plan, workspace: Workspace) -> Result<()> {
    let threads = threads_for(&op.problem, plan.chunk_size);
    backward_at(op, plan, workspace, Level::current(), threads)
}

fn backward_at(
    op: &Bw,
    plan: &Plan,
    workspace: Workspace,
    level: Level,
    threads: usize,
) -> Result<()> {
    match op.problem.compute_dtype() {
        DType::F64 => backward::run::<f64>(op, plan, workspace, level, threads),
        _ => backward::run::<f32>(op, plan, workspace, level, threads),
    }
}

/// Runs a step.
pub(crate) fn step(op: &Step, _plan: &Plan, workspace: Workspace) -> Result<()> {
    let p = &op.problem;
    // Bound by memory: the states count, whatever the number of tokens.
    let elements = p.b.saturating_mul(p.nh).saturating_mul(p.dhqk).saturating_mul(p.dhhv);
    let threads = if elements < 1 << 17 { 1 } else { pool::threads() };
    step_at(op, workspace, Level::current(), threads)
}

fn step_at(op: &Step, workspace: Workspace, level: Level, threads: usize) -> Result<()> {
    match op.problem.compute_dtype() {
        DType::F64 => step::run::<f64>(op, workspace, level, threads),
        _ => step::run::<f32>(op, workspace, level, threads),
    }
}
