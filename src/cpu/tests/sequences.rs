//! Forward and backward of `chunkwise` and `parallel` against the oracle.

use super::harness::{Buffer, Error, Poisoned, Random, magnitudes};
use crate::cpu::level::Level;
use crate::cpu::reference::{self, Cell, Forward, Incoming, Sequence, State};
use crate::cpu::{backward_at, forward_at, workspace_size};
use crate::dispatch::{self, Capabilities};
use crate::ops::{Bw, BwTensors, Fw, FwTensors};
use crate::problem::{Gate, Op, Problem, ProblemSpec};
use crate::tensor::DType;

/// Distribution of the gates.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Gates {
    /// i around `bias`, f around 3.
    Usual { bias: f64 },
    /// Resets, ignored tokens, closed and wide open gates.
    Extreme,
}

/// One problem and how to lay it out.
#[derive(Clone, Debug)]
struct Case {
    spec: ProblemSpec,
    offsets: Option<Vec<i64>>,
    /// (B, S, NH, D) in memory, with gaps between rows.
    interleaved: bool,
    /// Initial states in and gradients of last ones out; a literal dm_last.
    states: bool,
    dm_last: bool,
    parallel: bool,
    gates: Gates,
    m_initial: f64,
}

impl Case {
    fn new(shape: [i64; 5], dtype: DType) -> Self {
        let [b, nh, s, dhqk, dhhv] = shape;
        let spec = ProblemSpec { b, nh, s, dhqk, dhhv, dtype, ..ProblemSpec::default() };
        Self {
            spec,
            offsets: None,
            interleaved: false,
            states: false,
            dm_last: false,
            parallel: false,
            gates: Gates::Usual { bias: -1.0 },
            m_initial: 0.3,
        }
    }

    fn packed(mut self, offsets: &[i64]) -> Self {
        self.spec.num_seqs = offsets.len() as i64 - 1;
        self.offsets = Some(offsets.to_vec());
        self
    }
}

/// All tensors of a case.
struct Data {
    problem: Problem,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    i: Buffer,
    f: Buffer,
    c0: Buffer,
    n0: Buffer,
    m0: Buffer,
    dh: Buffer,
    dc: Buffer,
    dn: Buffer,
    dm: Buffer,
    offsets: Option<Buffer>,
}

fn data(case: &Case, random: &Random) -> Data {
    let op = if case.parallel { Op::ParallelFw } else { Op::ChunkwiseFw };
    let problem = case.spec.validate(op).unwrap();
    let p = &problem;
    let (order, gap): (&[usize], i64) =
        if case.interleaved { (&[0, 2, 1, 3], 3) } else { (&[0, 1, 2, 3], 0) };
    let tokens = |cols: i64, scale: f64| {
        Buffer::poisoned(&[p.b, p.nh, p.s, cols], order, gap, p.dtype)
            .fill(|| random.normal() * scale)
    };
    let gate_order = if case.interleaved { [0, 2, 1] } else { [0, 1, 2] };
    let gate_tensor = |mean: f64, spread: f64, extremes: &[f64]| {
        Buffer::poisoned(&[p.b, p.nh, p.s], &gate_order, 0, p.gate_dtype).fill(|| {
            if case.gates == Gates::Extreme && random.below(3) == 0 {
                random.pick(extremes)
            } else {
                mean + spread * random.normal()
            }
        })
    };
    let bias = if let Gates::Usual { bias } = case.gates { bias } else { 0.0 };
    let inf = f64::INFINITY;
    let i = gate_tensor(bias, 1.0, &[-inf, 15.0, -1000.0, -30.0]);
    let f = gate_tensor(3.0, 1.0, &[-inf, inf, -1000.0, 1000.0, -200.0, -20.0]);
    let rows = p.state_rows();
    let compute = p.compute_dtype();
    let normal = || random.normal();
    let state = |last: &[i64], dtype| {
        let mut shape = vec![rows, p.nh];
        shape.extend(last);
        Buffer::dense(&shape, dtype)
    };
    Data {
        problem,
        q: tokens(p.dhqk, 1.0),
        k: tokens(p.dhqk, 1.0),
        v: tokens(p.dhhv, 1.0),
        i,
        f,
        c0: state(&[p.dhqk, p.dhhv], p.state_dtype).fill(normal),
        n0: state(&[p.dhqk], compute).fill(normal),
        m0: state(&[], compute).fill(|| case.m_initial),
        dh: tokens(p.dhhv, 1.0),
        dc: state(&[p.dhqk, p.dhhv], p.state_dtype).fill(normal),
        dn: state(&[p.dhqk], compute).fill(normal),
        dm: state(&[], compute).fill(normal),
        offsets: case.offsets.as_ref().map(|offsets| {
            let mut next = offsets.iter();
            Buffer::dense(&[offsets.len() as i64], random.pick(&[DType::I32, DType::I64]))
                .fill(|| *next.next().unwrap() as f64)
        }),
    }
}

