//! Which kernel runs, with which chunk length: a pure, printable function of the problem and the
//! machine's capabilities. It touches no device and no memory.

use std::fmt;

use crate::problem::{Device, Op, Problem};

/// What the library can do on this machine, as far as plans depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Whether the CUDA backend is built in.
    pub has_cuda: bool,
    /// Whether the device is an H100 or H200 (compute capability 9.0) and its copy engine can take
    /// the tensors ([`View::suits_copy_engine`](crate::tensor::View::suits_copy_engine)).
    pub hopper: bool,
}

/// The code that runs a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// SIMD and threads on host memory.
    Cpu,
    /// Kernels on device memory.
    Cuda,
    /// Kernels for the H100 and H200.
    Hopper,
}

/// A decision, ready to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// The operation.
    pub op: Op,
    /// The code that runs it.
    pub engine: Engine,
    /// L: tokens per chunk (S, at least 1, in the parallel form).
    pub chunk_size: i64,
    /// NC: an upper bound of the chunks of one head over all sequences of a row.
    pub num_chunks: i64,
    /// Parts of each sequence that run side by side ([`Engine::Hopper`]; else 1).
    pub segments: i64,
    /// Whether each part makes the state it begins with itself, from the sequence's start on; else a
    /// kernel before makes what each part adds to it.
    pub catch_up: bool,
}

impl Plan {
    /// Parts of each sequence whose addition to the state a kernel before makes: all but one, or none.
    pub fn summed_segments(&self) -> i64 {
        if self.catch_up { 0 } else { self.segments - 1 }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "{} on {:?}: L {}, NC {}, {} segments{}",
            self.op,
            self.engine,
            self.chunk_size,
            self.num_chunks,
            self.segments,
            if self.catch_up { " that catch up" } else { "" }
        )
    }
}

/// Chunk length when the caller names none.
const DEFAULT_CHUNK: i64 = 64;

/// Chunk lengths of the CUDA kernels; the longer one, for 16-bit data, halves the chunk states.
const CUDA_CHUNKS: [i64; 2] = [64, 128];

/// Chooses how to run `op`.
pub fn plan(op: Op, problem: &Problem, capabilities: Capabilities) -> Option<Plan> {
    let engine = match problem.device {
        Device::Cpu => Engine::Cpu,
        Device::Cuda if capabilities.has_cuda => {
            if capabilities.hopper && suits_hopper(op, problem) {
                Engine::Hopper
            } else {
                Engine::Cuda
            }
        }
        Device::Cuda => return None,
    };
    let tokens = problem.s.max(1);
    let chunk_size = match (engine, op) {
        (_, Op::Step) => tokens,
        // The parallel form too: its numbers are the same, and time linear in S is no loss.
        (Engine::Cuda, _) => cuda_chunk(problem),
        (Engine::Hopper, _) => HOPPER_CHUNK,
        (Engine::Cpu, Op::ChunkwiseFw | Op::ChunkwiseBw) => {
            problem.chunk_size.unwrap_or(DEFAULT_CHUNK).min(tokens)
        }
        (Engine::Cpu, Op::ParallelFw | Op::ParallelBw) => tokens,
    };
    // Packed sequences each end in a chunk of their own.
    let num_chunks = (tokens + chunk_size - 1) / chunk_size + problem.num_seqs.unwrap_or(0);
    let (segments, catch_up) = match engine {
        Engine::Hopper => hopper_segments(op, problem, num_chunks),
        Engine::Cpu | Engine::Cuda => (1, false),
    };
    Some(Plan { op, engine, chunk_size, num_chunks, segments, catch_up })
}

/// Chunk length of the Hopper kernels: what the state's registers leave room for.
const HOPPER_CHUNK: i64 = 64;

/// Whether there are Hopper kernels for it.
fn suits_hopper(op: Op, problem: &Problem) -> bool {
    let p = problem;
    let backward = matches!(op, Op::ChunkwiseBw | Op::ParallelBw);
    op != Op::Step
        && !p.generic_engine
        && p.dtype.size() == 2
        && p.dhqk % 64 == 0
        && p.dhqk <= 512
        && p.dhhv % 64 == 0
        && p.b > 0
        && p.nh > 0
        // The copy engine counts tokens in 32 bits.
        && (1..1 << 30).contains(&p.s)
        && (!backward || suits_hopper_backward(p))
}

/// What the backward needs beyond that: sweeps take logarithms of the scale, and the copy engine counts
/// the tokens of all heads in 32 bits.
fn suits_hopper_backward(problem: &Problem) -> bool {
    let p = problem;
    let chunks = (p.s + HOPPER_CHUNK - 1) / HOPPER_CHUNK + p.num_seqs.unwrap_or(0);
    let heads = p.b.saturating_mul(p.nh);
    p.qk_scale > 0.0 && heads.saturating_mul(chunks).saturating_mul(HOPPER_CHUNK) < 1 << 31
}

