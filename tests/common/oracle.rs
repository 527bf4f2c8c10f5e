//! What a case's outputs must be, by the float64 oracle, and how far off they may be.

use std::collections::BTreeMap;

use mlstm::ffi::*;
use mlstm::reference::{self, Cell, Forward, Gradients, Incoming, Sequence, State, denominator};
use mlstm::{DType, Gate};

use super::case::Setup;
use super::noise::Noise;
use super::tensor::Role;

/// Row-major elements of the outputs by name; `None` where nothing may be written.
pub type Values = BTreeMap<&'static str, Vec<Option<f64>>>;

/// An output's elements and the error allowed in each.
pub struct Expected {
    pub values: Values,
    pub tolerance: BTreeMap<&'static str, Vec<f64>>,
    /// Rounding decides between two branches of the formulas, so any of two results is right.
    pub ambiguous: bool,
}

/// Unit roundoff of a dtype.
fn epsilon(dtype: mlstm_dtype) -> f64 {
    match dtype {
        MLSTM_F64 => f64::EPSILON,
        MLSTM_BF16 => 1.0 / 256.0,
        MLSTM_F16 => 1.0 / 2048.0,
        _ => f64::from(f32::EPSILON),
    }
}

/// Half the distance of the dtype's smallest numbers.
fn smallest(dtype: mlstm_dtype) -> f64 {
    if dtype == MLSTM_F16 { 2f64.powi(-25) } else { 1e-30 }
}

/// One run of the oracle, its inputs moved by about this many roundings.
struct Run<'a> {
    setup: &'a Setup,
    inputs: BTreeMap<&'static str, Vec<f64>>,
    outputs: Values,
    branches: Vec<bool>,
    /// Largest sum of magnitudes behind a gate's gradient, which may cancel to much less.
    summands: f64,
    noise: Noise,
    roundings: f64,
}

/// Tokens of one head that form a sequence with a state of its own.
#[derive(Clone, Copy)]
struct Span {
    b: usize,
    h: usize,
    from: usize,
    to: usize,
}

/// What the forward saved, for a backward's inputs h, n and m.
pub fn fill_saved(setup: &mut Setup) {
    let mut run = Run::new(setup, 0.0, 0);
    for name in ["h", "n", "m"] {
        let len = setup.get(name).map_or(0, |tensor| tensor.len());
        run.outputs.insert(name, vec![Some(0.0); len]);
    }
    run.sequences(false);
    let saved = run.outputs;
    for tensor in setup.tensors.iter_mut().filter(|tensor| matches!(tensor.name, "h" | "n" | "m")) {
        tensor.store(saved[tensor.name].iter().copied());
        for (stored, exact) in tensor.values.iter().zip(saved[tensor.name].iter().flatten()) {
            let rounding = (stored - exact).abs();
            // NaN where both are infinite; infinite beyond the range of float16.
            let rounded = rounding <= epsilon(tensor.dtype) * exact.abs() + 1e-7;
            assert!(rounded || rounding.is_nan() || stored.is_infinite(), "{}", tensor.name);
        }
    }
}

pub fn expected(setup: &Setup) -> Expected {
    let exact = Run::whole(setup, 0.0, 0);
    let moved = [1, 2, 3, 4].map(|seed| Run::whole(setup, 8.0, seed));
    let mut tolerance = BTreeMap::new();
    for (&name, values) in &exact.outputs {
        let tensor = setup.get(name).unwrap();
        let compute = epsilon(setup.case.compute());
        let storage = epsilon(tensor.dtype);
        let largest =
            values.iter().flatten().filter(|x| x.is_finite()).fold(0.0, |a: f64, x| a.max(x.abs()));
        let largest = match name {
            "di" | "df" | "dm_initial" => exact.summands,
            _ => largest,
        };
        let allowed = values.iter().enumerate().map(|(index, value)| {
            let Some(x) = value else { return 0.0 };
            let sensitivity =
                moved.iter().filter_map(|run| run.outputs[name][index]).fold(0.0, |a: f64, y| {
                    let apart = (y - x).abs();
                    if apart.is_finite() { a.max(apart) } else { a }
                });
            storage * x.abs()
                + 64.0 * compute * largest
                + 16.0 * sensitivity
                + smallest(tensor.dtype)
        });
        tolerance.insert(name, allowed.collect());
    }
    let ambiguous = moved.iter().any(|run| run.branches != exact.branches);
    Expected { values: exact.outputs, tolerance, ambiguous }
}