/// Outputs of both directions.
#[derive(Clone)]
struct Results {
    h: Buffer,
    n: Buffer,
    m: Buffer,
    last: [Buffer; 3],
    gradients: [Buffer; 5],
    initial: [Buffer; 3],
}

fn poisoned_like(buffer: &Buffer, random: &Random) -> Buffer {
    let dtype = buffer.view().dtype;
    let rank = buffer.shape.len();
    let gap = random.below(3) as i64;
    let mut order: Vec<usize> = (0..rank).collect();
    if rank >= 3 && random.below(2) == 0 {
        order.swap(1, 2.min(rank - 2));
    }
    Buffer::poisoned(&buffer.shape, &order, gap, dtype)
}

fn run(case: &Case, d: &Data, level: Level, threads: usize, random: &Random) -> Results {
    let p = d.problem;
    let compute = p.compute_dtype();
    let per_token = || Buffer::dense(&[p.b, p.nh, p.s], compute);
    let mut r = Results {
        h: poisoned_like(&d.dh, random),
        n: per_token(),
        m: per_token(),
        last: [&d.c0, &d.n0, &d.m0].map(|b| poisoned_like(b, random)),
        gradients: [&d.q, &d.k, &d.v, &d.i, &d.f].map(|b| poisoned_like(b, random)),
        initial: [&d.c0, &d.n0, &d.m0].map(|b| poisoned_like(b, random)),
    };
    let m = p.gate.has_stabilizer();
    let states = case.states;
    let given = |there: bool, buffer: &Buffer| there.then(|| buffer.view());
    let tensors = FwTensors {
        q: d.q.view(),
        k: d.k.view(),
        v: d.v.view(),
        i: d.i.view(),
        f: d.f.view(),
        c_initial: given(states, &d.c0),
        n_initial: given(states, &d.n0),
        m_initial: given(states && m, &d.m0),
        cu_seqlens: d.offsets.as_ref().map(Buffer::view),
        h: r.h.view(),
        n: Some(r.n.view()),
        m: given(m, &r.m),
        c_last: Some(r.last[0].view()),
        n_last: Some(r.last[1].view()),
        m_last: given(m, &r.last[2]),
    };
    let op = if case.parallel { Op::ParallelFw } else { Op::ChunkwiseFw };
    let plan = dispatch::plan(op, &p, Capabilities { has_cuda: false, hopper: false }).unwrap();
    let bytes = workspace_size(&p, &plan).unwrap();
    let mut memory = Poisoned::new(bytes);
    let workspace = memory.workspace(bytes);
    let fw = Fw::new(p, tensors, &workspace.view(bytes)).unwrap();
    forward_at(&fw, &plan, workspace, level, threads).unwrap();

    let tensors = BwTensors {
        q: d.q.view(),
        k: d.k.view(),
        v: d.v.view(),
        i: d.i.view(),
        f: d.f.view(),
        c_initial: given(states, &d.c0),
        n_initial: given(states, &d.n0),
        m_initial: given(states && m, &d.m0),
        cu_seqlens: d.offsets.as_ref().map(Buffer::view),
        h: Some(r.h.view()),
        n: Some(r.n.view()),
        m: given(m, &r.m),
        dh: d.dh.view(),
        dc_last: given(states, &d.dc),
        dn_last: given(states, &d.dn),
        dm_last: given(case.dm_last && m, &d.dm),
        dq: r.gradients[0].view(),
        dk: r.gradients[1].view(),
        dv: r.gradients[2].view(),
        di: r.gradients[3].view(),
        df: r.gradients[4].view(),
        dc_initial: given(states, &r.initial[0]),
        dn_initial: given(states, &r.initial[1]),
        dm_initial: given(states && m, &r.initial[2]),
    };
    let op = if case.parallel { Op::ParallelBw } else { Op::ChunkwiseBw };
    let plan = dispatch::plan(op, &p, Capabilities { has_cuda: false, hopper: false }).unwrap();
    let bytes = workspace_size(&p, &plan).unwrap();
    let mut memory = Poisoned::new(bytes);
    let workspace = memory.workspace(bytes);
    let bw = Bw::new(p, tensors, &workspace.view(bytes)).unwrap();
    backward_at(&bw, &plan, workspace, level, threads).unwrap();
    if !m {
        // Not written; equal in every run.
        r.m = per_token();
        r.last[2] = d.m0.clone();
        r.initial[2] = d.m0.clone();
    }
    r
}

