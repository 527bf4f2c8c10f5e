//! The forward of `chunkwise` and `parallel` (one chunk of all tokens): chunk states first, then
//! all output tiles at once.

use super::gates::{self, GateViews};
use super::lanes::{token_rows, write_real};
use super::layout::{Layout, Memory, Vector};
use super::level::Level;
use super::pool;
use super::real::Real;
use super::states::{Active, SLICE, Slice, Sweep, Task};
use super::table::{Compute, Kernels, Left};
use super::vecops::{Mat, TILE, padded};
use super::wave::{for_each_wave, prepare};
use crate::dispatch::Plan;
use crate::error::Result;
use crate::ops::{Fw, FwTensors};
use crate::problem::Problem;
use crate::workspace::Workspace;

/// Rows of a diagonal tile whose products are cut off at the same column: smaller blocks skip more
/// of what the causal mask removes, larger ones run nearer to the peak.
pub(crate) const CAUSAL_ROWS: usize = 16;

/// One forward call.
struct Forward<'a, T: 'static> {
    problem: &'a Problem,
    tensors: &'a FwTensors,
    kernels: &'static Kernels<T>,
    memory: Memory<'a, T>,
    qk_scale: T,
    eps: T,
    /// Whether states come in, and whether the last ones are wanted.
    initial: bool,
    last: bool,
}

// SAFETY: shared between the tasks of one call; each output and each part of the workspace is
// written by one task at a time, see the calls of `pool::for_each`.
unsafe impl<T> Sync for Forward<'_, T> {}

/// Runs a forward at this SIMD level on at most this many threads.
pub(crate) fn run<T: Compute>(
    op: &Fw,
    plan: &Plan,
    workspace: Workspace,
    level: Level,
    threads: usize,
) -> Result<()> {
    let problem = &op.problem;
    let t = &op.tensors;
    let (layout, lanes) = prepare::<T>(problem, plan, &workspace, t.cu_seqlens)?;
    if problem.s == 0 && t.c_last.is_none() {
        // Nothing to write, for however many heads that have no memory behind them.
        return Ok(());
    }
    let forward = Forward::<T> {
        problem,
        tensors: t,
        kernels: T::kernels(level),
        memory: Memory::new(&layout, workspace, false),
        qk_scale: T::from_f64(problem.qk_scale),
        eps: T::from_f64(problem.eps),
        initial: t.c_initial.is_some(),
        last: t.c_last.is_some(),
    };
    for_each_wave(&lanes, &layout, false, |wave| forward.wave(wave, &layout, threads));
    Ok(())
}

