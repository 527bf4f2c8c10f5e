//! Rust entry points: validate (`ops`), decide (`dispatch`), run (a backend). The C ABI calls the
//! `*_views` functions; Rust users call the functions on borrowed [`Tensor`]s.

use crate::cpu;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::dispatch::{self, Capabilities, Engine, Plan};
use crate::error::{Error, Result};
use crate::ops::{Bw, BwTensors, Fw, FwTensors, Step, StepTensors};
use crate::problem::{Device, Op, Problem, ProblemSpec};
use crate::tensor::{Tensor, TensorMut, View};
use crate::workspace::{ALIGNMENT, Stream, Workspace};

/// What a call needs from its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Requirements {
    /// Bytes of workspace.
    pub workspace_size: usize,
    /// Alignment of the workspace.
    pub workspace_alignment: usize,
    /// Resolved chunk length L.
    pub chunk_size: i64,
    /// Resolved number of chunks NC (an upper bound with packed sequences).
    pub num_chunks: i64,
}

/// `hopper`: see [`Capabilities`].
fn decide(op: Op, problem: &Problem, hopper: bool) -> Result<(Plan, usize)> {
    let capabilities = Capabilities { has_cuda: cfg!(feature = "cuda"), hopper };
    let plan = dispatch::plan(op, problem, capabilities).ok_or_else(no_cuda)?;
    let bytes = match plan.engine {
        Engine::Cpu => cpu::workspace_size(problem, &plan)?,
        Engine::Cuda | Engine::Hopper => cuda::workspace_size(problem, &plan)?,
    };
    Ok((plan, bytes))
}

/// A decision for a call that will run, on a device that is there. `tiled`: whether the tensors are
/// such that a GPU's copy engine can take them.
fn decide_to_run(op: Op, problem: &Problem, tiled: bool) -> Result<(Plan, usize)> {
    if problem.device == Device::Cpu {
        return decide(op, problem, false);
    }
    // What the problem lacks comes before what the machine lacks.
    let generic = decide(op, problem, false)?;
    cuda::prepare(op, problem.device_index)?;
    if tiled && cuda::is_hopper(problem.device_index) == Some(true) {
        return decide(op, problem, true);
    }
    Ok(generic)
}

/// What a build without the CUDA backend calls in its place; plans never lead here.
#[cfg(not(feature = "cuda"))]
mod cuda {
    use super::*;

    pub(super) fn workspace_size(_problem: &Problem, _plan: &Plan) -> Result<usize> {
        Err(no_cuda())
    }

    pub(super) fn preload(_device_index: i32) -> Result<()> {
        Err(no_cuda())
    }

    pub(super) fn prepare(_op: Op, _device_index: i32) -> Result<()> {
        Err(no_cuda())
    }

    pub(super) fn is_hopper(_device_index: i32) -> Option<bool> {
        None
    }

    pub(super) fn forward(_: &Fw, _: &Plan, _: Workspace, _: Stream) -> Result<()> {
        Err(no_cuda())
    }

    pub(super) fn backward(_: &Bw, _: &Plan, _: Workspace, _: Stream) -> Result<()> {
        Err(no_cuda())
    }

    pub(super) fn step(_: &Step, _: Workspace, _: Stream) -> Result<()> {
        Err(no_cuda())
    }
}

fn no_cuda() -> Error {
    Error::Device(
        "this build of libmlstm has no CUDA backend; pass CPU memory and MLSTM_DEVICE_CPU, or \
         build it with the feature `cuda`"
            .into(),
    )
}

/// Workspace and chunking of `op` on this problem.
///
/// # Errors
/// As the call itself would fail on the problem alone.
pub fn query(op: Op, spec: &ProblemSpec) -> Result<Requirements> {
    let problem = spec.validate(op)?;
    let is_hopper = match problem.device {
        Device::Cpu => Some(false),
        Device::Cuda => cuda::is_hopper(problem.device_index),
    };
    let (plan, mut workspace_size) = decide(op, &problem, is_hopper != Some(false))?;
    if is_hopper.is_none() || !problem.aligned {
        // Calls may end up on the generic engine.
        workspace_size = workspace_size.max(decide(op, &problem, false)?.1);
    }
    Ok(Requirements {
        workspace_size,
        workspace_alignment: ALIGNMENT,
        chunk_size: plan.chunk_size,
        num_chunks: plan.num_chunks,
    })
}