/// Of the state transposed, a block of the Hopper kernels takes so many of `rows`, and all `columns`.
pub(crate) const fn hopper_rows(rows: i64, columns: i64) -> i64 {
    let narrow = rows <= 64 && columns <= 128;
    // The halves of many columns share a block's registers.
    if narrow || columns > 256 { 64 } else { 128 }
}

const MULTIPROCESSORS: i64 = 132;

/// A chunk's time; others are measured in fifteenths of it, for the forward on an H200 at DHQK 256, where it
/// is 3 us. Those of the backward are alike.
const CHUNK_COST: i64 = 15;

/// How many parts to cut sequences into, and whether they catch up. A multiprocessor runs one block at a
/// time; a block takes its chunks one after another.
fn hopper_segments(op: Op, problem: &Problem, num_chunks: i64) -> (i64, bool) {
    const STATE: i64 = 3; // of a chunk alone
    const STATES_KERNEL: i64 = 60; // for those of parts
    const STATE_BEFORE: i64 = 12; // for each that the last part begins with
    const GATES_KERNEL: i64 = 50; // where one part needs none (`makes_vectors` of src/cuda/layout.rs)
    let ceil = |a: i64, b: i64| (a + b - 1) / b;
    let p = problem;
    let chunks = ceil(num_chunks, p.num_seqs.unwrap_or(1));
    // Of the backward, its sweeps for dq and dk count.
    let backward = matches!(op, Op::ChunkwiseBw | Op::ParallelBw);
    let (rows, columns) = if backward { (p.dhqk, p.dhhv) } else { (p.dhhv, p.dhqk) };
    // The backward's parts consist of whole groups of chunks; with less DHQK a chunk takes less time.
    let fewest = if backward || p.dhqk <= 128 { 16 } else { 4 };
    let blocks = p.state_rows() * p.nh * ceil(rows, hopper_rows(rows, columns));
    // Thousands of blocks fill the machine as they are, and their product must not overflow.
    if blocks > 4 * MULTIPROCESSORS {
        return (1, false);
    }
    let gates = if !backward && p.dhqk <= 128 { GATES_KERNEL } else { 0 };
    let cost = |segments: i64| {
        let each = ceil(chunks, segments);
        let main = ceil(blocks * segments, MULTIPROCESSORS) * each * CHUNK_COST;
        let states = ceil(blocks * (segments - 1), MULTIPROCESSORS) * each * STATE;
        let kernels = if segments > 1 { gates + STATES_KERNEL } else { 0 };
        main + states + kernels + (segments - 1) * STATE_BEFORE
    };
    let segments = (0..7)
        .map(|exponent| 1 << exponent)
        .take_while(|&segments| segments == 1 || chunks >= segments * fewest)
        .min_by_key(|&segments| cost(segments))
        .unwrap_or(1);
    // There are no kernels that catch up with the halves of a state. What parts of long sequences add is
    // often soon forgotten, at which the kernel for it stops.
    const LONGEST: i64 = 64;
    let room = MULTIPROCESSORS / blocks;
    if backward || p.dhqk > 256 || !(2..=LONGEST).contains(&chunks) || room < 2 {
        return (segments, false);
    }
    let most = room.min(chunks);
    if gates + catch_up_cost(chunks, most) < cost(segments) {
        (most, true)
    } else {
        (segments, false)
    }
}

/// The longest time of so many parts that catch up.
fn catch_up_cost(chunks: i64, segments: i64) -> i64 {
    const STATE: i64 = 5; // of a chunk before the part, which comes from memory for each part anew
    let cost = |segment| {
        let from = caught_up(chunks, segments, segment);
        let own = caught_up(chunks, segments, segment + 1) - from;
        if own > 0 { STATE * from + CHUNK_COST * own } else { 0 }
    };
    (0..segments).map(cost).max().unwrap_or(0)
}

/// Where a part starts that catches up (`caught_up` of `kernels/forward_block_sm90.cuh`): all take the
/// same time if each is 1 - 1/3 of the one before.
fn caught_up(chunks: i64, segments: i64, segment: i64) -> i64 {
    let upto = |count: i64| 1.0 - (2.0f64 / 3.0).powf(count as f64);
    (chunks as f64 * upto(segment) / upto(segments) + 0.4) as i64
}

/// The caller's wish does not count here: kernels come for one length per type, and the peers'
/// habitual 64 would only cost time.
fn cuda_chunk(problem: &Problem) -> i64 {
    let [short, long] = CUDA_CHUNKS;
    if problem.dtype.size() == 2 { long } else { short }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_catch_up_cover_all_chunks_in_order() {
        for chunks in 1..200 {
            for segments in 2..34 {
                let starts: Vec<_> =
                    (0..=segments).map(|part| caught_up(chunks, segments, part)).collect();
                assert_eq!((starts[0], starts[segments as usize]), (0, chunks));
                assert!(starts.windows(2).all(|pair| pair[0] <= pair[1]), "{starts:?}");
            }
        }
        assert_eq!(
            (0..5).map(|part| caught_up(16, 4, part)).collect::<Vec<_>>(),
            [0, 7, 11, 14, 16]
        );
    }
}