impl<'a> Run<'a> {
    fn new(setup: &'a Setup, roundings: f64, seed: u64) -> Self {
        let mut noise = Noise(seed);
        let mut inputs = BTreeMap::new();
        for tensor in setup.tensors.iter().filter(|tensor| tensor.role != Role::Out) {
            let roundoff = match tensor.dtype {
                MLSTM_I32 | MLSTM_I64 | MLSTM_U8 => 0.0,
                _ => epsilon(setup.case.compute()) * roundings,
            };
            // Exponents are rounded where they are sums of several gates, larger than each.
            let more = if matches!(tensor.name, "i" | "f" | "m_initial") { 8.0 } else { 0.0 };
            let moved = tensor.values.iter().map(|x| match x.is_finite() {
                true => x + (x.abs() + more) * roundoff * noise.unit(),
                false => *x,
            });
            inputs.insert(tensor.name, moved.collect());
        }
        let outputs = setup
            .tensors
            .iter()
            .filter(|tensor| tensor.role != Role::In)
            .map(|tensor| (tensor.name, vec![None; tensor.len()]))
            .collect();
        Self { setup, inputs, outputs, branches: vec![], summands: 0.0, noise, roundings }
    }

    fn whole(setup: &'a Setup, roundings: f64, seed: u64) -> Self {
        let mut run = Self::new(setup, roundings, seed);
        match setup.case.op {
            MLSTM_OP_CHUNKWISE_FW | MLSTM_OP_PARALLEL_FW => run.sequences(false),
            MLSTM_OP_CHUNKWISE_BW | MLSTM_OP_PARALLEL_BW => run.sequences(true),
            _ => run.step(),
        }
        run
    }

    fn cell(&self) -> Cell {
        let p = &self.setup.problem;
        Cell {
            gate: match p.gate {
                MLSTM_GATE_EXP => Gate::Exponential,
                _ => Gate::Sigmoid { normalize: self.setup.normalized() },
            },
            qk_scale: if p.qk_scale == 0.0 { (p.dhqk as f64).powf(-0.5) } else { p.qk_scale },
            eps: match p.eps {
                0.0 if p.flags & MLSTM_FLAG_NO_EPS == 0 => 1e-6,
                eps => eps,
            },
            detach_denominator: p.flags & MLSTM_FLAG_DETACH_DENOMINATOR != 0,
        }
    }

    /// A part of an input (B, NH, S, ...), or nothing.
    fn tokens(&self, name: &str, span: Span, width: usize) -> Vec<f64> {
        let (nh, s) = (self.setup.case.nh as usize, self.setup.case.s as usize);
        let first = (span.b * nh + span.h) * s;
        self.inputs[name][(first + span.from) * width..(first + span.to) * width].to_vec()
    }

    fn put_tokens(&mut self, name: &'static str, span: Span, width: usize, values: &[f64]) {
        let (nh, s) = (self.setup.case.nh as usize, self.setup.case.s as usize);
        if let Some(out) = self.outputs.get_mut(name) {
            let first = ((span.b * nh + span.h) * s + span.from) * width;
            for (slot, x) in out.iter_mut().skip(first).zip(values) {
                *slot = Some(*x);
            }
        }
    }

    fn dims(&self) -> (usize, usize) {
        (self.setup.case.dhqk as usize, self.setup.case.dhhv as usize)
    }

    /// A row's state from (C, n, m) by these names; zero where absent.
    fn state(&self, names: [&str; 3], row: usize, h: usize) -> State {
        let (dhqk, dhhv) = self.dims();
        let index = row * self.setup.case.nh as usize + h;
        let part = |name: &str, size: usize| {
            let values = self.inputs.get(name)?;
            Some(values[index * size..(index + 1) * size].to_vec())
        };
        let mut state = State::zero(dhqk, dhhv);
        state.c = part(names[0], dhqk * dhhv).unwrap_or(state.c);
        state.n = part(names[1], dhqk).unwrap_or(state.n);
        state.m = part(names[2], 1).map_or(0.0, |m| m[0]);
        state
    }