/// Loads what calls on the device need, so that the first call does not pay for it.
///
/// # Errors
/// [`Error::Device`] without that device.
pub fn preload(device: Device, device_index: i32) -> Result<()> {
    match device {
        Device::Cpu => {
            cpu::preload();
            Ok(())
        }
        Device::Cuda => cuda::preload(device_index),
    }
}

/// Where a call's workspace comes from.
pub(crate) enum Memory<'a> {
    /// The caller's, which may be too small or overlap a tensor.
    Caller(Workspace),
    /// Ours, grown once everything else is known to be valid.
    Scratch(&'a mut Scratch),
}

impl Memory<'_> {
    /// The part of it that tensors must not overlap.
    fn view(&self, bytes: usize) -> View {
        match self {
            Self::Caller(workspace) => workspace.view(bytes),
            Self::Scratch(_) => Workspace::NONE.view(0),
        }
    }

    fn get(self, bytes: usize) -> Result<Workspace> {
        match self {
            Self::Caller(workspace) => workspace.check(bytes).map(|()| workspace),
            Self::Scratch(scratch) => scratch.reserve(bytes),
        }
    }
}

pub(crate) fn forward_views(
    op: Op,
    spec: &ProblemSpec,
    tensors: FwTensors,
    memory: Memory<'_>,
    stream: Stream,
) -> Result<()> {
    let problem = spec.validate(op)?;
    let (plan, bytes) = decide_to_run(op, &problem, tensors.suit_copy_engine())?;
    let call = Fw::new(problem, tensors, &memory.view(bytes))?;
    let workspace = memory.get(bytes)?;
    match plan.engine {
        Engine::Cpu => cpu::forward(&call, &plan, workspace),
        Engine::Cuda | Engine::Hopper => cuda::forward(&call, &plan, workspace, stream),
    }
}

pub(crate) fn backward_views(
    op: Op,
    spec: &ProblemSpec,
    tensors: BwTensors,
    memory: Memory<'_>,
    stream: Stream,
) -> Result<()> {
    let problem = spec.validate(op)?;
    let (plan, bytes) = decide_to_run(op, &problem, tensors.suit_copy_engine())?;
    let call = Bw::new(problem, tensors, &memory.view(bytes))?;
    let workspace = memory.get(bytes)?;
    match plan.engine {
        Engine::Cpu => cpu::backward(&call, &plan, workspace),
        Engine::Cuda | Engine::Hopper => cuda::backward(&call, &plan, workspace, stream),
    }
}

pub(crate) fn step_views(
    spec: &ProblemSpec,
    tensors: StepTensors,
    memory: Memory<'_>,
    stream: Stream,
) -> Result<()> {
    let problem = spec.validate(Op::Step)?;
    let (plan, bytes) = decide_to_run(Op::Step, &problem, false)?;
    let call = Step::new(problem, tensors, &memory.view(bytes))?;
    let workspace = memory.get(bytes)?;
    match plan.engine {
        Engine::Cpu => cpu::step(&call, &plan, workspace),
        Engine::Cuda | Engine::Hopper => cuda::step(&call, workspace, stream),
    }
}

/// Scratch memory of the safe API: aligned, grown when needed, reusable over calls.
#[derive(Debug, Default)]
pub struct Scratch {
    lines: Vec<Line>,
}

/// One aligned unit of [`Scratch`].
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code, reason = "only its address is used")] [u8; ALIGNMENT]);

impl Scratch {
    /// An empty one.
    pub const fn new() -> Self {
        Self { lines: Vec::new() }
    }

    fn reserve(&mut self, bytes: usize) -> Result<Workspace> {
        let missing = bytes.div_ceil(ALIGNMENT).saturating_sub(self.lines.len());
        if missing > 0 {
            self.lines.try_reserve_exact(missing).map_err(|_| {
                Error::Device(format!("no memory for a workspace of {bytes} bytes"))
            })?;
            self.lines.resize(self.lines.len() + missing, Line([0; ALIGNMENT]));
        }
        Ok(Workspace {
            data: self.lines.as_mut_ptr().cast::<u8>(),
            len: self.lines.len() * ALIGNMENT,
        })
    }
}

