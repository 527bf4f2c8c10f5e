//! The launch sequence of the backward for the H100 and H200 (`kernels/backward_*_sm90.cu`).

use std::ops::Range;

use super::chunkwise::{self, Run};
use super::driver;
use super::hopper_turns::{Turn, boundary_parts, turns};
use super::layout::{BACKWARD_BYTES, GROUP_CHUNKS, ceil_div, qk_tiles};
use super::maps;
use super::params::{self, Args, BackwardArgs, CopyArgs, Tensor, TensorMap};
use super::sweeps::{self, Sweep, Vectors};
use crate::dispatch::Plan;
use crate::error::Result;
use crate::ops::{Bw, BwTensors};
use crate::tensor::{DType, View};
use crate::workspace::{Stream, Workspace};

/// The tensors of one sweep, as q', k' and v' of `kernels/backward_sm90.cuh`.
pub(super) struct Tiles<'a> {
    queries: &'a View,
    keys: &'a View,
    values: &'a View,
    own: &'a View,
    out: &'a View,
}

/// What the sweeps leave each other and `gates_pack_backward` leaves them, by chunk and head.
#[derive(Clone, Copy)]
pub(super) struct Records {
    scores: TensorMap,
    rho: TensorMap,
    pub(super) vectors: Vectors,
}

impl Records {
    /// The same with parts of rho.
    pub(super) const fn with_rho(self, rho: TensorMap) -> Self {
        Self { rho, ..self }
    }
}

/// Bytes of a chunk's vectors that a sweep needs: `kVectorFrom` to `kVectorTo`.
const DV_VECTORS: Range<usize> = 1024..2064;
pub(super) const DQ_VECTORS: Range<usize> = 0..1552;
pub(super) const DK_VECTORS: Range<usize> = 1024..BACKWARD_BYTES;

impl<'a> Tiles<'a> {
    fn dv(t: &'a BwTensors) -> Self {
        // h is not read where it is absent.
        let h = t.h.as_ref().unwrap_or(&t.dh);
        Self { queries: &t.k, keys: &t.q, values: &t.dh, own: h, out: &t.dv }
    }

    /// With some columns of dh and v.
    pub(super) fn dq(t: &'a BwTensors, dh: &'a View, v: &'a View) -> Self {
        Self { queries: dh, keys: v, values: &t.k, own: &t.q, out: &t.dq }
    }

    pub(super) fn dk(t: &'a BwTensors, dh: &'a View, v: &'a View) -> Self {
        Self { queries: v, keys: dh, values: &t.q, own: &t.k, out: &t.dk }
    }

    pub(super) fn maps(
        &self,
        sweep: &Sweep,
        records: &Records,
        vectors: Range<usize>,
    ) -> Result<[TensorMap; 8]> {
        Ok([
            maps::tensor_map(self.queries, 1)?,
            maps::tensor_map(self.keys, sweep.unit_slabs())?,
            maps::tensor_map(self.values, sweep.block_slabs())?,
            maps::tensor_map(self.own, sweep.block_slabs())?,
            maps::tensor_map(self.out, 1)?,
            records.scores,
            records.vectors.map(vectors)?,
            records.rho,
        ])
    }
}

