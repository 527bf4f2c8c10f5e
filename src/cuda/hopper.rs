//! The launch sequences of the kernels for the H100 and H200 (`kernels/*_sm90.cu`).

use super::chunkwise::{self, Run};
use super::driver;
use super::layout::{self, PACKED_BYTES, ceil_div, padded_dhqk};
use super::maps;
use super::params::HopperArgs;
use super::step;
use super::sweeps::{self, Vectors};
use crate::dispatch::{self, Plan};
use crate::error::Result;
use crate::ops::{Fw, Step, StepTensors};
use crate::problem::Problem;
use crate::workspace::{Stream, Workspace};

/// Most tokens of a forward that may run as a step: to bring C into a sweep's registers and back takes 11
/// us for one sequence at 256 x 512 on an H200, all of a step 7.5 and 2.5 for each token more.
const fn most_step_tokens(problem: &Problem) -> i64 {
    if problem.dhqk * problem.dhhv < 128 * 256 { 1 } else { 3 }
}

/// A forward of few tokens, from states to states and without what a backward needs, as a step.
fn as_step(call: &Fw) -> Option<Step> {
    let (p, t) = (&call.problem, &call.tensors);
    let plain = t.n.is_none() && t.m.is_none() && t.cu_seqlens.is_none();
    if p.s > most_step_tokens(p) || !plain {
        return None;
    }
    let (m, m_dst) = (t.m_initial, t.m_last);
    if p.gate.has_stabilizer() && (m.is_none() || m_dst.is_none()) {
        return None;
    }
    let tensors = StepTensors {
        q: t.q,
        k: t.k,
        v: t.v,
        i: t.i,
        f: t.f,
        c: t.c_initial?,
        n: t.n_initial?,
        m,
        c_dst: Some(t.c_last?),
        n_dst: Some(t.n_last?),
        m_dst,
        src_slots: None,
        dst_slots: None,
        has_state: None,
        num_tokens: None,
        h: t.h,
    };
    Some(Step { problem: *p, tensors })
}

/// Enqueues a forward.
pub(super) fn forward(call: &Fw, plan: &Plan, workspace: Workspace, stream: Stream) -> Result<()> {
    if let Some(call) = as_step(call) {
        return step::step(&call, workspace, stream);
    }
    let (p, t) = (&call.problem, &call.tensors);
    let args = chunkwise::forward_args(call, plan, workspace)?;
    let run = Run { device: driver::device(p.device_index)?, stream, problem: p, args };
    let (dhqk, columns) = (padded_dhqk(p), dispatch::hopper_rows(p.dhhv, p.dhqk));
    let shape = format!("{}_{dhqk}x{columns}", run.data());
    let blocks = run.heads() * ceil_div(p.dhhv, columns);
    let vectors = (!layout::makes_vectors(p, plan)).then(|| Vectors {
        first: args.buffers.packed,
        pitch: PACKED_BYTES,
        count: args.num_chunks * p.nh,
    });
    run.device.enqueue(|| {
        let hopper = HopperArgs {
            q: maps::tensor_map(&t.q, dhqk / 64)?,
            k: maps::tensor_map(&t.k, 1)?,
            v: maps::tensor_map(&t.v, columns / 64)?,
            h: maps::tensor_map(&t.h, 1)?,
            packed: match vectors {
                Some(vectors) => vectors.map(0..PACKED_BYTES)?,
                None => maps::tensor_map(&t.q, dhqk / 64)?, // not used
            },
            args,
        };
        match vectors {
            Some(_) => gates(&run)?,
            None => run.chunk_table()?,
        }
        if let Some(vectors) = vectors
            && plan.summed_segments() > 0
        {
            sweeps::segment_states(&run, "segments_c", &t.v, &t.k, &vectors)?;
        }
        let kernel = match (plan.catch_up, vectors) {
            (true, _) => "catch_up",
            (false, None) => "gated",
            (false, Some(_)) => "forward",
        };
        let name = format!("hopper_{kernel}_{shape}");
        // The first kernel of a call does not overlap others'.
        let overlap = vectors.is_some() || p.num_seqs.is_some();
        run.device.launch(stream, &name, blocks * plan.segments, overlap, &hopper)
    })
}

/// Chunks of a sequence that `gates_whole` is made for.
const WHOLE_CHUNKS: [i64; 5] = [16, 32, 64, 128, 256];

/// Most threads of `gates_whole` where many may have nothing to do: what a device holds at once.
const ONE_WAVE: i64 = 1024 * 132;

/// The gates' vectors: in one kernel where a cluster of blocks can hold a sequence's chunks.
fn gates(run: &Run<'_>) -> Result<()> {
    let (p, data) = (run.problem, run.data());
    let packed = p.num_seqs.is_some();
    let chunks = ceil_div(p.s, i64::from(run.args.chunk_len));
    let whole = WHOLE_CHUNKS.into_iter().find(|&most| chunks <= most).and_then(|most| {
        // Two blocks for each row would not all run at once, on 132 multiprocessors.
        let many = most == 128 && run.heads() * 2 > 132;
        let name = format!("gates_{}_{data}_{most}", if many { "many" } else { "whole" });
        let geometry = run.device.geometry(&name)?;
        let blocks = run.heads() * i64::from(geometry.cols);
        // Packed sequences may be many and short.
        let suits = !packed || blocks * i64::from(geometry.threads) <= ONE_WAVE;
        suits.then_some((name, blocks))
    });
    match whole {
        Some((name, blocks)) if p.gate.has_stabilizer() => {
            run.chunk_table()?;
            run.device.launch(run.stream, &name, blocks, packed, &run.args)
        }
        _ => run.gates_by("gates_reduce_fast", &format!("gates_pack_{data}")),
    }
}
