//! The recurrence over chunks: states C, n at chunk starts in the forward direction, and their
//! gradients at chunk ends in the reverse direction. Tasks split a lane by columns of its state, so
//! one task walks along the whole sequence with its slice of the state in cache.

use super::gates;
use super::gemm::Gemm;
use super::lanes::{Lane, state_rows, token_rows};
use super::layout::{Layout, Memory, Scratch, Vector};
use super::real::Real;
use super::table::Kernels;
use super::vecops::{Mat, Rows, TILE, padded};
use crate::tensor::{DType, View};

/// Columns of a state per task.
pub(crate) const SLICE: usize = TILE;

/// A lane at work: the lane and its chunk states in the workspace.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Active {
    pub lane: Lane,
    pub chunks: usize,
    /// Slots of one direction: the states before and after the chunks of a group.
    states: usize,
    first_slot: usize,
}

impl Active {
    /// `first_slot` is the lane's first of [`Layout::slots_of`] slots.
    pub(crate) fn new(lane: Lane, layout: &Layout, first_slot: usize) -> Self {
        let chunks = lane.len.div_ceil(layout.chunk);
        Self { lane, chunks, states: chunks.min(layout.group) + 1, first_slot }
    }

    /// Slot of the state before chunk `index` (after all chunks: `index == chunks`). Neighbouring
    /// groups share the slot of the state between them.
    pub(crate) fn state(&self, index: usize) -> usize {
        self.first_slot + index % self.states
    }

    /// Slot of that state's gradient.
    pub(crate) fn gradient(&self, index: usize) -> usize {
        self.first_slot + self.states + index % self.states
    }

    /// Slot that keeps the state at the start of a group.
    fn checkpoint(&self, group: usize) -> usize {
        self.first_slot + 2 * self.states + group
    }

    /// First token of a chunk and its number of tokens.
    pub(crate) fn tokens(&self, chunk: usize, chunk_len: usize) -> (usize, usize) {
        let start = chunk * chunk_len;
        (start, chunk_len.min(self.lane.len - start))
    }

    /// Number of groups, and the chunks of one.
    pub(crate) fn groups(&self, layout: &Layout) -> usize {
        self.chunks.div_ceil(layout.group)
    }

    /// Chunks of a group.
    pub(crate) fn group(&self, group: usize, layout: &Layout) -> std::ops::Range<usize> {
        let start = group * layout.group;
        start..self.chunks.min(start + layout.group)
    }
}

/// Columns of the state that a task owns.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slice {
    pub first: usize,
    pub count: usize,
}

impl Slice {
    /// The slice with this number of a state of `cols` columns.
    pub(crate) fn new(index: usize, cols: usize) -> Self {
        let first = index * SLICE;
        Self { first, count: SLICE.min(cols - first) }
    }
}

/// What the sweeps of one call share.
pub(crate) struct Sweep<'a, T: 'static> {
    pub kernels: &'static Kernels<T>,
    pub memory: Memory<'a, T>,
    pub dtype: DType,
}

/// What one task works on: columns of one lane's states, with its worker's scratch.
pub(crate) struct Task<'a, T> {
    pub active: &'a Active,
    pub slice: Slice,
    pub scratch: &'a Scratch<T>,
    /// States are (DHQK, DHHV) if false, else (DHHV, DHQK).
    pub transposed: bool,
}

/// One update of a state: `out = beta * old + (rows of A)^T diag(weight) (rows of B)`.
struct Update<T> {
    a: Rows,
    a_cols: usize,
    b: Rows,
    tokens: usize,
    weight: *const T,
    scale: T,
    beta: T,
    old: usize,
    out: usize,
}