/// Enqueues a backward.
pub(super) fn backward(call: &Bw, plan: &Plan, workspace: Workspace, stream: Stream) -> Result<()> {
    let (p, t) = (&call.problem, &call.tensors);
    let mut args = chunkwise::backward_args(call, plan, workspace)?;
    let sweep_dv = Sweep::of(p.dhhv, p.dhqk);
    args.qk_tiles = params::size("dhqk", qk_tiles(p))?;
    args.boundary_parts = params::size("dhhv", boundary_parts(p))?;
    args.rho_parts = params::size("dhhv", sweep_dv.blocks())?;

    let device = driver::device(p.device_index)?;
    let (args, copies) = with_float_states(call, args);
    let run = Run { device, stream, problem: p, args };
    let chunks = args.num_chunks * p.nh;
    // What is left of scores; other sweeps take no notice of it.
    let mut scores = t.q;
    if !args.buffers.scores.is_null() {
        scores.data = args.buffers.scores;
        scores.shape = [1, 1, chunks * 64, 64];
        scores.stride = [chunks * 64 * 64, chunks * 64 * 64, 64, 1];
    }
    let vectors = Vectors { first: args.buffers.packed, pitch: BACKWARD_BYTES, count: chunks };

    let data = run.data();
    let heads = run.heads();
    let launch = |name: &str, blocks: i64, maps: [TensorMap; 8], args: Args| {
        device.launch(stream, name, blocks, true, &BackwardArgs { maps, args })
    };
    device.enqueue(|| {
        let scores = maps::tensor_map(&scores, 1)?;
        // Turns have their own rho.
        let records = Records { scores, rho: scores, vectors };
        let dv_maps = Tiles::dv(t).maps(&sweep_dv, &records, DV_VECTORS)?;
        let turns = turns(p, t, &args, &records)?;
        for copy in &copies.before {
            device.launch(stream, "copy_states", heads * p.dhqk, false, copy)?;
        }
        run.gates_by("gates_reduce_fast", "gates_pack_backward")?;
        if plan.segments > 1 {
            sweeps::segment_states(&run, "segments_c", &t.v, &t.k, &vectors)?;
            sweeps::segment_states(&run, "segments_dc", &t.dh, &t.q, &vectors)?;
        }
        let blocks = heads * plan.segments;
        launch(&sweep_dv.kernel("backward_dv", data), blocks * sweep_dv.blocks(), dv_maps, args)?;
        for Turn { sweep, args, dq, dk } in &turns {
            let blocks = blocks * sweep.blocks();
            launch(&sweep.kernel("backward_dq", data), blocks, *dq, *args)?;
            if plan.segments > 1 {
                let blocks = heads * ceil_div(p.dhqk, 64) * (plan.segments - 1);
                launch(&format!("segments_dn_{data}"), blocks, *dq, *args)?;
            }
            launch(&sweep.kernel("backward_dk", data), blocks, *dk, *args)?;
        }
        // The path matters where h or the caller depends on m, and only between groups of chunks.
        let exact = p.gate.has_normalizer() && !p.detach_denominator && p.eps != 0.0;
        let has_path = p.gate.has_stabilizer() && (exact || t.dm_last.is_some());
        if has_path && p.s > GROUP_CHUNKS * plan.chunk_size {
            device.launch(stream, "gategrad_path", heads, true, &args)?;
        }
        let groups = args.num_chunks / GROUP_CHUNKS + p.state_rows();
        device.launch(stream, "gategrad_emit_fast", groups * p.nh, true, &args)?;
        for copy in &copies.after {
            device.launch(stream, "copy_states", heads * p.dhqk, false, copy)?;
        }
        Ok(())
    })
}

/// Copies between states of 16 bits and the sweeps' own in float.
#[derive(Default)]
struct Copies {
    before: Vec<CopyArgs>,
    after: Vec<CopyArgs>,
}

/// The arguments of the sweeps, which read and write states in float, and what makes it so.
fn with_float_states(call: &Bw, mut args: Args) -> (Args, Copies) {
    let p = &call.problem;
    let mut copies = Copies::default();
    if p.state_dtype == DType::F32 {
        return (args, copies);
    }
    let bytes = (p.state_rows() * p.nh * p.dhqk * p.dhhv * 4) as usize;
    let all = [&mut args.c_initial, &mut args.dc_last, &mut args.dc_initial];
    for (place, state) in all.into_iter().enumerate() {
        if state.is_absent() {
            continue;
        }
        let given = *state;
        *state = Tensor::dense(args.buffers.state_copies.wrapping_add(place * bytes), p);
        let mut copy = CopyArgs {
            from: given,
            to: *state,
            nh: args.nh,
            dhqk: args.dhqk,
            dhhv: args.dhhv,
            from_dtype: params::dtype(p.state_dtype),
            to_dtype: params::dtype(DType::F32),
        };
        if place < 2 {
            copies.before.push(copy);
        } else {
            std::mem::swap(&mut copy.from, &mut copy.to);
            std::mem::swap(&mut copy.from_dtype, &mut copy.to_dtype);
            copies.after.push(copy);
        }
    }
    (args, copies)
}
