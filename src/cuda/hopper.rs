//! The launch sequences of the kernels for the H100 and H200 (`kernels/*_sm90.cu`).

use super::chunkwise::{self, Run};
use super::driver;
use super::layout::{PACKED_BYTES, ceil_div, padded_dhqk};
use super::maps;
use super::params::HopperArgs;
use super::sweeps::{self, Vectors};
use crate::dispatch::{self, Plan};
use crate::error::Result;
use crate::ops::Fw;
use crate::workspace::{Stream, Workspace};

/// Enqueues a forward.
pub(super) fn forward(call: &Fw, plan: &Plan, workspace: Workspace, stream: Stream) -> Result<()> {
    let (p, t) = (&call.problem, &call.tensors);
    let args = chunkwise::forward_args(call, plan, workspace)?;
    let run = Run { device: driver::device(p.device_index)?, stream, problem: p, args };
    let (dhqk, columns) = (padded_dhqk(p), dispatch::hopper_rows(p.dhhv, p.dhqk));
    let shape = format!("{}_{dhqk}x{columns}", run.data());
    let blocks = run.heads() * ceil_div(p.dhhv, columns);
    run.device.enqueue(|| {
        let count = args.num_chunks * p.nh;
        let vectors = Vectors { first: args.buffers.packed, pitch: PACKED_BYTES, count };
        let hopper = HopperArgs {
            q: maps::tensor_map(&t.q, dhqk / 64)?,
            k: maps::tensor_map(&t.k, 1)?,
            v: maps::tensor_map(&t.v, columns / 64)?,
            h: maps::tensor_map(&t.h, 1)?,
            packed: vectors.map(0..PACKED_BYTES)?,
            args,
        };
        gates(&run)?;
        if plan.segments > 1 {
            sweeps::segment_states(&run, "segments_c", &t.v, &t.k, &vectors)?;
        }
        let name = format!("hopper_forward_{shape}");
        run.device.launch(stream, &name, blocks * plan.segments, true, &hopper)
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
        let name = format!("gates_whole_{data}_{most}");
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