impl<T: Real> Sweep<'_, T> {
    /// Adds the tokens of one tile to the slice of a state; leaves the weighted rows of B in
    /// `scratch.d`.
    ///
    /// # Safety
    /// The update's pointers are valid. Here and below, no other thread touches the task's slice
    /// of the lane's states, or its scratch.
    unsafe fn update(&self, task: &Task<'_, T>, u: &Update<T>) {
        let (kernels, slice, scratch) = (self.kernels, task.slice, task.scratch);
        let b = scratch.d;
        // SAFETY: the caller's contract; scratch matrices hold TILE rows of these widths.
        unsafe {
            (kernels.load(self.dtype))(u.b, (u.tokens, slice.count), u.weight, u.scale, b);
            // The product reads A by elements: rows of the compute type can stay where they are.
            let native = !matches!(self.dtype, DType::Bf16 | DType::F16) && u.a.stride > 0;
            let (a, a_inner) = if native {
                (u.a.p.cast::<T>().cast_const(), u.a.stride as usize)
            } else {
                let a = if u.a_cols == self.memory.layout.dk { scratch.k } else { scratch.v };
                let size = (u.tokens, u.a_cols);
                (kernels.load(self.dtype))(u.a, size, std::ptr::null(), T::ONE, a);
                (a.p.cast_const(), a.ld)
            };
            let (old, _) = self.memory.slot(u.old);
            let (out, _) = self.memory.slot(u.out);
            (kernels.gemm)(&Gemm {
                m: u.a_cols,
                n: padded(slice.count),
                k: u.tokens,
                a,
                a_row: 1,
                a_inner,
                b: b.p,
                b_row: b.ld,
                beta: u.beta,
                cin: old.p.wrapping_add(slice.first),
                cin_row: old.ld,
                out: out.p.wrapping_add(slice.first),
                out_row: out.ld,
            });
        }
    }

    /// The states after each of `chunks`. `zero` says that the state before chunk 0 is zero and
    /// not in memory.
    ///
    /// # Safety
    /// The state before the first of `chunks` is there.
    pub(crate) unsafe fn forward(
        &self,
        task: &Task<'_, T>,
        (k, v): (&View, &View),
        chunks: std::ops::Range<usize>,
        zero: bool,
        mut after_chunk: impl FnMut(usize),
    ) {
        let Task { active, slice, scratch, transposed } = *task;
        let layout = self.memory.layout;
        let lane = &active.lane;
        let weight = scratch.vectors.row(0);
        let item = k.dtype.size();
        for chunk in chunks {
            let (start, len) = active.tokens(chunk, layout.chunk);
            let step = self.memory.vector(Vector::Step, lane.token + start);
            let source = self.memory.vector(Vector::Source, lane.token + start);
            let (before, after) = (active.state(chunk), active.state(chunk + 1));
            // SAFETY: the vectors cover the lane's tokens; else the caller's contract.
            unsafe {
                let decay = T::from_f64(gates::total(step, len).exp());
                let mut beta = if zero && chunk == 0 { T::ZERO } else { decay };
                let mut old = before;
                let mut following = 0.0;
                // From the last tile back, so that the decay after a tile is a running sum.
                for tile in (0..len.div_ceil(TILE)).rev() {
                    let first = tile * TILE;
                    let tokens = TILE.min(len - first);
                    following = gates::decay_from(
                        self.kernels,
                        step.add(first),
                        source.add(first),
                        tokens,
                        following,
                        weight,
                    );
                    let krows = token_rows(k, lane, start + first);
                    let vrows = token_rows(v, lane, start + first);
                    let ((a, a_cols), b) = if transposed {
                        ((vrows, layout.dv), krows)
                    } else {
                        ((krows, layout.dk), vrows)
                    };
                    let b = Rows { p: b.p.wrapping_add(slice.first * item), stride: b.stride };
                    let scale = T::ONE;
                    let update =
                        Update { a, a_cols, b, tokens, weight, scale, beta, old, out: after };
                    self.update(task, &update);
                    let ((_, n_old), (_, n_out)) = (self.memory.slot(old), self.memory.slot(after));
                    if transposed {
                        let rows = scratch.d;
                        (self.kernels.column_sums)(
                            rows,
                            (tokens, padded(slice.count)),
                            std::ptr::null(),
                            beta,
                            n_old.wrapping_add(slice.first),
                            n_out.wrapping_add(slice.first),
                        );
                    } else if slice.first == 0 {
                        let size = (tokens, layout.dk);
                        let load = self.kernels.load(self.dtype);
                        load(krows, size, std::ptr::null(), T::ONE, scratch.k);
                        let size = (tokens, padded(layout.dk));
                        (self.kernels.column_sums)(scratch.k, size, weight, beta, n_old, n_out);
                    }
                    (beta, old) = (T::ONE, after);
                }
            }
            after_chunk(chunk);
        }
    }

    /// Gradients of the states before each of `chunks`, last chunk first. `zero` says that the
    /// gradient of the last state is zero and not in memory.
    ///
    /// # Safety
    /// The gradient after the last of `chunks` is there.
    pub(crate) unsafe fn reverse(
        &self,
        task: &Task<'_, T>,
        (q, dh, qk_scale): (&View, &View, T),
        chunks: std::ops::Range<usize>,
        zero: bool,
    ) {
        let Task { active, slice, scratch, .. } = *task;
        let layout = self.memory.layout;
        let lane = &active.lane;
        let weight = scratch.vectors.row(0);
        let item = q.dtype.size();
        for chunk in chunks.rev() {
            let (start, len) = active.tokens(chunk, layout.chunk);
            let vector = |which| self.memory.vector(which, lane.token + start);
            let step = vector(Vector::Step);
            let (end, out) = (active.gradient(chunk + 1), active.gradient(chunk));
            // SAFETY: the vectors cover the lane's tokens; else the caller's contract.
            unsafe {
                let decay = T::from_f64(gates::total(step, len).exp());
                let mut beta = if zero && chunk + 1 == active.chunks { T::ZERO } else { decay };
                let mut old = end;
                let mut before = 0.0;
                for first in (0..len).step_by(TILE) {
                    let tokens = TILE.min(len - first);
                    before = gates::decay_to(self.kernels, step.add(first), tokens, before, weight);
                    let inverse = vector(Vector::Inverse).add(first);
                    for t in 0..tokens {
                        *weight.add(t) = *weight.add(t) * *inverse.add(t);
                    }
                    let b = token_rows(q, lane, start + first);
                    let b = Rows { p: b.p.wrapping_add(slice.first * item), stride: b.stride };
                    let a = token_rows(dh, lane, start + first);
                    let (a_cols, scale) = (layout.dv, qk_scale);
                    let update = Update { a, a_cols, b, tokens, weight, scale, beta, old, out };
                    self.update(task, &update);
                    let ((_, n_old), (_, n_out)) = (self.memory.slot(old), self.memory.slot(out));
                    (self.kernels.column_sums)(
                        scratch.d,
                        (tokens, padded(slice.count)),
                        vector(Vector::Pull).add(first),
                        beta,
                        n_old.wrapping_add(slice.first),
                        n_out.wrapping_add(slice.first),
                    );
                    (beta, old) = (T::ONE, out);
                }
            }
        }
    }

    /// Brings the slice of a user's state (zeros if absent) into a slot.
    ///
    /// # Safety
    /// As [`Sweep::update`].
    pub(crate) unsafe fn import(
        &self,
        task: &Task<'_, T>,
        (c, n): (Option<&View>, Option<&View>),
        slot: usize,
    ) {
        let Task { active, slice, scratch, transposed } = *task;
        let lane = &active.lane;
        let layout = self.memory.layout;
        let (mat, vec) = self.memory.slot(slot);
        let (null, width) = (std::ptr::null(), padded(slice.count));
        let columns = Mat { p: mat.p.wrapping_add(slice.first), ld: mat.ld };
        // SAFETY: slot and scratch cover these sizes; else the caller's contract.
        unsafe {
            match c {
                Some(view) if transposed => {
                    let rows = state_rows(view, lane, slice.first, 0);
                    let load = self.kernels.load(view.dtype);
                    load(rows, (slice.count, layout.dv), null, T::ONE, scratch.v);
                    // Whole rows of the state: transposing pads to vectors, beyond DHHV.
                    for first in (0..layout.dv).step_by(TILE) {
                        let count = TILE.min(layout.dv - first);
                        let tile = Mat { p: scratch.v.p.add(first), ld: scratch.v.ld };
                        let size = (slice.count, padded(count));
                        (self.kernels.transpose)(tile, size, scratch.p);
                        for row in 0..count {
                            let to = columns.row(first + row);
                            scratch.p.row(row).copy_to_nonoverlapping(to, width);
                        }
                    }
                }
                Some(view) => {
                    let rows = state_rows(view, lane, 0, slice.first);
                    let load = self.kernels.load(view.dtype);
                    load(rows, (layout.dk, slice.count), null, T::ONE, columns);
                }
                None => {
                    for row in 0..layout.state_rows {
                        columns.row(row).write_bytes(0, width);
                    }
                }
            }
            // n lies along DHQK: sliced with the columns if they are DHQK, else the first slice's.
            let (first, count) =
                if transposed { (slice.first, slice.count) } else { (0, layout.dk) };
            if transposed || slice.first == 0 {
                let to = Mat { p: vec.wrapping_add(first), ld: 0 };
                match n {
                    Some(view) => {
                        let rows = state_rows(view, lane, 0, first);
                        (self.kernels.load(view.dtype))(rows, (1, count), null, T::ONE, to);
                    }
                    None => to.p.write_bytes(0, padded(count)),
                }
            }
        }
    }

    /// Writes the slice of a slot to a user's state.
    ///
    /// # Safety
    /// As [`Sweep::update`].
    pub(crate) unsafe fn export(
        &self,
        task: &Task<'_, T>,
        (c, n): (Option<&View>, Option<&View>),
        slot: usize,
    ) {
        let Task { active, slice, scratch, transposed } = *task;
        let lane = &active.lane;
        let layout = self.memory.layout;
        let (mat, vec) = self.memory.slot(slot);
        let null = std::ptr::null();
        let columns = Mat { p: mat.p.wrapping_add(slice.first), ld: mat.ld };
        // SAFETY: slot and scratch cover these sizes; else the caller's contract.
        unsafe {
            if let Some(view) = c {
                let store = self.kernels.store(view.dtype);
                if transposed {
                    let width = padded(slice.count);
                    for first in (0..layout.dv).step_by(TILE) {
                        let count = TILE.min(layout.dv - first);
                        (self.kernels.transpose)(columns.below(first), (count, width), scratch.p);
                        let rows = state_rows(view, lane, slice.first, first);
                        store(scratch.p, (slice.count, count), null, T::ONE, rows);
                    }
                } else {
                    let rows = state_rows(view, lane, 0, slice.first);
                    store(columns, (layout.dk, slice.count), null, T::ONE, rows);
                }
            }
            let (first, count) =
                if transposed { (slice.first, slice.count) } else { (0, layout.dk) };
            if let (Some(view), true) = (n, transposed || slice.first == 0) {
                let from = Mat { p: vec.wrapping_add(first), ld: 0 };
                let rows = state_rows(view, lane, 0, first);
                (self.kernels.store(view.dtype))(from, (1, count), null, T::ONE, rows);
            }
        }
    }

    /// Copies the slice of a state to or from the checkpoint of a group.
    ///
    /// # Safety
    /// As [`Sweep::update`].
    pub(crate) unsafe fn checkpoint(&self, task: &Task<'_, T>, group: usize, restore: bool) {
        let Task { active, slice, .. } = *task;
        let state = active.state(group * self.memory.layout.group);
        let kept = active.checkpoint(group);
        let (from, to) = if restore { (kept, state) } else { (state, kept) };
        let ((from, from_n), (to, to_n)) = (self.memory.slot(from), self.memory.slot(to));
        let width = padded(slice.count);
        // SAFETY: two different slots; else the caller's contract.
        unsafe {
            for row in 0..self.memory.layout.state_rows {
                let from = from.row(row).wrapping_add(slice.first);
                from.copy_to_nonoverlapping(to.row(row).wrapping_add(slice.first), width);
            }
            let from = from_n.wrapping_add(slice.first);
            from.copy_to_nonoverlapping(to_n.wrapping_add(slice.first), width);
        }
    }
}