impl<T: Real> Forward<'_, T> {
    fn wave(&self, wave: &[Active], layout: &Layout, threads: usize) {
        pool::for_each(threads, wave.len(), |index, _| {
            let t = self.tensors;
            let views =
                GateViews { i: t.i, f: t.f, m_initial: t.m_initial, m: t.m, m_last: t.m_last };
            // SAFETY: one task per lane.
            unsafe { gates::scan(self.problem, &views, &wave[index].lane, &self.memory) }
        });
        let groups = wave.iter().map(|active| active.groups(layout)).max().unwrap_or(0).max(1);
        let slices = layout.dv.div_ceil(SLICE);
        let tiles = layout.chunk.div_ceil(TILE);
        for group in 0..groups {
            if self.initial || self.last || wave.iter().any(|active| active.chunks > 1) {
                pool::for_each(threads, wave.len() * slices, |index, worker| {
                    let slice = Slice::new(index % slices, layout.dv);
                    self.states(&wave[index / slices], group, slice, worker);
                });
            }
            let chunks = wave.iter().map(|active| active.group(group, layout).len()).max();
            let per_lane = chunks.unwrap_or(0) * tiles;
            pool::for_each(threads, wave.len() * per_lane, |index, worker| {
                let active = &wave[index % wave.len()];
                // Later tiles of a chunk have more to do: they go first.
                let place = per_lane - 1 - index / wave.len();
                let (chunk, tile) = (group * layout.group + place / tiles, place % tiles);
                if active.group(group, layout).contains(&chunk) {
                    self.tile(active, chunk, tile, worker);
                }
            });
        }
    }

    /// States of one group's chunks, columns of `slice`.
    fn states(&self, active: &Active, group: usize, slice: Slice, worker: usize) {
        let t = self.tensors;
        let layout = self.memory.layout;
        let scratch = &self.memory.scratch(worker);
        let sweep = Sweep { kernels: self.kernels, memory: self.memory, dtype: self.problem.dtype };
        let task = Task { active, slice, scratch, transposed: false };
        let mut chunks = active.group(group, layout);
        let ends = chunks.end == active.chunks && (group == 0 || !chunks.is_empty());
        if ends && !self.last {
            chunks.end = chunks.end.saturating_sub(1);
        }
        // SAFETY: one task per lane and slice.
        unsafe {
            if group == 0 && (self.initial || active.chunks == 0) {
                let from = (t.c_initial.as_ref(), t.n_initial.as_ref());
                sweep.import(&task, from, active.state(0));
            }
            sweep.forward(&task, (&t.k, &t.v), chunks, !self.initial, |_| ());
            if ends && self.last {
                let to = (t.c_last.as_ref(), t.n_last.as_ref());
                sweep.export(&task, to, active.state(active.chunks));
            }
        }
    }

    /// Outputs of one tile of a chunk: the part of the chunk's initial state, and of the chunk's
    /// tokens up to each token.
    fn tile(&self, active: &Active, chunk: usize, tile: usize, worker: usize) {
        let t = self.tensors;
        let layout = self.memory.layout;
        let (chunk_start, chunk_len) = active.tokens(chunk, layout.chunk);
        let first = tile * TILE;
        if first >= chunk_len {
            return;
        }
        let (start, rows) = (chunk_start + first, TILE.min(chunk_len - first));
        let lane = &active.lane;
        let scratch = self.memory.scratch(worker);
        let vector = |which, token: usize| self.memory.vector(which, lane.token + token);
        let step = vector(Vector::Step, start);
        let kernels = self.kernels;
        let load = kernels.load(self.problem.dtype);
        let (sums, row_decay, col_decay) =
            (scratch.vectors.row(0), scratch.vectors.row(1), scratch.vectors.row(2));
        let null = std::ptr::null();
        let q = token_rows(&t.q, lane, start);
        // SAFETY: pointers cover the tile; the task owns the worker's scratch and writes its own
        // tile of the outputs only.
        unsafe {
            load(q, (rows, layout.dk), null, self.qk_scale, scratch.q);
            for row in 0..TILE {
                *sums.add(row) = T::ZERO;
            }
            let mut beta = T::ZERO;
            if chunk > 0 || self.initial {
                let before = gates::total(vector(Vector::Step, chunk_start), first);
                gates::decay_to(kernels, step, rows, before, row_decay);
                load(q, (rows, layout.dk), row_decay, self.qk_scale, scratch.q_decayed);
                let (c, n) = self.memory.slot(active.state(chunk));
                let size = (rows, padded(layout.dv), layout.dk);
                kernels.multiply(Left::plain(scratch.q_decayed), c, size, beta, scratch.o);
                let n = Mat { p: n, ld: 0 };
                (kernels.row_dots)(scratch.q_decayed, n, (rows, padded(layout.dk)), sums);
                beta = T::ONE;
            }
            let mut between = 0.0;
            for other in (0..=tile).rev() {
                let other_start = chunk_start + other * TILE;
                let cols = TILE.min(chunk_len - other * TILE);
                let k = token_rows(&t.k, lane, other_start);
                load(k, (cols, layout.dk), null, T::ONE, scratch.k);
                (kernels.transpose)(scratch.k, (cols, padded(layout.dk)), scratch.kt);
                let v = token_rows(&t.v, lane, other_start);
                load(v, (cols, layout.dv), null, T::ONE, scratch.v);
                let source = vector(Vector::Source, other_start);
                let causal = other == tile;
                let size = (rows, padded(cols));
                if causal {
                    (kernels.decay_tile)(step, source, rows, scratch.d);
                } else {
                    // Both factors are decays to and from the border between the tiles: where one
                    // underflows, so does the product.
                    let other_step = vector(Vector::Step, other_start);
                    gates::decay_to(kernels, step, rows, between, row_decay);
                    let passed =
                        gates::decay_from(kernels, other_step, source, cols, 0.0, col_decay);
                    (kernels.outer)(row_decay, col_decay, size, scratch.d);
                    between += passed;
                }
                let block = if causal { CAUSAL_ROWS } else { rows };
                for row in (0..rows).step_by(block) {
                    let count = block.min(rows - row);
                    let n = if causal { padded(row + count) } else { padded(cols) };
                    let (a, out) = (scratch.q.below(row), scratch.p.below(row));
                    let size = (count, n, layout.dk);
                    kernels.multiply(Left::plain(a), scratch.kt, size, T::ZERO, out);
                }
                (kernels.hadamard)(scratch.p, scratch.d, size, causal, sums);
                for row in (0..rows).step_by(block) {
                    let count = block.min(rows - row);
                    let k = if causal { row + count } else { cols };
                    let (a, out) = (scratch.p.below(row), scratch.o.below(row));
                    let size = (count, padded(layout.dv), k);
                    kernels.multiply(Left::plain(a), scratch.v, size, beta, out);
                }
                beta = T::ONE;
            }
            self.finish(active, (start, rows), (sums, row_decay), scratch.o);
        }
    }

    /// Divides by the denominator and writes h, and N if wanted.
    ///
    /// # Safety
    /// As [`Forward::tile`].
    unsafe fn finish(
        &self,
        active: &Active,
        (start, rows): (usize, usize),
        (sums, inverse): (*const T, *mut T),
        o: Mat<T>,
    ) {
        let lane = &active.lane;
        let floor = self.memory.vector(Vector::Floor, lane.token + start);
        let normalizer = self.problem.gate.has_normalizer();
        // SAFETY: the caller's contract.
        unsafe {
            for t in 0..rows {
                let n = *sums.add(t);
                *inverse.add(t) = if normalizer {
                    inverse_denominator(n, *floor.add(t), self.eps)
                } else {
                    T::ONE
                };
                if let Some(view) = &self.tensors.n {
                    write_real(view, [lane.batch, lane.head, lane.start + start + t], n.to_f64());
                }
            }
            let h = token_rows(&self.tensors.h, lane, start);
            let size = (rows, self.memory.layout.dv);
            (self.kernels.store(self.problem.dtype))(o, size, inverse, T::ONE, h);
        }
    }
}

/// 1 / (max(|N|, floor) + eps), 0 for an infinite floor.
pub(crate) fn inverse_denominator<T: Real>(n: T, floor: T, eps: T) -> T {
    let n = n.abs();
    T::ONE / (if n > floor { n } else { floor } + eps)
}