/// Distance of 1 and the next number of the type that a dtype is computed in.
fn unit(dtype: DType) -> f64 {
    if dtype == DType::F64 { f64::EPSILON } else { f32::EPSILON.into() }
}

/// Relative errors of one run.
#[derive(Clone, Copy, Default)]
struct Errors {
    h: Error,
    n: Error,
    m: Error,
    last: [Error; 3],
    gradients: [Error; 5],
    initial: [Error; 3],
    /// Rounding errors of one token's N, relative to its denominator, in units of the type's.
    condition: f64,
}

impl Errors {
    /// Where the terms of N cancel, its rounding errors are large beside the denominator; h and the
    /// gradients cannot be better than that, whoever computes them.
    fn note_condition(&mut self, cell: &Cell, sequence: &Sequence, forward: &Forward) {
        if !cell.gate.has_normalizer() {
            return;
        }
        let sums = reference::forward(cell, &magnitudes(sequence)).n;
        for ((sum, n), m) in sums.iter().zip(&forward.n).zip(&forward.m) {
            let den = n.abs().max((-m).exp());
            if den.is_finite() && den > 0.0 {
                self.condition = self.condition.max(sum / den);
            }
        }
    }
}

fn state_of(buffers: [&Buffer; 3], row: usize, head: usize, p: &Problem) -> State {
    State {
        c: buffers[0].rows(&[row, head, 0], 2, p.dhqk as usize),
        n: buffers[1].rows(&[row, head], 1, 1),
        m: if p.gate.has_stabilizer() { buffers[2].get(&[row, head]) } else { 0.0 },
    }
}

fn cell_of(p: &Problem) -> Cell {
    Cell {
        gate: p.gate,
        qk_scale: p.qk_scale,
        eps: p.eps,
        detach_denominator: p.detach_denominator,
    }
}

/// The batch row, first token and length of a row of states.
fn place_of(case: &Case, p: &Problem, row: usize) -> (usize, usize, usize) {
    match &case.offsets {
        Some(offsets) => (0, offsets[row] as usize, (offsets[row + 1] - offsets[row]) as usize),
        None => (row, 0, p.s as usize),
    }
}

fn sequence_of(case: &Case, d: &Data, row: usize, head: usize) -> Sequence {
    let p = &d.problem;
    let (batch, start, len) = place_of(case, p, row);
    let at = [batch, head, start];
    let tokens = |b: &Buffer| (0..len).map(|t| b.get(&[batch, head, start + t])).collect();
    let (dhqk, dhhv) = (p.dhqk as usize, p.dhhv as usize);
    Sequence {
        dhqk,
        dhhv,
        q: d.q.rows(&at, 2, len),
        k: d.k.rows(&at, 2, len),
        v: d.v.rows(&at, 2, len),
        i: tokens(&d.i),
        f: tokens(&d.f),
        initial: if case.states {
            state_of([&d.c0, &d.n0, &d.m0], row, head, p)
        } else {
            State::zero(dhqk, dhhv)
        },
    }
}

