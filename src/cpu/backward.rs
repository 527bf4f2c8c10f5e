//! The backward of `chunkwise` and `parallel`: states and their gradients by groups of chunks, the
//! last group first, then all tiles of the group at once, and in the end the gates.
//!
//! With D the decays within a chunk, dhat_t = dh_t / (den_t + eps) and delta_t the derivative with
//! respect to N_t:
//!
//! ```text
//! P      = s Q K^T * D                      dS = (dhat V^T + delta 1^T) * D
//! dq     = s (decay_to (C dhat + delta n) + dS K)
//! dk     = decay_from (dC v + dn) + dS^T (s Q)
//! dv     = decay_from (dC^T k) + P^T dhat
//! ```

use super::forward::{CAUSAL_ROWS, inverse_denominator};
use super::gates::{self, GateGradients, GateViews};
use super::lanes::{read_real, token_rows};
use super::layout::{Layout, Memory, Scratch, Vector};
use super::level::Level;
use super::pool;
use super::real::Real;
use super::states::{Active, SLICE, Slice, Sweep, Task};
use super::table::{Compute, Kernels, Left};
use super::vecops::{Mat, TILE, padded};
use super::wave::{for_each_wave, prepare};
use crate::dispatch::Plan;
use crate::error::Result;
use crate::ops::{Bw, BwTensors};
use crate::problem::Problem;
use crate::workspace::Workspace;

/// One backward call.
struct Backward<'a, T: 'static> {
    problem: &'a Problem,
    tensors: &'a BwTensors,
    kernels: &'static Kernels<T>,
    memory: Memory<'a, T>,
    qk_scale: T,
    /// Whether states came in, whether gradients of the last ones do, and whether those of the
    /// first ones are wanted.
    initial: bool,
    last: bool,
    first: bool,
}

// SAFETY: shared between the tasks of one call; each output and each part of the workspace is
// written by one task at a time, see the calls of `pool::for_each`.
unsafe impl<T> Sync for Backward<'_, T> {}

/// Runs a backward at this SIMD level on at most this many threads.
pub(crate) fn run<T: Compute>(
    op: &Bw,
    plan: &Plan,
    workspace: Workspace,
    level: Level,
    threads: usize,
) -> Result<()> {
    let problem = &op.problem;
    let t = &op.tensors;
    let (layout, lanes) = prepare::<T>(problem, plan, &workspace, t.cu_seqlens)?;
    if problem.s == 0 && t.dc_initial.is_none() {
        // Nothing to write, for however many heads that have no memory behind them.
        return Ok(());
    }
    let backward = Backward::<T> {
        problem,
        tensors: t,
        kernels: T::kernels(level),
        memory: Memory::new(&layout, workspace, true),
        qk_scale: T::from_f64(problem.qk_scale),
        initial: t.c_initial.is_some(),
        last: t.dc_last.is_some() || t.dn_last.is_some(),
        first: t.dc_initial.is_some(),
    };
    for_each_wave(&lanes, &layout, true, |wave| backward.wave(wave, &layout, threads));
    Ok(())
}

/// A tile of a chunk: its first token (of the lane) and number of tokens.
#[derive(Clone, Copy)]
struct Tile {
    start: usize,
    len: usize,
}

