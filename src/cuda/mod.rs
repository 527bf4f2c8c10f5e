//! The CUDA backend: kernels on the caller's stream, with nothing but launches on the way.

mod chunkwise;
mod driver;
mod hopper;
mod hopper_backward;
mod hopper_turns;
mod layout;
mod maps;
mod modules;
mod params;
mod step;
mod sweeps;

pub(crate) use driver::is_hopper;
pub(crate) use step::step;

use crate::dispatch::{Engine, Plan};
use crate::error::Result;
use crate::ops::{Bw, Fw};
use crate::problem::{Op, Problem};
use crate::workspace::{Stream, Workspace};

/// Loads the device's kernels.
pub(crate) fn preload(device_index: i32) -> Result<()> {
    driver::device(device_index)?.load_backward()
}

/// Loads those that an operation needs.
pub(crate) fn prepare(op: Op, device_index: i32) -> Result<()> {
    let device = driver::device(device_index)?;
    match op {
        Op::ChunkwiseBw | Op::ParallelBw => device.load_backward(),
        Op::ChunkwiseFw | Op::ParallelFw | Op::Step => Ok(()),
    }
}

/// Enqueues a forward.
pub(crate) fn forward(call: &Fw, plan: &Plan, workspace: Workspace, stream: Stream) -> Result<()> {
    match plan.engine {
        Engine::Hopper => hopper::forward(call, plan, workspace, stream),
        Engine::Cpu | Engine::Cuda => chunkwise::forward(call, plan, workspace, stream),
    }
}

/// Enqueues a backward.
pub(crate) fn backward(call: &Bw, plan: &Plan, workspace: Workspace, stream: Stream) -> Result<()> {
    match plan.engine {
        Engine::Hopper => hopper_backward::backward(call, plan, workspace, stream),
        Engine::Cpu | Engine::Cuda => chunkwise::backward(call, plan, workspace, stream),
    }
}

/// Bytes of workspace; the same on every device.
pub(crate) fn workspace_size(problem: &Problem, plan: &Plan) -> Result<usize> {
    match plan.op {
        Op::Step => step::workspace_size(problem),
        Op::ChunkwiseFw | Op::ParallelFw => layout::workspace_size(problem, plan, false),
        Op::ChunkwiseBw | Op::ParallelBw => layout::workspace_size(problem, plan, true),
    }
}