/// Whether a token's |N| is within rounding of its floor, where the gradient jumps.
fn is_on_kink(case: &Case, d: &Data) -> bool {
    let p = &d.problem;
    let cell = cell_of(p);
    let heads =
        (0..p.state_rows() as usize).flat_map(|row| (0..p.nh as usize).map(move |h| (row, h)));
    cell.gate.has_normalizer()
        && heads.into_iter().any(|(row, head)| {
            let sequence = sequence_of(case, d, row, head);
            let [own, sums] =
                [&sequence, &magnitudes(&sequence)].map(|it| reference::forward(&cell, it));
            own.n.iter().zip(&own.m).zip(&sums.n).any(|((n, m), sum)| {
                let floor = (-m).exp();
                (n.abs() - floor).abs() < 8.0 * unit(p.dtype) * (sum + floor)
            })
        })
}

/// Inputs at which rounding does not choose the gradient.
fn drawn(case: &Case, random: &Random) -> Data {
    let draws = std::iter::repeat_with(|| data(case, random)).take(20);
    draws.into_iter().find(|d| !is_on_kink(case, d)).expect("inputs off the kinks")
}

fn compare(case: &Case, d: &Data, r: &Results) -> Errors {
    let p = &d.problem;
    let cell = cell_of(p);
    let (dhqk, dhhv) = (p.dhqk as usize, p.dhhv as usize);
    let m = p.gate.has_stabilizer();
    let mut errors = Errors::default();
    for row in 0..p.state_rows() as usize {
        let (batch, start, len) = place_of(case, p, row);
        for head in 0..p.nh as usize {
            let at = [batch, head, start];
            let tokens = |b: &Buffer| -> Vec<f64> {
                (0..len).map(|t| b.get(&[batch, head, start + t])).collect()
            };
            let sequence = sequence_of(case, d, row, head);
            let forward = reference::forward(&cell, &sequence);
            errors.note_condition(&cell, &sequence, &forward);
            errors.h.extend(&r.h.rows(&at, 2, len), &forward.h);
            errors.n.extend(&tokens(&r.n), &forward.n);
            let last = state_of([&r.last[0], &r.last[1], &r.last[2]], row, head, p);
            errors.last[0].extend(&last.c, &forward.last.c);
            errors.last[1].extend(&last.n, &forward.last.n);
            if m {
                errors.m.extend(&tokens(&r.m), &forward.m);
                errors.last[2].add(last.m, forward.last.m);
            }
            let incoming = if case.states {
                let state = state_of([&d.dc, &d.dn, &d.dm], row, head, p);
                (state.c, state.n)
            } else {
                (vec![0.0; dhqk * dhhv], vec![0.0; dhqk])
            };
            let incoming = Incoming {
                dh: d.dh.rows(&at, 2, len),
                dc_last: incoming.0,
                dn_last: incoming.1,
                dm_last: (case.dm_last && m).then(|| d.dm.get(&[row, head])),
            };
            let expected = reference::backward(&cell, &sequence, &incoming);
            let [dq, dk, dv, di, df] = &r.gradients;
            errors.gradients[0].extend(&dq.rows(&at, 2, len), &expected.dq);
            errors.gradients[1].extend(&dk.rows(&at, 2, len), &expected.dk);
            errors.gradients[2].extend(&dv.rows(&at, 2, len), &expected.dv);
            errors.gradients[3].extend(&tokens(di), &expected.di);
            errors.gradients[4].extend(&tokens(df), &expected.df);
            if case.states {
                let initial = state_of([&r.initial[0], &r.initial[1], &r.initial[2]], row, head, p);
                errors.initial[0].extend(&initial.c, &expected.initial.c);
                errors.initial[1].extend(&initial.n, &expected.initial.n);
                if m {
                    errors.initial[2].add(initial.m, expected.initial.m);
                }
            }
        }
    }
    errors
}

/// Upper bounds of the errors.
#[derive(Clone, Copy)]
struct Tolerance {
    h: f64,
    n: f64,
    states: f64,
    gradients: f64,
    gates: f64,
}

