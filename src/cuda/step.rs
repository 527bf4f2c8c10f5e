//! The launch sequence of a step.

use super::driver;
use super::layout::ceil_div;
use super::params::{self, RowIndex, StepArgs, Tensor};
use crate::error::Result;
use crate::ops::Step;
use crate::problem::Problem;
use crate::tensor::View;
use crate::workspace::{Carver, Stream, Workspace};

/// Columns of C that a block takes (kColumns in `kernels/step.cu`).
const COLUMNS: i64 = 64;

/// Decay, gain and scale of every token.
pub(super) fn workspace_size(problem: &Problem) -> Result<usize> {
    let p = problem;
    let mut carver = Carver::default();
    carver.take::<u8>((p.b * p.nh * p.s * 3) as usize * p.compute_dtype().size());
    carver.total()
}

/// Enqueues a step.
pub(crate) fn step(call: &Step, workspace: Workspace, stream: Stream) -> Result<()> {
    let (p, t) = (&call.problem, &call.tensors);
    let (c_dst, n_dst, m_dst) = call.destination();
    let args = StepArgs {
        num_slots: p.num_slots,
        b: params::size("b", p.b)?,
        nh: params::size("nh", p.nh)?,
        tokens: params::size("s", p.s)?,
        dhqk: params::size("dhqk", p.dhqk)?,
        dhhv: params::size("dhhv", p.dhhv)?,
        flags: params::flags(p),
        dtype: params::dtype(p.dtype),
        gate_dtype: params::dtype(p.gate_dtype),
        qk_scale: p.qk_scale,
        eps: p.eps,
        q: Tensor::from(&t.q),
        k: Tensor::from(&t.k),
        v: Tensor::from(&t.v),
        i: Tensor::from(&t.i),
        f: Tensor::from(&t.f),
        h: Tensor::from(&t.h),
        c: Tensor::from(&t.c),
        n: Tensor::from(&t.n),
        m: Tensor::from(&t.m),
        c_dst: Tensor::from(&c_dst),
        n_dst: Tensor::from(&n_dst),
        m_dst: Tensor::from(&m_dst),
        src_slots: RowIndex::from(&t.src_slots),
        dst_slots: RowIndex::from(&t.dst_slots),
        has_state: RowIndex::from(&t.has_state),
        num_tokens: RowIndex::from(&t.num_tokens),
        scalars: workspace.data,
    };
    let tokens = match p.s {
        1 => 1,
        2..=4 => 4,
        _ => 16,
    };
    // Elements of C that a thread moves at once: 16 bytes, fewer with many tokens.
    let wide = match p.state_dtype.size() {
        8 => 2,
        2 if tokens <= 4 => 8,
        _ => 4,
    };
    let aligned = p.dhhv % wide == 0 && rows_aligned(&t.c, wide) && rows_aligned(&c_dst, wide);
    let (vector, tokens) = match (aligned, tokens) {
        (true, tokens) => (wide, tokens),
        (false, 1) => (1, 1),
        (false, _) => (1, 16),
    };
    let state = params::suffix(p.state_dtype);
    let device = driver::device(p.device_index)?;
    let heads = p.b * p.nh;
    device.enqueue(|| {
        let acc = params::suffix(p.compute_dtype());
        device.launch(stream, &format!("step_gates_{acc}"), heads, false, &args)?;
        let name = format!("step_state_{state}_v{vector}_t{tokens}");
        device.launch(stream, &name, heads * ceil_div(p.dhhv, COLUMNS), true, &args)
    })
}

/// Whether every row of C starts at a multiple of `wide` elements.
fn rows_aligned(c: &View, wide: i64) -> bool {
    let rows = c.shape().iter().zip(c.strides()).take(3);
    (c.data as usize).is_multiple_of(wide as usize * c.dtype.size())
        && rows.into_iter().all(|(&size, &stride)| size <= 1 || stride % wide == 0)
}