impl<T: Real> Backward<'_, T> {
    fn wave(&self, wave: &[Active], layout: &Layout, threads: usize) {
        pool::for_each(threads, wave.len(), |index, _| {
            let t = self.tensors;
            let views = GateViews { i: t.i, f: t.f, m_initial: t.m_initial, m: None, m_last: None };
            // SAFETY: one task per lane.
            unsafe { gates::scan(self.problem, &views, &wave[index].lane, &self.memory) }
        });
        let longest = wave.iter().map(|active| active.lane.len).max().unwrap_or(0);
        let blocks = longest.div_ceil(TILE);
        pool::for_each(threads, wave.len() * blocks, |index, worker| {
            self.denominators(&wave[index / blocks], index % blocks, worker);
        });
        let groups = wave.iter().map(|active| active.groups(layout)).max().unwrap_or(0).max(1);
        let slices = layout.dk.div_ceil(SLICE);
        let tiles = layout.chunk.div_ceil(TILE);
        for turn in 0..groups {
            pool::for_each(threads, wave.len() * slices, |index, worker| {
                let slice = Slice::new(index % slices, layout.dk);
                self.states(&wave[index / slices], turn, slice, worker);
            });
            let per_lane = layout.group * tiles;
            pool::for_each(threads, wave.len() * per_lane, |index, worker| {
                let active = &wave[index % wave.len()];
                let place = index / wave.len();
                let Some(group) = active.groups(layout).checked_sub(turn + 1) else { return };
                let chunk = group * layout.group + place / tiles;
                if active.group(group, layout).contains(&chunk) {
                    self.tile(active, chunk, place % tiles, worker);
                }
            });
        }
        pool::for_each(threads, wave.len(), |index, _| {
            let (t, active) = (self.tensors, &wave[index]);
            let views = GateGradients {
                i: t.i,
                f: t.f,
                di: t.di,
                df: t.df,
                dm_last: t.dm_last,
                dm_initial: t.dm_initial,
            };
            let first = if self.first { self.state_dot(active, 0) } else { 0.0 };
            // SAFETY: one task per lane.
            unsafe { gates::gradients(self.problem, &views, &active.lane, &self.memory, first) }
        });
    }

    /// <dC, C> + <dn, n> before chunk `index`.
    fn state_dot(&self, active: &Active, index: usize) -> f64 {
        let layout = self.memory.layout;
        let (c, n) = self.memory.slot(active.state(index));
        let (dc, dn) = self.memory.slot(active.gradient(index));
        let (n, dn) = (Mat { p: n, ld: 0 }, Mat { p: dn, ld: 0 });
        let cols = padded(layout.dk);
        // SAFETY: slots hold states of this size.
        unsafe {
            (self.kernels.dot)(c, dc, (layout.dv, cols)) + (self.kernels.dot)(n, dn, (1, cols))
        }
    }

    /// Vectors that come from the denominator, for one block of tokens.
    fn denominators(&self, active: &Active, block: usize, worker: usize) {
        let (t, lane, problem) = (self.tensors, &active.lane, self.problem);
        let start = block * TILE;
        if start >= lane.len {
            return;
        }
        let rows = TILE.min(lane.len - start);
        let vector = |which| self.memory.vector(which, lane.token + start);
        let [floor, inverse, pull, frame] =
            [Vector::Floor, Vector::Inverse, Vector::Pull, Vector::Frame].map(vector);
        let scratch = self.memory.scratch(worker);
        let dots = scratch.vectors.row(0);
        let wanted = problem.gate.has_normalizer() && !problem.detach_denominator;
        // SAFETY: one task per block, with the worker's scratch.
        unsafe {
            if let (Some(h), true) = (&t.h, wanted) {
                let size = (rows, self.memory.layout.dv);
                let load = self.kernels.load(problem.dtype);
                load(token_rows(h, lane, start), size, std::ptr::null(), T::ONE, scratch.v);
                load(token_rows(&t.dh, lane, start), size, std::ptr::null(), T::ONE, scratch.o);
                let size = (rows, padded(self.memory.layout.dv));
                (self.kernels.row_dots)(scratch.v, scratch.o, size, dots);
            }
            let eps = T::from_f64(problem.eps);
            for row in 0..rows {
                let (mut inv, mut n_pull, mut m_pull) = (T::ONE, T::ZERO, T::ZERO);
                if let (Some(view), true) = (&t.n, problem.gate.has_normalizer()) {
                    let at = [lane.batch, lane.head, lane.start + start + row];
                    let n = T::from_f64(read_real(view, at));
                    inv = inverse_denominator(n, *floor.add(row), eps);
                    let dot = if wanted { *dots.add(row) } else { T::ZERO };
                    if n.abs() > *floor.add(row) {
                        n_pull = if n > T::ZERO { -dot } else { dot };
                    }
                    if problem.gate.has_stabilizer() {
                        m_pull = -dot * eps * inv;
                    }
                }
                *inverse.add(row) = inv;
                *pull.add(row) = n_pull;
                *frame.add(row) = m_pull;
            }
        }
    }

    /// States and state gradients of the lane's group whose turn it is, columns of `slice`.
    fn states(&self, active: &Active, turn: usize, slice: Slice, worker: usize) {
        let (t, layout) = (self.tensors, self.memory.layout);
        let groups = active.groups(layout).max(1);
        let Some(group) = groups.checked_sub(turn + 1) else { return };
        let scratch = &self.memory.scratch(worker);
        let sweep = Sweep { kernels: self.kernels, memory: self.memory, dtype: self.problem.dtype };
        let chunks = active.group(group, layout);
        let empty = active.chunks == 0;
        let (kv, zero) = ((&t.k, &t.v), !self.initial);
        let task = Task { active, slice, scratch, transposed: true };
        // SAFETY: one task per lane and slice.
        unsafe {
            if turn == 0 {
                if self.initial || empty {
                    let from = (t.c_initial.as_ref(), t.n_initial.as_ref());
                    sweep.import(&task, from, active.state(0));
                    if groups > 1 {
                        sweep.checkpoint(&task, 0, false);
                    }
                }
                let end = if self.last { active.chunks } else { active.chunks.saturating_sub(1) };
                sweep.forward(&task, kv, 0..end, zero, |chunk| {
                    let next = chunk + 1;
                    if next < active.chunks && next.is_multiple_of(layout.group) {
                        sweep.checkpoint(&task, next / layout.group, false);
                    }
                });
                if self.last || empty {
                    let from = (t.dc_last.as_ref(), t.dn_last.as_ref());
                    sweep.import(&task, from, active.gradient(active.chunks));
                }
            } else {
                if self.initial || group > 0 {
                    sweep.checkpoint(&task, group, true);
                }
                // The state after the group is the one before the group that was done last.
                let again = chunks.start..chunks.end - 1;
                sweep.forward(&task, kv, again, zero, |_| ());
            }
            let start = chunks.start.max(usize::from(!self.first));
            let dq = (&t.q, &t.dh, self.qk_scale);
            sweep.reverse(&task, dq, start..chunks.end, !self.last);
            if group == 0 && self.first {
                let to = (t.dc_initial.as_ref(), t.dn_initial.as_ref());
                sweep.export(&task, to, active.gradient(0));
            }
        }
    }

    /// Gradients of q, k and v for the tokens of one tile.
    fn tile(&self, active: &Active, chunk: usize, tile: usize, worker: usize) {
        let layout = self.memory.layout;
        let (start, len) = active.tokens(chunk, layout.chunk);
        let count = len.div_ceil(TILE);
        if tile >= count {
            return;
        }
        let tiles =
            |index: usize| Tile { start: start + index * TILE, len: TILE.min(len - index * TILE) };
        let scratch = self.memory.scratch(worker);
        let incoming = self.last || chunk + 1 < active.chunks;
        // SAFETY: the task owns the worker's scratch and writes its own tile of the outputs only.
        unsafe {
            if tile == 0 {
                let dot = if incoming { self.state_dot(active, chunk + 1) } else { 0.0 };
                *self.memory.chunk_dot(active.lane.chunk + chunk) = dot;
            }
            self.query_side(active, chunk, (tile, count), &tiles, &scratch);
            self.key_side(active, chunk, (tile, count), &tiles, incoming, &scratch);
        }
    }

    /// Loads s q, dhat and delta of a tile.
    ///
    /// # Safety
    /// As [`Backward::tile`], like all that follow.
    unsafe fn load_queries(&self, active: &Active, tile: Tile, scratch: &Scratch<T>) {
        let (t, layout, lane) = (self.tensors, self.memory.layout, &active.lane);
        let load = self.kernels.load(self.problem.dtype);
        let inverse = self.memory.vector(Vector::Inverse, lane.token + tile.start);
        let pull = self.memory.vector(Vector::Pull, lane.token + tile.start);
        let delta = scratch.vectors.row(DELTA);
        // SAFETY: the caller's contract.
        unsafe {
            let q = token_rows(&t.q, lane, tile.start);
            load(q, (tile.len, layout.dk), std::ptr::null(), self.qk_scale, scratch.q);
            let dh = token_rows(&t.dh, lane, tile.start);
            load(dh, (tile.len, layout.dv), inverse, T::ONE, scratch.o);
            for row in 0..tile.len {
                *delta.add(row) = *pull.add(row) * *inverse.add(row);
            }
        }
    }

    /// Loads k, k^T and v^T of a tile.
    unsafe fn load_keys(&self, active: &Active, tile: Tile, scratch: &Scratch<T>) {
        let (t, layout, lane) = (self.tensors, self.memory.layout, &active.lane);
        let load = self.kernels.load(self.problem.dtype);
        let transpose = self.kernels.transpose;
        let null = std::ptr::null();
        // SAFETY: the caller's contract.
        unsafe {
            let k = token_rows(&t.k, lane, tile.start);
            load(k, (tile.len, layout.dk), null, T::ONE, scratch.k);
            transpose(scratch.k, (tile.len, padded(layout.dk)), scratch.kt);
            let v = token_rows(&t.v, lane, tile.start);
            load(v, (tile.len, layout.dv), null, T::ONE, scratch.v);
            transpose(scratch.v, (tile.len, padded(layout.dv)), scratch.vt);
        }
    }

    /// dS, and P if wanted, of two loaded tiles; `between` is the decay exponent of the tiles
    /// between them, `None` for a tile with itself.
    unsafe fn pair(
        &self,
        active: &Active,
        (queries, keys): (Tile, Tile),
        between: Option<f64>,
        want_p: bool,
        scratch: &Scratch<T>,
    ) {
        let (kernels, layout, lane) = (self.kernels, self.memory.layout, &active.lane);
        let vector = |which, tile: Tile| self.memory.vector(which, lane.token + tile.start);
        let (delta, sums) = (scratch.vectors.row(DELTA), scratch.vectors.row(UNUSED));
        let causal = between.is_none();
        let size = (queries.len, padded(keys.len));
        let step = vector(Vector::Step, queries);
        let source = vector(Vector::Source, keys);
        // SAFETY: the caller's contract.
        unsafe {
            match between {
                None => (kernels.decay_tile)(step, source, queries.len, scratch.d),
                Some(between) => {
                    let (to, from) = (scratch.vectors.row(TO), scratch.vectors.row(FROM));
                    let key_step = vector(Vector::Step, keys);
                    gates::decay_to(kernels, step, queries.len, between, to);
                    gates::decay_from(kernels, key_step, source, keys.len, 0.0, from);
                    (kernels.outer)(to, from, size, scratch.d);
                }
            }
            let block = if causal { CAUSAL_ROWS } else { queries.len };
            for row in (0..queries.len).step_by(block) {
                let m = block.min(queries.len - row);
                let n = if causal { padded(row + m) } else { padded(keys.len) };
                let dh = Left::plain(scratch.o.below(row));
                let (ds, zero) = (scratch.ds.below(row), T::ZERO);
                kernels.multiply(dh, scratch.vt, (m, n, layout.dv), zero, ds);
                if want_p {
                    let (q, p) = (Left::plain(scratch.q.below(row)), scratch.p.below(row));
                    kernels.multiply(q, scratch.kt, (m, n, layout.dk), zero, p);
                }
            }
            (kernels.biased_hadamard)(scratch.ds, scratch.d, size, causal, delta);
            if want_p {
                (kernels.hadamard)(scratch.p, scratch.d, size, causal, sums);
            }
        }
    }

    /// dq of a tile. For a chunk of one tile dS and P stay in the scratch.
    unsafe fn query_side(
        &self,
        active: &Active,
        chunk: usize,
        (tile, count): (usize, usize),
        tiles: &impl Fn(usize) -> Tile,
        scratch: &Scratch<T>,
    ) {
        let (kernels, layout, lane) = (self.kernels, self.memory.layout, &active.lane);
        let vector = |which, token: usize| self.memory.vector(which, lane.token + token);
        let own = tiles(tile);
        let cols = padded(layout.dk);
        // SAFETY: the caller's contract.
        unsafe {
            self.load_queries(active, own, scratch);
            let mut beta = T::ZERO;
            if chunk > 0 || self.initial {
                let (c, n) = self.memory.slot(active.state(chunk));
                let (to, delta) = (scratch.vectors.row(TO), scratch.vectors.row(DELTA));
                let first = tiles(0).start;
                let before = gates::total(vector(Vector::Step, first), own.start - first);
                gates::decay_to(kernels, vector(Vector::Step, own.start), own.len, before, to);
                let dh = Left::plain(scratch.o);
                kernels.multiply(dh, c, (own.len, cols, layout.dv), beta, scratch.dq);
                (kernels.affine_rows)(scratch.dq, (own.len, cols), to, delta, n);
                beta = T::ONE;
            }
            let mut between = None;
            for other in (0..=tile).rev() {
                let keys = tiles(other);
                self.load_keys(active, keys, scratch);
                self.pair(active, (own, keys), between, count == 1, scratch);
                let causal = between.is_none();
                let block = if causal { CAUSAL_ROWS } else { own.len };
                for row in (0..own.len).step_by(block) {
                    let m = block.min(own.len - row);
                    let k = if causal { row + m } else { keys.len };
                    let ds = Left::plain(scratch.ds.below(row));
                    let dq = scratch.dq.below(row);
                    kernels.multiply(ds, scratch.k, (m, cols, k), beta, dq);
                }
                beta = T::ONE;
                between = Some(match between {
                    None => 0.0,
                    Some(sum) => sum + gates::total(vector(Vector::Step, keys.start), keys.len),
                });
            }
            let qdq = vector(Vector::Qdq, own.start);
            (kernels.row_dots)(scratch.q, scratch.dq, (own.len, cols), qdq);
            let out = token_rows(&self.tensors.dq, lane, own.start);
            let store = kernels.store(self.problem.dtype);
            store(scratch.dq, (own.len, layout.dk), std::ptr::null(), self.qk_scale, out);
        }
    }

    /// dk and dv of a tile.
    unsafe fn key_side(
        &self,
        active: &Active,
        chunk: usize,
        (tile, count): (usize, usize),
        tiles: &impl Fn(usize) -> Tile,
        incoming: bool,
        scratch: &Scratch<T>,
    ) {
        let (kernels, layout, lane) = (self.kernels, self.memory.layout, &active.lane);
        let vector = |which, token: usize| self.memory.vector(which, lane.token + token);
        let own = tiles(tile);
        let (cols, dv_cols) = (padded(layout.dk), padded(layout.dv));
        let null = std::ptr::null();
        // SAFETY: the caller's contract.
        unsafe {
            if tile > 0 {
                // The query side ended with the chunk's first keys.
                self.load_keys(active, own, scratch);
            }
            let mut beta = T::ZERO;
            if incoming {
                let (dc, dn) = self.memory.slot(active.gradient(chunk + 1));
                let from = scratch.vectors.row(FROM);
                let next = own.start + own.len;
                let end = tiles(count - 1).start + tiles(count - 1).len;
                let after = gates::total(vector(Vector::Step, next), end - next);
                let (step, source) =
                    (vector(Vector::Step, own.start), vector(Vector::Source, own.start));
                gates::decay_from(kernels, step, source, own.len, after, from);
                let v = Left::transposed(scratch.vt);
                kernels.multiply(v, dc, (own.len, cols, layout.dv), beta, scratch.dk);
                (kernels.affine_rows)(scratch.dk, (own.len, cols), from, null, dn);
                (kernels.transpose)(dc, (layout.dv, cols), scratch.dc);
                let (k, size) = (Left::plain(scratch.k), (own.len, dv_cols, layout.dk));
                kernels.multiply(k, scratch.dc, size, beta, scratch.dv);
                (kernels.affine_rows)(scratch.dv, (own.len, dv_cols), from, null, null);
                beta = T::ONE;
            }
            let mut between = None;
            for other in tile..count {
                let queries = tiles(other);
                if other > tile {
                    self.load_queries(active, queries, scratch);
                }
                if count > 1 {
                    self.pair(active, (queries, own), between, true, scratch);
                }
                let causal = between.is_none();
                let block = if causal { CAUSAL_ROWS } else { own.len };
                for col in (0..own.len).step_by(block) {
                    let m = block.min(own.len - col);
                    // Queries before the block's first key do not see it.
                    let first = if causal { col } else { 0 };
                    let k = queries.len - first;
                    let at = |x: Mat<T>| {
                        let x = x.below(first);
                        Left::transposed(Mat { p: x.p.wrapping_add(col), ld: x.ld })
                    };
                    let (q, dh) = (scratch.q.below(first), scratch.o.below(first));
                    let dk = scratch.dk.below(col);
                    kernels.multiply(at(scratch.ds), q, (m, cols, k), beta, dk);
                    let dv = scratch.dv.below(col);
                    kernels.multiply(at(scratch.p), dh, (m, dv_cols, k), beta, dv);
                }
                beta = T::ONE;
                between = Some(match between {
                    None => 0.0,
                    Some(sum) => {
                        sum + gates::total(vector(Vector::Step, queries.start), queries.len)
                    }
                });
            }
            let kdk = vector(Vector::Kdk, own.start);
            (kernels.row_dots)(scratch.k, scratch.dk, (own.len, cols), kdk);
            let store = kernels.store(self.problem.dtype);
            let dk = token_rows(&self.tensors.dk, lane, own.start);
            store(scratch.dk, (own.len, layout.dk), null, T::ONE, dk);
            let dv = token_rows(&self.tensors.dv, lane, own.start);
            store(scratch.dv, (own.len, layout.dv), null, T::ONE, dv);
        }
    }
}

/// Rows of the scratch vectors.
const TO: usize = 0;
const FROM: usize = 1;
const DELTA: usize = 2;
const UNUSED: usize = 3;