fn check(case: &Case, errors: &Errors, tolerance: Tolerance) {
    let t = tolerance;
    let [dq, dk, dv, di, df] = errors.gradients;
    // df and dm are differences of sums of q.dq and k.dk (which is di), of C and dC: where those
    // cancel, rounding shows relative to them. So it does for the tiny gradients under a large
    // denominator.
    let tiny = 1e-6;
    // With few tokens h hardly depends on q and k (for one token not at all, but for eps): what
    // the numerator and the denominator contribute to dq and dk cancels; to dq they contribute as much as
    // to h, whatever the gates make of k and v.
    let small = (dv.size() * 1e-2).max(tiny);
    let gates = di.size().max(small);
    let dots = (errors.initial[0].size() * errors.last[0].size()).max(gates) + 1.0;
    let unit = unit(case.spec.dtype);
    // Most draws have no token like that, and get no allowance: it would hide errors.
    let cancels = errors.condition > 500.0;
    let cancelled = if cancels { (4.0 * unit * errors.condition).min(0.05) } else { 0.0 };
    let named = [
        ("h", errors.h, t.h, tiny),
        ("n", errors.n, t.n, tiny),
        ("m", errors.m, t.n, tiny),
        ("c_last", errors.last[0], t.states, tiny),
        ("n_last", errors.last[1], t.n, tiny),
        ("m_last", errors.last[2], t.n, tiny),
        ("dq", dq, t.gradients, small.max(errors.h.size() * 1e-3)),
        ("dk", dk, t.gradients, small),
        ("dv", dv, t.gradients, tiny),
        ("di", di, t.gates, small),
        ("df", df, t.gates, gates + dots * 1e-2),
        ("dc_initial", errors.initial[0], t.states.max(t.gradients), tiny),
        ("dn_initial", errors.initial[1], t.gradients.max(t.gates), small),
        ("dm_initial", errors.initial[2], t.gates, dots),
    ];
    let shown: Vec<String> =
        named.iter().map(|(name, e, _, s)| format!("{name} {:.1e}", e.relative(*s))).collect();
    for (name, error, bound, size) in named {
        let error = error.relative(size);
        // The states do not pass through the denominator.
        let bound = if name.ends_with("_last") { bound } else { bound.max(cancelled) };
        assert!(
            error <= bound,
            "{name}: {error:.2e} > {bound:.1e}\n{case:?}\n{}",
            shown.join(", ")
        );
    }
}

impl Tolerance {
    fn times(self, factor: f64) -> Self {
        Self {
            h: self.h * factor,
            n: self.n * factor,
            states: self.states * factor,
            gradients: self.gradients * factor,
            gates: self.gates * factor,
        }
    }
}

const F32: Tolerance = Tolerance { h: 1e-5, n: 1e-5, states: 1e-5, gradients: 1e-5, gates: 1e-5 };
const F64: Tolerance =
    Tolerance { h: 1e-11, n: 1e-11, states: 1e-11, gradients: 1e-11, gates: 1e-11 };

fn tolerance(dtype: DType) -> Tolerance {
    match dtype {
        DType::F64 => F64,
        _ => F32,
    }
}

/// Runs a case at every level, and on 1, 2 and 3 threads: all within tolerance, equal bits per
/// level.
fn verify(case: &Case, random: &Random, tolerance: Tolerance) {
    let d = drawn(case, random);
    for &level in Level::available() {
        // The same places for the outputs, so that bytes can be compared.
        let seed = random.bits();
        let again = || Random::seeded(seed);
        let one = run(case, &d, level, 1, &again());
        check(case, &compare(case, &d, &one), tolerance);
        for threads in [2, 3] {
            let other = run(case, &d, level, threads, &again());
            let pairs = |r: &Results| -> Vec<Buffer> {
                let mut all = vec![r.h.clone(), r.n.clone(), r.m.clone()];
                all.extend(r.last.clone());
                all.extend(r.gradients.clone());
                all.extend(r.initial.clone());
                all
            };
            for (a, b) in pairs(&one).iter().zip(&pairs(&other)) {
                assert!(a.bytes() == b.bytes(), "bits differ on {threads} threads: {case:?}");
            }
        }
    }
}

fn both_forms(case: &Case, random: &Random, tolerance: Tolerance) {
    for parallel in [false, true] {
        verify(&Case { parallel, ..case.clone() }, random, tolerance);
    }
}

