//! The step: 1 to 16 tokens per row on a pool of states, each state read and written once.

use super::forward::inverse_denominator;
use super::gates::gate_step;
use super::lanes::{Lane, read_index, read_real, state_rows_at, token_rows, write_real};
use super::layout::leading;
use super::level::Level;
use super::pool;
use super::real::Real;
use super::step_tile::StepTile;
use super::table::{Compute, Kernels};
use super::vecops::{Mat, padded};
use crate::error::{Error, Result};
use crate::ops::{Step, StepTensors};
use crate::problem::Problem;
use crate::tensor::View;
use crate::workspace::{Carver, Region, Workspace};

/// Columns of a state that are worth a task of their own.
const COLUMNS: usize = 128;

/// Sizes and places of everything in the workspace.
pub(crate) struct StepLayout {
    /// Which row writes a slot.
    writers: Region,
    scratch: Region,
    scratch_len: usize,
    matrices: [Region; 6],
    pub bytes: usize,
}

impl StepLayout {
    pub(crate) fn new<T>(problem: &Problem) -> Result<Self> {
        let (tokens, dk, dv) = (problem.s as usize, problem.dhqk as usize, problem.dhhv as usize);
        let mut scratch = Carver::default();
        let (wide_k, wide_v) =
            (tokens.saturating_mul(leading(dk)), tokens.saturating_mul(leading(dv)));
        let matrices = [wide_k, wide_k, wide_v, wide_v, padded(dk), 2 * padded(tokens)]
            .map(|size| scratch.take::<T>(size));
        let scratch_len = scratch.total()?;
        let mut carver = Carver::default();
        let writers = carver.take::<i64>(problem.num_slots as usize);
        let scratch = carver.take::<u8>(scratch_len.saturating_mul(pool::threads()));
        let bytes = carver.total()?;
        Ok(Self { writers, scratch, scratch_len, matrices, bytes })
    }
}

/// One row's part in the step; `None` for a padding row.
struct Row {
    /// The slot to read, unless the row starts from a zero state.
    src: Option<usize>,
    /// The slot to write, if any.
    dst: Option<usize>,
    tokens: usize,
}

fn row(t: &StepTensors, s: usize, index: usize) -> Option<Row> {
    let read = |view: &Option<View>| view.as_ref().map(|view| read_index(view, index));
    let src = read(&t.src_slots).unwrap_or(index as i64);
    let dst = read(&t.dst_slots).unwrap_or(src);
    if src < 0 {
        return None;
    }
    let has_state = flag(&t.has_state, index);
    Some(Row {
        src: has_state.then_some(src as usize),
        dst: usize::try_from(dst).ok(),
        tokens: read(&t.num_tokens).map_or(s, |tokens| tokens as usize),
    })
}

fn flag(view: &Option<View>, index: usize) -> bool {
    view.as_ref().is_none_or(|view| read_index(view, index) != 0)
}

/// Checks the contents of the index tensors, before anything is written. `writers` has an entry
/// per slot; what it holds at first does not matter, since every entry is checked against the rows.
///
/// # Safety
/// `writers` covers the slots.
unsafe fn check_rows(op: &Step, writers: *mut i64) -> Result<()> {
    let (p, t) = (&op.problem, &op.tensors);
    let rows = p.b as usize;
    for index in 0..rows {
        for (name, view) in [("src_slots", &t.src_slots), ("dst_slots", &t.dst_slots)] {
            let Some(view) = view else { continue };
            let slot = read_index(view, index);
            if !(-1..p.num_slots).contains(&slot) {
                let wanted = format!("-1 to {} (num_slots - 1)", p.num_slots - 1);
                return Err(Error::invalid(format!("{name}[{index}]"), wanted, slot));
            }
        }
        if let Some(view) = &t.num_tokens {
            let tokens = read_index(view, index);
            if !(0..=p.s).contains(&tokens) {
                let wanted = format!("0 to {} (s)", p.s);
                return Err(Error::invalid(format!("num_tokens[{index}]"), wanted, tokens));
            }
        }
    }
    let s = p.s as usize;
    let destination = |index: usize| row(t, s, index).and_then(|row| row.dst);
    for index in 0..rows {
        if let Some(dst) = destination(index) {
            // SAFETY: slots were checked above.
            unsafe { *writers.add(dst) = index as i64 };
        }
    }
    let writer = |slot: usize| {
        // SAFETY: as above.
        let index = usize::try_from(unsafe { *writers.add(slot) }).ok()?;
        (index < rows && destination(index) == Some(slot)).then_some(index)
    };
    for index in 0..rows {
        let Some(this) = row(t, s, index) else { continue };
        if let Some(dst) = this.dst
            && writer(dst) != Some(index)
        {
            let name = if t.dst_slots.is_some() { "dst_slots" } else { "src_slots" };
            let wanted = "a slot that no other row writes";
            return Err(Error::invalid(format!("{name}[{index}]"), wanted, dst));
        }
        if let (Some(src), true) = (this.src, op.in_place())
            && writer(src).is_some_and(|other| other != index)
        {
            let wanted = "a slot that no other row writes (source and destination pools are one)";
            return Err(Error::invalid(format!("src_slots[{index}]"), wanted, src));
        }
    }
    Ok(())
}

