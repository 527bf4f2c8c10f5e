//! Which kernel runs, with which chunk length: a pure, printable function of the problem and the
//! machine's capabilities. It touches no device and no memory.

use std::fmt;

use crate::problem::{Device, Op, Problem};

/// What the library can do on this machine, as far as plans depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Whether the CUDA backend is built in.
    pub has_cuda: bool,
}

/// The code that runs a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// SIMD and threads on host memory.
    Cpu,
    /// Kernels on device memory.
    Cuda,
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
}

impl fmt::Display for Plan {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "{} on {:?}: L {}, NC {}",
            self.op, self.engine, self.chunk_size, self.num_chunks
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
        Device::Cuda if capabilities.has_cuda => Engine::Cuda,
        Device::Cuda => return None,
    };
    let tokens = problem.s.max(1);
    let chunk_size = match (engine, op) {
        (_, Op::Step) => tokens,
        // The parallel form too: its numbers are the same, and time linear in S is no loss.
        (Engine::Cuda, _) => cuda_chunk(problem),
        (Engine::Cpu, Op::ChunkwiseFw | Op::ChunkwiseBw) => {
            problem.chunk_size.unwrap_or(DEFAULT_CHUNK).min(tokens)
        }
        (Engine::Cpu, Op::ParallelFw | Op::ParallelBw) => tokens,
    };
    // Packed sequences each end in a chunk of their own.
    let num_chunks = (tokens + chunk_size - 1) / chunk_size + problem.num_seqs.unwrap_or(0);
    Some(Plan { op, engine, chunk_size, num_chunks })
}

/// The caller's wish does not count here: kernels come for one length per type, and the peers'
/// habitual 64 would only cost time.
fn cuda_chunk(problem: &Problem) -> i64 {
    let [short, long] = CUDA_CHUNKS;
    if problem.dtype.size() == 2 { long } else { short }
}