/// Inputs of a forward; shapes as in [`FwTensors`].
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs, reason = "as in FwTensors")]
pub struct Inputs<'a> {
    pub q: Tensor<'a>,
    pub k: Tensor<'a>,
    pub v: Tensor<'a>,
    pub i: Tensor<'a>,
    pub f: Tensor<'a>,
    /// (C, n, m) before the first token; m is `None` with the sigmoid gate.
    pub initial: Option<State<'a>>,
    /// Packed sequences: (num_seqs + 1) offsets into the tokens, int32 or int64.
    pub cu_seqlens: Option<Tensor<'a>>,
}

/// A borrowed state (C, n, m).
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs, reason = "as in FwTensors")]
pub struct State<'a> {
    pub c: Tensor<'a>,
    pub n: Tensor<'a>,
    pub m: Option<Tensor<'a>>,
}

/// A state (C, n, m) to be written.
#[derive(Debug)]
#[allow(missing_docs, reason = "as in FwTensors")]
pub struct StateMut<'a> {
    pub c: TensorMut<'a>,
    pub n: TensorMut<'a>,
    pub m: Option<TensorMut<'a>>,
}

/// Outputs of a forward.
#[derive(Debug)]
#[allow(missing_docs, reason = "as in FwTensors")]
pub struct Outputs<'a> {
    pub h: TensorMut<'a>,
    /// N_t and m_t per token, needed by the backward.
    pub n: Option<TensorMut<'a>>,
    pub m: Option<TensorMut<'a>>,
    pub last: Option<StateMut<'a>>,
}

/// What a backward reads besides the forward's inputs.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs, reason = "as in BwTensors")]
pub struct Saved<'a> {
    pub h: Option<Tensor<'a>>,
    pub n: Option<Tensor<'a>>,
    pub m: Option<Tensor<'a>>,
    pub dh: Tensor<'a>,
    pub dc_last: Option<Tensor<'a>>,
    pub dn_last: Option<Tensor<'a>>,
    pub dm_last: Option<Tensor<'a>>,
}

/// Gradients, each shaped like its input.
#[derive(Debug)]
#[allow(missing_docs, reason = "as in BwTensors")]
pub struct Gradients<'a> {
    pub dq: TensorMut<'a>,
    pub dk: TensorMut<'a>,
    pub dv: TensorMut<'a>,
    pub di: TensorMut<'a>,
    pub df: TensorMut<'a>,
    pub initial: Option<StateMut<'a>>,
}

fn run_forward(
    op: Op,
    spec: &ProblemSpec,
    inputs: &Inputs<'_>,
    outputs: &mut Outputs<'_>,
    scratch: &mut Scratch,
) -> Result<()> {
    let initial = inputs.initial;
    let last = outputs.last.as_ref();
    let tensors = FwTensors {
        q: inputs.q.view,
        k: inputs.k.view,
        v: inputs.v.view,
        i: inputs.i.view,
        f: inputs.f.view,
        c_initial: initial.map(|state| state.c.view),
        n_initial: initial.map(|state| state.n.view),
        m_initial: initial.and_then(|state| state.m).map(|m| m.view),
        cu_seqlens: inputs.cu_seqlens.map(|offsets| offsets.view),
        h: outputs.h.view,
        n: outputs.n.as_ref().map(|n| n.view),
        m: outputs.m.as_ref().map(|m| m.view),
        c_last: last.map(|state| state.c.view),
        n_last: last.map(|state| state.n.view),
        m_last: last.and_then(|state| state.m.as_ref()).map(|m| m.view),
    };
    forward_views(op, host(spec)?, tensors, Memory::Scratch(scratch), Stream::DEFAULT)
}

fn run_backward(
    op: Op,
    spec: &ProblemSpec,
    inputs: &Inputs<'_>,
    saved: &Saved<'_>,
    gradients: &mut Gradients<'_>,
    scratch: &mut Scratch,
) -> Result<()> {
    let initial = inputs.initial;
    let d_initial = gradients.initial.as_ref();
    let tensors = BwTensors {
        q: inputs.q.view,
        k: inputs.k.view,
        v: inputs.v.view,
        i: inputs.i.view,
        f: inputs.f.view,
        c_initial: initial.map(|state| state.c.view),
        n_initial: initial.map(|state| state.n.view),
        m_initial: initial.and_then(|state| state.m).map(|m| m.view),
        cu_seqlens: inputs.cu_seqlens.map(|offsets| offsets.view),
        h: saved.h.map(|h| h.view),
        n: saved.n.map(|n| n.view),
        m: saved.m.map(|m| m.view),
        dh: saved.dh.view,
        dc_last: saved.dc_last.map(|dc| dc.view),
        dn_last: saved.dn_last.map(|dn| dn.view),
        dm_last: saved.dm_last.map(|dm| dm.view),
        dq: gradients.dq.view,
        dk: gradients.dk.view,
        dv: gradients.dv.view,
        di: gradients.di.view,
        df: gradients.df.view,
        dc_initial: d_initial.map(|state| state.c.view),
        dn_initial: d_initial.map(|state| state.n.view),
        dm_initial: d_initial.and_then(|state| state.m.as_ref()).map(|m| m.view),
    };
    backward_views(op, host(spec)?, tensors, Memory::Scratch(scratch), Stream::DEFAULT)
}