#[test]
fn random_shapes_agree_with_the_recurrence() {
    let random = Random::new();
    for _ in 0..12 {
        let dtype = random.pick(&[DType::F32, DType::F32, DType::F64]);
        let dims = [1, 2, 7, 16, 24, 33, 64, 80, 100];
        let shape = [
            1 + random.below(2) as i64,
            1 + random.below(3) as i64,
            random.pick(&[1, 7, 8, 15, 17, 63, 64, 65, 127, 129, 200]),
            random.pick(&dims),
            random.pick(&dims),
        ];
        let mut case = Case::new(shape, dtype);
        case.spec.chunk_size = random.pick(&[0, 1, 3, 16, 50, 64, 65, 100, 128, 1000]);
        case.interleaved = random.below(2) == 0;
        case.states = random.below(2) == 0;
        let bias = random.pick(&[-10.0, -4.0, 0.0]);
        case.gates = Gates::Usual { bias };
        case.spec.gate_dtype = random.pick(&[None, Some(DType::F32)]);
        let mut tolerance = tolerance(dtype);
        if dtype == DType::F64 && case.spec.gate_dtype.is_some() {
            // di and df come out in float32.
            tolerance.gates = 1e-7;
        }
        if bias == 0.0 || case.spec.s < 8 {
            // A token whose N is nearly zero, its terms cancelling, has a large h and larger
            // gradients, and dominates the norms with the rounding of those terms.
            tolerance = tolerance.times(100.0);
        }
        both_forms(&case, &random, tolerance);
    }
}

#[test]
fn gates_at_their_extremes_stay_finite_and_right() {
    let random = Random::new();
    for _ in 0..6 {
        let dtype = random.pick(&[DType::F32, DType::F64]);
        let shape = [1, 2, random.pick(&[5, 64, 130, 200]), 24, 33];
        let mut case = Case::new(shape, dtype);
        case.gates = Gates::Extreme;
        case.spec.chunk_size = random.pick(&[0, 16, 100]);
        case.states = random.below(3) > 0;
        case.dm_last = random.below(2) == 0;
        case.m_initial = random.pick(&[0.0, -30.0, -1e30, f64::NEG_INFINITY]);
        both_forms(&case, &random, tolerance(dtype).times(100.0));
    }
}

#[test]
fn a_huge_input_gate_and_a_row_of_ignored_tokens_are_right() {
    let random = Random::new();
    for gate in [80.0, f64::NEG_INFINITY] {
        let mut case = Case::new([1, 1, 70, 16, 16], DType::F32);
        case.m_initial = f64::NEG_INFINITY;
        case.states = true;
        let mut d = drawn(&case, &random);
        for t in 0..70 {
            if t % 40 == 5 || gate < 0.0 {
                d.i.set(&[0, 0, t], gate);
            }
        }
        for &level in Level::available() {
            let r = run(&case, &d, level, 1, &random);
            // After a huge gate h depends on that one token's v only: dq and dk cancel, from terms
            // of the size 1 / N.
            let tolerance = Tolerance { gradients: 1e-2, gates: 1e-3, ..F32.times(10.0) };
            check(&case, &compare(&case, &d, &r), tolerance);
            if gate < 0.0 {
                assert!(r.h.rows(&[0, 0, 0], 2, 70).iter().all(|&h| h == 0.0));
            }
        }
    }
}

#[test]
fn packed_sequences_agree_with_one_by_one() {
    let random = Random::new();
    let cases: [&[i64]; 5] = [
        &[0, 15, 100, 300, 1200, 2000],
        &[0, 0, 1, 1, 66, 66],
        &[0, 64, 128],
        &[0, 0, 0],
        &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 74, 75],
    ];
    for (index, offsets) in cases.into_iter().enumerate() {
        let s = *offsets.last().unwrap();
        let dims = if index == 0 { (100, 24) } else { (24, 33) };
        let mut case = Case::new([1, 2, s, dims.0, dims.1], random.pick(&[DType::F32, DType::F64]));
        case = case.packed(offsets);
        case.states = random.below(4) > 0;
        case.dm_last = random.below(2) == 0;
        case.interleaved = random.below(2) == 0;
        case.spec.chunk_size = random.pick(&[0, 16, 40]);
        let tolerance = tolerance(case.spec.dtype);
        both_forms(&case, &random, tolerance);
    }
}