    fn put_state(&mut self, names: [&'static str; 3], row: usize, h: usize, state: &State) {
        let index = row * self.setup.case.nh as usize + h;
        for (name, values) in names.into_iter().zip([&state.c, &state.n, &vec![state.m]]) {
            if let Some(out) = self.outputs.get_mut(name) {
                for (slot, x) in out.iter_mut().skip(index * values.len()).zip(values) {
                    *slot = Some(*x);
                }
            }
        }
    }

    fn sequence(&self, span: Span, initial: State) -> Sequence {
        let (dhqk, dhhv) = self.dims();
        Sequence {
            dhqk,
            dhhv,
            q: self.tokens("q", span, dhqk),
            k: self.tokens("k", span, dhqk),
            v: self.tokens("v", span, dhhv),
            i: self.tokens("i", span, 1),
            f: self.tokens("f", span, 1),
            initial,
        }
    }

    /// Which way the formulas' comparisons go.
    fn note_branches(&mut self, cell: &Cell, sequence: &Sequence, out: &Forward) {
        if cell.gate == Gate::Exponential {
            let before = [sequence.initial.m].into_iter().chain(out.m.iter().copied());
            for ((m, i), (before, n)) in out.m.iter().zip(&sequence.i).zip(before.zip(&out.n)) {
                self.branches.push(m == i && *i != before);
                self.branches.push(n.abs() > (-m).exp());
            }
        } else {
            self.branches.extend(out.n.iter().map(|n| n.abs() > 1.0));
        }
    }

    fn sequences(&mut self, backward: bool) {
        let case = &self.setup.case;
        let (dhqk, dhhv) = self.dims();
        let mut spans = vec![];
        if case.lengths.is_empty() {
            spans.extend((0..case.b as usize).map(|b| (b, b, 0, case.s as usize)));
        } else {
            let mut from = 0;
            for (row, &length) in case.lengths.iter().enumerate() {
                spans.push((row, 0, from, from + length as usize));
                from += length as usize;
            }
        }
        let cell = self.cell();
        for (row, b, from, to) in spans {
            for h in 0..self.setup.case.nh as usize {
                let span = Span { b, h, from, to };
                let initial = self.state(["c_initial", "n_initial", "m_initial"], row, h);
                let sequence = self.sequence(span, initial);
                let out = self.forward(&cell, &sequence);
                self.note_branches(&cell, &sequence, &out);
                if !backward {
                    self.put_tokens("h", span, dhhv, &out.h);
                    self.put_tokens("n", span, 1, &out.n);
                    self.put_tokens("m", span, 1, &out.m);
                    self.put_state(["c_last", "n_last", "m_last"], row, h, &out.last);
                    continue;
                }
                let d_last = self.state(["dc_last", "dn_last", "dm_last"], row, h);
                let incoming = Incoming {
                    dh: self.tokens("dh", span, dhhv),
                    dc_last: d_last.c,
                    dn_last: d_last.n,
                    dm_last: self.inputs.contains_key("dm_last").then_some(d_last.m),
                };
                let grad = self.gradient(&cell, &sequence, (&incoming, &out), span);
                let at_end = magnitude(&incoming.dc_last, &out.last.c)
                    + magnitude(&incoming.dn_last, &out.last.n);
                self.summands =
                    self.summands.max(at_end).max(incoming.dm_last.unwrap_or(0.0).abs());
                self.note_summands(&sequence, &grad);
                self.put_tokens("dq", span, dhqk, &grad.dq);
                self.put_tokens("dk", span, dhqk, &grad.dk);
                self.put_tokens("dv", span, dhhv, &grad.dv);
                self.put_tokens("di", span, 1, &grad.di);
                self.put_tokens("df", span, 1, &grad.df);
                self.put_state(["dc_initial", "dn_initial", "dm_initial"], row, h, &grad.initial);
            }
        }
    }

    /// What the gradients of the gates are sums of: q . dq and k . dk.
    fn note_summands(&mut self, sequence: &Sequence, grad: &Gradients) {
        let dots = |x: &[f64], dx: &[f64]| {
            let rows = x.chunks(sequence.dhqk).zip(dx.chunks(sequence.dhqk));
            rows.map(|(x, dx)| magnitude(x, dx)).fold(0.0, f64::max)
        };
        let largest = dots(&sequence.q, &grad.dq).max(dots(&sequence.k, &grad.dk));
        self.summands = self.summands.max(largest);
    }

    /// The forward; in a moved run, with a denominator of other roundings than the numerator's:
    /// where they cancel in the formulas, their errors do not.
    fn forward(&mut self, cell: &Cell, sequence: &Sequence) -> Forward {
        let mut out = reference::forward(cell, sequence);
        if self.roundings == 0.0 || !self.setup.normalized() {
            return out;
        }
        let roundoff = self.roundings * epsilon(self.setup.case.compute());
        let mut moved = sequence.clone();
        for x in moved.q.iter_mut().chain(&mut moved.k).chain(&mut moved.initial.n) {
            *x *= 1.0 + roundoff * self.noise.unit();
        }
        let other = reference::forward(cell, &moved);
        for (t, row) in out.h.chunks_mut(sequence.dhhv).enumerate() {
            let ratio =
                denominator(cell, out.n[t], out.m[t]) / denominator(cell, other.n[t], out.m[t]);
            row.iter_mut().filter(|_| ratio.is_finite()).for_each(|h| *h *= ratio);
        }
        out
    }

    /// The gradient with the denominator's part from the saved h, which is rounded to its dtype
    /// (and, in a moved run, a little more): h only matters there, as dh . h, and the gradient is
    /// linear in dh.
    fn gradient(
        &mut self,
        cell: &Cell,
        sequence: &Sequence,
        (incoming, out): (&Incoming, &Forward),
        span: Span,
    ) -> Gradients {
        if !self.setup.normalized() {
            return reference::backward(cell, sequence, incoming);
        }
        // The denominator is the saved one too, all of dh is divided by it.
        let mut incoming = incoming.clone();
        let saved = self.tokens("n", span, 1);
        for (t, row) in incoming.dh.chunks_mut(sequence.dhhv).enumerate() {
            let ratio =
                denominator(cell, out.n[t], out.m[t]) / denominator(cell, saved[t], out.m[t]);
            row.iter_mut().filter(|_| ratio.is_finite()).for_each(|dh| *dh *= ratio);
        }
        if cell.detach_denominator {
            return reference::backward(cell, sequence, &incoming);
        }
        let mut roundoff = self.roundings * epsilon(self.setup.case.compute());
        if roundoff != 0.0 {
            roundoff = roundoff.max(epsilon(self.setup.case.dtype));
        }
        let mut moved = incoming.clone();
        let saved = self.tokens("h", span, sequence.dhhv);
        for (dh, (saved, h)) in moved.dh.iter_mut().zip(saved.iter().zip(&out.h)) {
            let ratio = if *h == 0.0 || !saved.is_finite() { 1.0 } else { saved / h };
            *dh *= ratio * (1.0 + roundoff * self.noise.unit());
        }
        let detached = Cell { detach_denominator: true, ..*cell };
        let plus = reference::backward(cell, sequence, &moved);
        let minus = reference::backward(&detached, sequence, &moved);
        let rest = reference::backward(&detached, sequence, &incoming);
        // The parts may be far larger than their sum.
        self.note_summands(sequence, &rest);
        let sum = |plus: &[f64], minus: &[f64], rest: &[f64]| {
            plus.iter().zip(minus).zip(rest).map(|((p, m), r)| p - m + r).collect()
        };
        Gradients {
            dq: sum(&plus.dq, &minus.dq, &rest.dq),
            dk: sum(&plus.dk, &minus.dk, &rest.dk),
            dv: sum(&plus.dv, &minus.dv, &rest.dv),
            di: sum(&plus.di, &minus.di, &rest.di),
            df: sum(&plus.df, &minus.df, &rest.df),
            initial: State {
                c: sum(&plus.initial.c, &minus.initial.c, &rest.initial.c),
                n: sum(&plus.initial.n, &minus.initial.n, &rest.initial.n),
                m: plus.initial.m - minus.initial.m + rest.initial.m,
            },
        }
    }

    fn step(&mut self) {
        let cell = self.cell();
        let (dhqk, dhhv) = self.dims();
        let at = |run: &Self, name: &str, row: usize| run.inputs.get(name).map(|x| x[row]);
        let target = match self.outputs.contains_key("c_dst") {
            true => ["c_dst", "n_dst", "m_dst"],
            false => ["c", "n", "m"],
        };
        for row in 0..self.setup.case.b as usize {
            let src = at(self, "src_slots", row).unwrap_or(row as f64);
            let dst = at(self, "dst_slots", row).unwrap_or(src);
            let count = at(self, "num_tokens", row).unwrap_or(self.setup.case.s as f64);
            if src < 0.0 {
                continue;
            }
            for h in 0..self.setup.case.nh as usize {
                let initial = match at(self, "has_state", row) {
                    Some(0.0) => State::zero(dhqk, dhhv),
                    _ => self.state(["c", "n", "m"], src as usize, h),
                };
                let span = Span { b: row, h, from: 0, to: count as usize };
                let sequence = self.sequence(span, initial);
                let out = self.forward(&cell, &sequence);
                self.put_tokens("h", span, dhhv, &out.h);
                if dst >= 0.0 {
                    self.put_state(target, dst as usize, h, &out.last);
                }
            }
        }
    }
}

fn magnitude(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| (x * y).abs()).sum()
}

/// Whether a result may stand for what is expected.
pub fn close(got: f64, want: f64, tolerance: f64, dtype: mlstm_dtype) -> bool {
    // Beyond the dtype's range any large number will do.
    let largest = match dtype {
        MLSTM_F16 => 6e4,
        MLSTM_F64 => 1e300,
        _ => 3e38,
    };
    if want.abs() > largest {
        return got.is_infinite() || got.abs() > largest * 0.9;
    }
    (got - want).abs() <= tolerance
}

pub fn core_dtype(dtype: mlstm_dtype) -> DType {
    match dtype {
        MLSTM_F64 => DType::F64,
        MLSTM_BF16 => DType::Bf16,
        MLSTM_F16 => DType::F16,
        _ => DType::F32,
    }
}