/// The safe API borrows slices, which live in host memory.
fn host(spec: &ProblemSpec) -> Result<&ProblemSpec> {
    match spec.device {
        Device::Cpu => Ok(spec),
        Device::Cuda => Err(Error::invalid("problem.device", "Cpu in the safe API", "Cuda")),
    }
}

macro_rules! forward_and_backward {
    ($fw:ident, $fw_op:expr, $bw:ident, $bw_op:expr, $what:literal) => {
        #[doc = concat!("The ", $what, " forward of h, and of n, m and the last states if asked for.")]
        ///
        /// # Errors
        /// [`Error::InvalidArgument`] naming the argument; nothing is written then.
        pub fn $fw(
            problem: &ProblemSpec,
            inputs: &Inputs<'_>,
            outputs: &mut Outputs<'_>,
            scratch: &mut Scratch,
        ) -> Result<()> {
            run_forward($fw_op, problem, inputs, outputs, scratch)
        }

        #[doc = concat!("The exact gradient of the ", $what, " forward.")]
        ///
        /// # Errors
        /// [`Error::InvalidArgument`] naming the argument; nothing is written then.
        pub fn $bw(
            problem: &ProblemSpec,
            inputs: &Inputs<'_>,
            saved: &Saved<'_>,
            gradients: &mut Gradients<'_>,
            scratch: &mut Scratch,
        ) -> Result<()> {
            run_backward($bw_op, problem, inputs, saved, gradients, scratch)
        }
    };
}

forward_and_backward!(
    chunkwise_fw,
    Op::ChunkwiseFw,
    chunkwise_bw,
    Op::ChunkwiseBw,
    "chunkwise (linear-time)"
);
forward_and_backward!(
    parallel_fw,
    Op::ParallelFw,
    parallel_bw,
    Op::ParallelBw,
    "parallel (quadratic-time)"
);

/// Slot indices and flags of a step, each (B); `None` for row b in slot b with a state.
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs, reason = "as in StepTensors")]
pub struct Slots<'a> {
    pub src_slots: Option<Tensor<'a>>,
    pub dst_slots: Option<Tensor<'a>>,
    pub has_state: Option<Tensor<'a>>,
    pub num_tokens: Option<Tensor<'a>>,
}

/// 1 to 16 tokens per row (`inputs.initial` and `cu_seqlens` must be `None`), the pools updated in
/// place.
///
/// # Errors
/// [`Error::InvalidArgument`] naming the argument; nothing is written then.
pub fn step(
    problem: &ProblemSpec,
    inputs: &Inputs<'_>,
    pools: &mut StateMut<'_>,
    slots: &Slots<'_>,
    h: &mut TensorMut<'_>,
    scratch: &mut Scratch,
) -> Result<()> {
    if inputs.initial.is_some() || inputs.cu_seqlens.is_some() {
        return Err(Error::invalid(
            "inputs",
            "initial and cu_seqlens to be None in a step (states come from the pools)",
            "a tensor",
        ));
    }
    let tensors = StepTensors {
        q: inputs.q.view,
        k: inputs.k.view,
        v: inputs.v.view,
        i: inputs.i.view,
        f: inputs.f.view,
        c: pools.c.view,
        n: pools.n.view,
        m: pools.m.as_ref().map(|m| m.view),
        c_dst: None,
        n_dst: None,
        m_dst: None,
        src_slots: slots.src_slots.map(|s| s.view),
        dst_slots: slots.dst_slots.map(|s| s.view),
        has_state: slots.has_state.map(|s| s.view),
        num_tokens: slots.num_tokens.map(|s| s.view),
        h: h.view,
    };
    step_views(host(problem)?, tensors, Memory::Scratch(scratch), Stream::DEFAULT)
}