#[test]
fn long_rows_use_groups_and_checkpoints() {
    let random = Random::new();
    let mut case = Case::new([2, 3, 1025, 16, 24], DType::F32);
    case.spec.chunk_size = 16;
    for states in [false, true] {
        case.states = states;
        verify(&case, &random, F32);
    }
    // More lanes than fit into one wave.
    let mut case = Case::new([5, 17, 40, 8, 8], DType::F64);
    case.spec.chunk_size = 16;
    case.states = true;
    verify(&case, &random, F64);
}

#[test]
fn nothing_to_do_passes_the_states_on() {
    let random = Random::new();
    for shape in [[2, 2, 0, 8, 5], [0, 2, 7, 8, 5], [2, 0, 7, 8, 5]] {
        for dm_last in [false, true] {
            let mut case = Case::new(shape, DType::F32);
            case.states = true;
            case.dm_last = dm_last;
            both_forms(&case, &random, F32);
        }
    }
}

#[test]
fn every_cell_has_its_exact_gradient() {
    let random = Random::new();
    for gate in
        [Gate::Exponential, Gate::Sigmoid { normalize: true }, Gate::Sigmoid { normalize: false }]
    {
        for detach in [false, true] {
            for dm_last in [false, true] {
                let dtype = random.pick(&[DType::F32, DType::F64]);
                let mut case = Case::new([2, 2, 130, 24, 40], dtype);
                case.spec.gate = gate;
                case.spec.detach_denominator = detach;
                // A large eps shows a wrong derivative by way of it.
                case.spec.eps = Some(random.pick(&[0.0, 1e-6, 0.1]));
                case.spec.qk_scale = random.pick(&[0.0, 0.7]);
                case.dm_last = dm_last;
                case.states = true;
                if !gate.has_normalizer() && detach {
                    continue;
                }
                both_forms(&case, &random, tolerance(dtype).times(10.0));
            }
        }
    }
}

#[test]
fn sixteen_bit_data_costs_its_own_rounding_only() {
    let random = Random::new();
    for dtype in [DType::Bf16, DType::F16] {
        for bias in [-1.0, -10.0] {
            for gate_dtype in [None, Some(DType::F32)] {
                let mut case = Case::new([1, 2, 300, 64, 80], dtype);
                case.spec.gate_dtype = gate_dtype;
                case.spec.state_dtype = Some(random.pick(&[DType::F32, dtype]));
                case.gates = Gates::Usual { bias };
                case.interleaved = random.below(2) == 0;
                case.states = random.below(2) == 0;
                // Rounding to bf16 alone makes a relative error of 1.7e-3. The gradients also see
                // h as it was stored, by way of dh.h, which may cancel for any one token; it
                // weighs most in dn, and in the gates' dot products.
                let (unit, gates) = match dtype {
                    DType::Bf16 => (2.4e-3, 2e-2),
                    _ => (3.2e-4, 2.5e-3),
                };
                let tolerance =
                    Tolerance { h: unit, n: 1e-5, states: unit, gradients: 2.0 * unit, gates };
                both_forms(&case, &random, tolerance);
            }
        }
    }
}

#[test]
fn zero_stride_gates_and_shared_gradients_are_read_right() {
    let random = Random::new();
    let mut case = Case::new([2, 3, 70, 16, 24], DType::F32);
    case.states = true;
    let mut d = drawn(&case, &random);
    for buffer in [&mut d.i, &mut d.f] {
        buffer.expand(1);
        buffer.expand(0);
    }
    d.dh.expand(2);
    let r = run(&case, &d, Level::current(), 2, &random);
    check(&case, &compare(&case, &d, &r), F32);
}

#[test]
fn bad_offsets_are_refused_before_anything_is_written() {
    let random = Random::new();
    for (offsets, named) in [
        ([1, 5, 9], "cu_seqlens[0]"),
        ([0, 6, 5], "cu_seqlens[2]"),
        ([0, 5, 8], "cu_seqlens[2]"),
        ([0, 10, 9], "cu_seqlens[1]"),
    ] {
        let case = Case::new([1, 1, 9, 4, 4], DType::F32).packed(&offsets);
        let d = data(&case, &random);
        let error = match std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            run(&case, &d, Level::Scalar, 1, &random)
        })) {
            Ok(_) => panic!("{offsets:?} went through"),
            Err(error) => *error.downcast::<String>().unwrap(),
        };
        assert!(error.contains(named), "{error}");
    }
}
