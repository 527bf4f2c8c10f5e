//! The workspace of the chunkwise kernels: one routine counts and carves it.

use std::ptr::null_mut;

use super::hopper_turns::{MOST_COLUMNS, boundary_parts};
use super::params::Buffers;
use super::sweeps::Sweep;
use crate::dispatch::{Engine, Plan};
use crate::error::Result;
use crate::problem::Problem;
use crate::tensor::DType;
use crate::workspace::{Carver, Workspace};

/// A chunk's vectors for the Hopper kernels: `kPackedFloats`.
pub(super) const PACKED_BYTES: usize = (6 * 64 + 4) * 4;

/// The same for their backward: `kBackwardFloats`.
pub(super) const BACKWARD_BYTES: usize = (10 * 64 + 4) * 4;

/// The scores of one chunk and head: 64 queries by 64 keys of 16 bits.
const SCORE_BYTES: usize = 64 * 64 * 2;

/// Partial outputs of one chunk and head, for 64 columns: 64 tokens in float.
const PART_SUM_BYTES: usize = 64 * 64 * 4;

/// `kGroupChunks`.
pub(super) const GROUP_CHUNKS: i64 = 16;

/// Chunk states are padded to tiles of this many rows and columns.
const TILE: i64 = 64;

/// a / b, rounded up.
pub(super) const fn ceil_div(a: i64, b: i64) -> i64 {
    (a + b - 1) / b
}

/// DHQK as the Hopper kernels hold it.
pub(super) const fn padded_dhqk(problem: &Problem) -> i64 {
    padded(problem.dhqk)
}

/// The dim that Hopper kernels are made for, 64, 128, 256 or 512, to hold this one.
pub(super) const fn padded(dim: i64) -> i64 {
    match dim {
        ..=64 => 64,
        65..=128 => 128,
        129..=256 => 256,
        _ => 512,
    }
}

/// Partial sums of q.dq and k.dk per token: one per tile of DHQK.
pub(super) fn qk_tiles(problem: &Problem) -> i64 {
    ceil_div(problem.dhqk, TILE)
}

/// Partial sums of <dC, C> per chunk and head: one per tile of C.
pub(super) fn e_tiles(problem: &Problem) -> i64 {
    ceil_div(problem.dhqk, TILE) * ceil_div(problem.dhhv, TILE)
}

/// Chunks of all rows: an upper bound with packed sequences.
pub(super) fn total_chunks(problem: &Problem, plan: &Plan) -> i64 {
    if problem.s == 0 {
        return 0;
    }
    match problem.num_seqs {
        Some(_) => plan.num_chunks,
        None => plan.num_chunks * problem.b,
    }
}

/// Whether a forward's sweep makes its vectors from the gates on the way: where it has warps for it, and no
/// kernel needs the vectors before. The largest state with such warps is otherwise so busy that a long
/// sequence's vectors are better made beforehand.
pub(super) fn makes_vectors(problem: &Problem, plan: &Plan) -> bool {
    let p = problem;
    let busy = p.dhqk > 64 && p.dhhv > 64;
    let longest = if busy { 32 } else { i64::MAX };
    p.dhqk <= 128 && plan.num_chunks <= longest && plan.segments == 1
}

/// The buffers in a workspace of [`workspace_size`] bytes.
pub(super) fn buffers(
    problem: &Problem,
    plan: &Plan,
    backward: bool,
    workspace: Workspace,
) -> Buffers {
    carve(problem, plan, backward, &mut Carver::default(), workspace.data)
}

/// Bytes of all buffers.
pub(super) fn workspace_size(problem: &Problem, plan: &Plan, backward: bool) -> Result<usize> {
    let mut carver = Carver::default();
    carve(problem, plan, backward, &mut carver, null_mut());
    carver.total()
}