/// One call.
struct Stepper<'a, T: 'static> {
    problem: &'a Problem,
    tensors: &'a StepTensors,
    destination: (View, View, Option<View>),
    kernels: &'static Kernels<T>,
    layout: &'a StepLayout,
    base: *mut u8,
}

// SAFETY: shared between the tasks of one call; rows write different slots (`check_rows`), and
// tasks of one row different heads or columns.
unsafe impl<T> Sync for Stepper<'_, T> {}

/// Runs a step at this SIMD level on at most this many threads.
pub(crate) fn run<T: Compute>(
    op: &Step,
    workspace: Workspace,
    level: Level,
    threads: usize,
) -> Result<()> {
    let problem = &op.problem;
    let layout = StepLayout::new::<T>(problem)?;
    workspace.check(layout.bytes)?;
    let writers = workspace.data.wrapping_add(layout.writers.offset).cast::<i64>();
    // SAFETY: the layout has an entry per slot.
    unsafe { check_rows(op, writers)? };
    let stepper = Stepper::<T> {
        problem,
        tensors: &op.tensors,
        destination: op.destination(),
        kernels: T::kernels(level),
        layout: &layout,
        base: workspace.data,
    };
    let (nh, dv) = (problem.nh as usize, problem.dhhv as usize);
    let lanes = problem.b as usize * nh;
    // Columns do not depend on one another, so their split may follow the number of threads.
    let wanted = (4 * threads).div_ceil(lanes.max(1));
    let width = if threads == 1 { dv } else { dv.div_ceil(wanted).next_multiple_of(COLUMNS) };
    let slices = dv.div_ceil(width);
    pool::for_each(threads, lanes * slices, |index, worker| {
        let (lane, slice) = (index / slices, index % slices);
        let columns = slice * width..dv.min((slice + 1) * width);
        stepper.lane(lane / nh, lane % nh, Some(columns), slices == 1, worker);
    });
    if slices > 1 {
        // All slices of a head read its old n and m: the new ones wait for them.
        pool::for_each(threads, lanes, |lane, worker| {
            stepper.lane(lane / nh, lane % nh, None, true, worker);
        });
    }
    Ok(())
}