fn carve(
    problem: &Problem,
    plan: &Plan,
    backward: bool,
    carver: &mut Carver,
    base: *mut u8,
) -> Buffers {
    let p = problem;
    // The sizes' products were bounded when the problem was validated; a cast of what does not fit
    // saturates, and the carver reports it.
    let product = |sizes: &[i64]| -> usize {
        sizes
            .iter()
            .try_fold(1usize, |all, &size| usize::try_from(size).ok()?.checked_mul(all))
            .unwrap_or(usize::MAX)
    };
    let acc = p.compute_dtype().size();
    let data = if p.dtype == DType::F64 { 8 } else { p.dtype.size() };
    let rows = p.state_rows();
    let chunks = total_chunks(p, plan);
    let tokens = product(&[p.b, p.nh, p.s]);
    let scalars = product(&[chunks, p.nh]);
    let slots = product(&[chunks + rows, p.nh]);
    let (qk, hv) = (ceil_div(p.dhqk, TILE) * TILE, ceil_div(p.dhhv, TILE) * TILE);
    let matrix = product(&[slots as i64, qk, hv]);
    let vector = product(&[slots as i64, qk]);

    let mut take = |count: usize, bytes: usize, wanted: bool| -> *mut u8 {
        if !wanted {
            return null_mut();
        }
        let region = carver.take::<u8>(count.saturating_mul(bytes));
        base.wrapping_add(region.offset)
    };
    let packed = p.num_seqs.is_some();
    let table = product(&[rows + 1]);
    let hopper = plan.engine == Engine::Hopper;
    let generic = !hopper;
    let generic_backward = generic && backward;
    let parts = product(&[if backward { 2 } else { 1 }, rows, p.nh, plan.summed_segments()]);
    let hopper_backward = hopper && backward;
    let vectors = hopper_backward || (hopper && !makes_vectors(p, plan));
    // Parts of DHHV take turns; none needs more than a full one.
    let sweep = Sweep::of(p.dhqk, p.dhhv.min(MOST_COLUMNS));
    let in_parts = hopper_backward && p.dhhv > MOST_COLUMNS;
    let rho_parts = product(&[Sweep::of(p.dhhv, p.dhqk).blocks()]);
    let boundaries = product(&[chunks / GROUP_CHUNKS + 2 * rows + 1, p.nh]);
    let units = product(&[sweep.units()]);
    let e_parts = product(&[boundary_parts(p)]);
    let copies = if p.state_dtype == DType::F32 { 0 } else { 3 };
    let packed_bytes = if backward { BACKWARD_BYTES } else { PACKED_BYTES };
    let e_tiles = e_tiles(p) as usize;
    Buffers {
        chunks: take(product(&[chunks]), 16, packed),
        first_chunk: take(table, 8, packed),
        seq_starts: take(table, 8, packed),
        chunk_gates: take(scalars, 4 * 8, generic || vectors),
        row: take(tokens, 2 * acc, generic),
        col: take(tokens, 2 * acc, generic),
        w: take(tokens, acc, generic),
        a: take(tokens, acc, generic),
        floor: take(tokens, acc, generic),
        g: take(scalars, acc, generic),
        c_states: take(matrix, data, generic),
        n_states: take(vector, acc, generic),
        dc_states: take(matrix, data, generic_backward),
        dn_states: take(vector, acc, generic_backward),
        inv: take(tokens, acc, generic_backward),
        delta: take(tokens, acc, generic_backward),
        dm: take(tokens, acc, backward),
        q_dq: take(tokens.saturating_mul(qk_tiles(p) as usize), acc, backward),
        k_dk: take(tokens.saturating_mul(qk_tiles(p) as usize), acc, backward),
        e: take(scalars.saturating_mul(e_tiles), acc, generic_backward),
        e_first: take(product(&[rows, p.nh]).saturating_mul(e_tiles), acc, generic_backward),
        packed: take(scalars, packed_bytes, vectors),
        segment_c: take(parts.saturating_mul(product(&[p.dhqk, p.dhhv])), 4, hopper),
        segment_n: take(parts.saturating_mul(product(&[p.dhqk])), 4, hopper),
        segment_g: take(parts, 4, hopper),
        scores: take(scalars, SCORE_BYTES, hopper_backward && sweep.is_split()),
        rho: take(scalars.saturating_mul(rho_parts), 64 * 4, hopper_backward),
        boundary_c: take(boundaries.saturating_mul(units), sweep.unit_bytes(), hopper_backward),
        boundary_n: take(boundaries.saturating_mul(units), 64 * 4, hopper_backward),
        boundary_e: take(boundaries.saturating_mul(e_parts), 4, hopper_backward),
        state_copies: take(product(&[copies, rows, p.nh, p.dhqk, p.dhhv]), 4, hopper_backward),
        part_sums: take(product(&[2, chunks, p.nh, p.dhqk / 64]), PART_SUM_BYTES, in_parts),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::{self, Capabilities};
    use crate::problem::{Device, Op, ProblemSpec};

    fn backward_of(dhhv: i64) -> (Problem, Plan) {
        let spec = ProblemSpec {
            device: Device::Cuda,
            dtype: DType::Bf16,
            b: 2,
            nh: 3,
            s: 1000,
            dhqk: 192,
            dhhv,
            ..ProblemSpec::default()
        };
        let problem = spec.validate(Op::ChunkwiseBw).unwrap();
        let hopper = Capabilities { has_cuda: true, hopper: true };
        let plan = dispatch::plan(Op::ChunkwiseBw, &problem, hopper).unwrap();
        assert_eq!(plan.engine, Engine::Hopper);
        (problem, plan)
    }

    #[test]
    fn partial_outputs_take_memory_where_dhhv_comes_in_parts() {
        for (dhhv, in_parts) in [(64, false), (512, false), (576, true), (1024, true)] {
            let (problem, plan) = backward_of(dhhv);
            let base = std::ptr::dangling_mut::<u8>();
            let mut carver = Carver::default();
            let sums = carve(&problem, &plan, true, &mut carver, base).part_sums;
            assert_eq!(sums.is_null(), !in_parts, "{dhhv}");
            if in_parts {
                let room = carver.total().unwrap() - (sums.addr() - base.addr());
                // dq and dk, 16 chunks in each of two rows, three heads, three slabs of DHQK.
                assert!(room >= 2 * 2 * 16 * 3 * 3 * PART_SUM_BYTES, "{dhhv}: {room}");
            }
        }
    }

    /// What a forward needs beside its tensors: vectors, and states of parts, only where kernels before
    /// make them.
    #[test]
    fn forwards_take_memory_for_what_other_kernels_make() {
        let buffers_of = |b: i64, s: i64, dim: i64| {
            let base =
                ProblemSpec { device: Device::Cuda, dtype: DType::Bf16, ..Default::default() };
            let spec = ProblemSpec { b, nh: 4, s, dhqk: dim, dhhv: dim, ..base };
            let problem = spec.validate(Op::ChunkwiseFw).unwrap();
            let hopper = Capabilities { has_cuda: true, hopper: true };
            let plan = dispatch::plan(Op::ChunkwiseFw, &problem, hopper).unwrap();
            let mut carver = Carver::default();
            let base = std::ptr::dangling_mut::<u8>();
            let buffers = carve(&problem, &plan, false, &mut carver, base);
            let states = buffers.segment_n.addr() - buffers.segment_c.addr();
            (plan, buffers.packed.is_null(), states, carver.total().unwrap())
        };
        let (plan, no_vectors, _, total) = buffers_of(40, 1000, 64);
        assert!(plan.segments == 1 && no_vectors && total == 0, "gates on the way: {total}");
        for (s, dim) in [(2000, 64), (1000, 256)] {
            let (plan, no_vectors, states, _) = buffers_of(1, s, dim);
            assert!(plan.catch_up && plan.segments > 1 && !no_vectors && states == 0, "{dim}");
        }
        let (plan, no_vectors, states, _) = buffers_of(1, 100_000, 256);
        assert!(!plan.catch_up && plan.segments > 1 && !no_vectors);
        assert_eq!(states as i64, (plan.segments - 1) * 4 * 256 * 256 * 4);
    }

    /// Boundaries and scores are those of one part at a time.
    #[test]
    fn memory_of_parts_does_not_grow_with_their_number() {
        let size = |dhhv: i64| {
            let (problem, plan) = backward_of(dhhv);
            workspace_size(&problem, &plan, true).unwrap()
        };
        assert!(size(4096) - size(1024) < size(1024) / 4);
    }
}