impl<T: Real> Stepper<'_, T> {
    /// Columns of one head: C and h; and n and m if `vectors`.
    fn lane(
        &self,
        index: usize,
        head: usize,
        columns: Option<std::ops::Range<usize>>,
        vectors: bool,
        worker: usize,
    ) {
        let (p, t, kernels) = (self.problem, self.tensors, self.kernels);
        let Some(row) = row(t, p.s as usize, index) else { return };
        if row.tokens == 0 && (row.dst.is_none() || self.unchanged(&row)) {
            return;
        }
        let (dk, dv) = (p.dhqk as usize, p.dhhv as usize);
        let scratch = self.base.wrapping_add(self.layout.scratch.offset);
        let scratch = scratch.wrapping_add(worker * self.layout.scratch_len);
        let mat = |which: usize, ld: usize| Mat::<T> {
            p: scratch.wrapping_add(self.layout.matrices[which].offset).cast(),
            ld,
        };
        let (k, q) = (mat(0, leading(dk)), mat(1, leading(dk)));
        let (v, h, n) = (mat(2, leading(dv)), mat(3, leading(dv)), mat(4, 0));
        let (decay, inverse) = (mat(5, 0).p, mat(5, 0).p.wrapping_add(padded(p.s as usize)));
        let null = std::ptr::null();
        let lane = Lane { batch: index, row: index, head, len: row.tokens, ..Lane::default() };
        let load = kernels.load(p.dtype);
        // SAFETY: scratch is the worker's own; slots were checked, and no other task writes the
        // same slot, head and columns (n and m: the same slot and head).
        unsafe {
            let mut m = 0.0;
            match row.src {
                Some(slot) => {
                    if let Some(view) = &t.m {
                        m = read_real(view, [slot, head, 0]);
                    }
                    let from = state_rows_at(&t.n, slot, head, 0, 0);
                    kernels.load(t.n.dtype)(from, (1, dk), null, T::ONE, n);
                }
                None => n.p.write_bytes(0, padded(dk)),
            }
            for token in 0..row.tokens {
                let at = [index, head, token];
                let gate = gate_step(p.gate, read_real(&t.i, at), read_real(&t.f, at), m);
                m = gate.m;
                let keep = T::from_f64(gate.step.exp());
                *decay.add(token) = keep;
                let weight = T::from_f64(gate.source.exp());
                let (krow, qrow) = (k.below(token), q.below(token));
                load(token_rows(&t.k, &lane, token), (1, dk), null, weight, krow);
                let scale = T::from_f64(p.qk_scale);
                load(token_rows(&t.q, &lane, token), (1, dk), null, scale, qrow);
                (kernels.column_sums)(krow, (1, padded(dk)), null, keep, n.p, n.p);
                let mut dot = T::ZERO;
                (kernels.row_dots)(qrow, n, (1, padded(dk)), &raw mut dot);
                *inverse.add(token) = if p.gate.has_normalizer() {
                    inverse_denominator(dot, T::from_f64(gate.floor), T::from_f64(p.eps))
                } else {
                    T::ONE
                };
            }
            if let Some(columns) = columns {
                let (first, count) = (columns.start, columns.len());
                let item = p.dtype.size();
                let shift = |mut rows: super::vecops::Rows| {
                    rows.p = rows.p.wrapping_add(first * item);
                    rows
                };
                let size = (row.tokens, count);
                load(shift(token_rows(&t.v, &lane, 0)), size, null, T::ONE, v);
                // A first factor of 0 forgets whatever the slot holds.
                let forgets = row.tokens > 0 && *decay == T::ZERO;
                let src = row.src.filter(|_| !forgets);
                let tile = StepTile {
                    rows: dk,
                    cols: count,
                    tokens: row.tokens,
                    src: src.map(|slot| state_rows_at(&t.c, slot, head, 0, first)),
                    dst: row
                        .dst
                        .map(|slot| state_rows_at(&self.destination.0, slot, head, 0, first)),
                    decay,
                    k,
                    q,
                    v,
                    h,
                };
                kernels.step_tile(t.c.dtype)(&tile);
                let out = shift(token_rows(&t.h, &lane, 0));
                kernels.store(p.dtype)(h, size, inverse, T::ONE, out);
            }
            if let (Some(slot), true) = (row.dst, vectors) {
                let view = &self.destination.1;
                let to = state_rows_at(view, slot, head, 0, 0);
                kernels.store(view.dtype)(n, (1, dk), null, T::ONE, to);
                if let Some(view) = &self.destination.2 {
                    write_real(view, [slot, head, 0], m);
                }
            }
        }
    }

    /// Whether the row's state is already where it should be, if it has no tokens.
    fn unchanged(&self, row: &Row) -> bool {
        row.src == row.dst && self.destination.0.data == self.tensors.c.data
    }
}
