//! The step against the oracle, on pools with gaps, padding rows and dirty slots.

use super::harness::{Buffer, Error, Poisoned, Random, terms_of_h};
use crate::cpu::level::Level;
use crate::cpu::reference::{self, Cell, Sequence, State};
use crate::cpu::{step_at, workspace_size};
use crate::dispatch::{self, Capabilities};
use crate::ops::{Step, StepTensors};
use crate::problem::{Gate, Op, Problem, ProblemSpec};
use crate::tensor::DType;

/// Index tensors by row; `None` is absent.
#[derive(Clone, Debug, Default)]
struct Rows {
    src: Option<Vec<i64>>,
    dst: Option<Vec<i64>>,
    has_state: Option<Vec<i64>>,
    tokens: Option<Vec<i64>>,
    /// Separate destination pools.
    apart: bool,
}

impl Rows {
    fn at(list: &Option<Vec<i64>>, row: usize, default: i64) -> i64 {
        list.as_ref().map_or(default, |list| list[row])
    }

    /// (slot read, slot written, tokens), `None` for padding; -1 for none.
    fn row(&self, row: usize, s: i64) -> Option<(i64, i64, usize)> {
        let src = Self::at(&self.src, row, row as i64);
        let dst = Self::at(&self.dst, row, src);
        let tokens = Self::at(&self.tokens, row, s) as usize;
        let read = if Self::at(&self.has_state, row, 1) != 0 { src } else { -1 };
        (src >= 0).then_some((read, dst, tokens))
    }
}

struct Pools {
    c: Buffer,
    n: Buffer,
    m: Buffer,
}

impl Pools {
    fn poisoned(p: &Problem) -> Self {
        let compute = p.compute_dtype();
        let slots = p.num_slots;
        Self {
            c: Buffer::poisoned(&[slots, p.nh, p.dhqk, p.dhhv], &[0, 1, 2, 3], 5, p.state_dtype),
            n: Buffer::dense(&[slots, p.nh, p.dhqk], compute),
            m: Buffer::dense(&[slots, p.nh], compute),
        }
    }

    fn state(&self, slot: usize, head: usize, p: &Problem) -> State {
        State {
            c: self.c.rows(&[slot, head, 0], 2, p.dhqk as usize),
            n: self.n.rows(&[slot, head], 1, 1),
            m: if p.gate.has_stabilizer() { self.m.get(&[slot, head]) } else { 0.0 },
        }
    }
}

struct Run {
    pools: Pools,
    h: Buffer,
}

struct Inputs {
    problem: Problem,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    i: Buffer,
    f: Buffer,
    /// States by slot; slots that no row reads stay poisoned.
    pools: Pools,
}

fn inputs(spec: &ProblemSpec, rows: &Rows, extreme: bool, random: &Random) -> Inputs {
    let problem = spec.validate(Op::Step).unwrap();
    let p = &problem;
    let tokens = |cols: i64| {
        let order = random.pick(&[[0, 1, 2, 3], [0, 2, 1, 3]]);
        Buffer::poisoned(&[p.b, p.nh, p.s, cols], &order, 1, p.dtype).fill(|| random.normal())
    };
    let gate = |mean: f64, special: &[f64]| {
        Buffer::dense(&[p.b, p.nh, p.s], p.gate_dtype).fill(|| {
            if extreme && random.below(2) == 0 {
                random.pick(special)
            } else {
                mean + random.normal()
            }
        })
    };
    let inf = f64::INFINITY;
    let mut pools = Pools::poisoned(p);
    for row in 0..p.b as usize {
        let Some((read @ 0.., _, _)) = rows.row(row, p.s) else { continue };
        for head in 0..p.nh as usize {
            for x in 0..p.dhqk as usize {
                for y in 0..p.dhhv as usize {
                    pools.c.set(&[read as usize, head, x, y], random.normal());
                }
                pools.n.set(&[read as usize, head, x], random.normal());
            }
            let m = if extreme { random.pick(&[-inf, -1e30, 0.0, 3.0]) } else { 0.2 };
            pools.m.set(&[read as usize, head], m);
        }
    }
    Inputs {
        problem,
        q: tokens(p.dhqk),
        k: tokens(p.dhqk),
        v: tokens(p.dhhv),
        i: gate(-1.0, &[-inf, 80.0, -1000.0]),
        f: gate(3.0, &[-inf, inf, -1000.0, 1000.0]),
        pools,
    }
}

fn run(
    d: &Inputs,
    rows: &Rows,
    level: Level,
    threads: usize,
    index: DType,
) -> Result<Run, crate::Error> {
    let p = d.problem;
    let m = p.gate.has_stabilizer();
    let list = |list: &Option<Vec<i64>>, dtype: DType| {
        list.as_ref().map(|list| {
            let mut next = list.iter();
            Buffer::dense(&[p.b], dtype).fill(|| *next.next().unwrap() as f64)
        })
    };
    let flags = if index == DType::I32 { DType::U8 } else { DType::I32 };
    let lists = [list(&rows.src, index), list(&rows.dst, index), list(&rows.tokens, index)];
    let has_state = list(&rows.has_state, flags);
    let view = |buffer: &Option<Buffer>| buffer.as_ref().map(Buffer::view);
    let source = Pools { c: d.pools.c.clone(), n: d.pools.n.clone(), m: d.pools.m.clone() };
    let apart = rows.apart.then(|| Pools::poisoned(&p));
    let h = Buffer::poisoned(&[p.b, p.nh, p.s, p.dhhv], &[0, 2, 1, 3], 2, p.dtype);
    let tensors = StepTensors {
        q: d.q.view(),
        k: d.k.view(),
        v: d.v.view(),
        i: d.i.view(),
        f: d.f.view(),
        c: source.c.view(),
        n: source.n.view(),
        m: m.then(|| source.m.view()),
        c_dst: apart.as_ref().map(|pools| pools.c.view()),
        n_dst: apart.as_ref().map(|pools| pools.n.view()),
        m_dst: apart.as_ref().filter(|_| m).map(|pools| pools.m.view()),
        src_slots: view(&lists[0]),
        dst_slots: view(&lists[1]),
        has_state: view(&has_state),
        num_tokens: view(&lists[2]),
        h: h.view(),
    };
    let plan =
        dispatch::plan(Op::Step, &p, Capabilities { has_cuda: false, hopper: false }).unwrap();
    let bytes = workspace_size(&p, &plan).unwrap();
    let mut memory = Poisoned::new(bytes);
    let workspace = memory.workspace(bytes);
    let step = Step::new(p, tensors, &workspace.view(bytes)).unwrap();
    step_at(&step, workspace, level, threads)?;
    Ok(Run { pools: apart.unwrap_or(source), h })
}

/// Checks outputs, new states, and that everything else is untouched.
fn check(d: &Inputs, rows: &Rows, r: &Run, bound: f64) {
    let p = &d.problem;
    let cell = Cell {
        gate: p.gate,
        qk_scale: p.qk_scale,
        eps: p.eps,
        detach_denominator: p.detach_denominator,
    };
    // Half a unit in the last place: a tensor may be a single number.
    let rounding = |dtype| match dtype {
        DType::Bf16 => 4e-3,
        DType::F16 => 5e-4,
        _ => bound,
    };
    let before = if rows.apart {
        Pools::poisoned(p)
    } else {
        Pools { c: d.pools.c.clone(), n: d.pools.n.clone(), m: d.pools.m.clone() }
    };
    let mut expected_h = Buffer::poisoned(&[p.b, p.nh, p.s, p.dhhv], &[0, 2, 1, 3], 2, p.dtype);
    let mut written = vec![false; p.num_slots as usize];
    let (mut h, mut c, mut n, mut m) =
        (Error::default(), Error::default(), Error::default(), Error::default());
    let mut terms = Error::default();
    for row in 0..p.b as usize {
        let Some((read, dst, tokens)) = rows.row(row, p.s) else { continue };
        for head in 0..p.nh as usize {
            let (dhqk, dhhv) = (p.dhqk as usize, p.dhhv as usize);
            let initial = if read >= 0 {
                d.pools.state(read as usize, head, p)
            } else {
                State::zero(dhqk, dhhv)
            };
            let at = [row, head, 0];
            let list = |b: &Buffer| (0..tokens).map(|t| b.get(&[row, head, t])).collect();
            let sequence = Sequence {
                dhqk,
                dhhv,
                q: d.q.rows(&at, 2, tokens),
                k: d.k.rows(&at, 2, tokens),
                v: d.v.rows(&at, 2, tokens),
                i: list(&d.i),
                f: list(&d.f),
                initial,
            };
            let expected = reference::forward(&cell, &sequence);
            h.extend(&r.h.rows(&at, 2, tokens), &expected.h);
            terms.expect(&terms_of_h(&cell, &sequence, &expected));
            for token in 0..tokens {
                for col in 0..dhhv {
                    let index = [row, head, token, col];
                    expected_h.set(&index, r.h.get(&index));
                }
            }
            if dst >= 0 {
                written[dst as usize] = true;
                let got = r.pools.state(dst as usize, head, p);
                c.extend(&got.c, &expected.last.c);
                n.extend(&got.n, &expected.last.n);
                m.add(got.m, expected.last.m);
            }
        }
    }
    const TINY: f64 = 1e-6;
    for (name, error, bound, size) in [
        ("h", h, rounding(p.dtype), TINY.max(terms.size() / 8.0)),
        ("c", c, rounding(p.state_dtype), TINY),
        ("n", n, bound, TINY),
        ("m", m, bound, TINY),
    ] {
        let error = error.relative(size);
        assert!(error <= bound, "{name}: {error:.2e} > {bound:.1e} {p:?} {rows:?}");
    }
    assert!(r.h.bytes() == expected_h.bytes(), "h was written where no token is: {rows:?}");
    let same = |a: &Buffer, b: &Buffer, index: &[usize]| {
        let (a, b) = (a.get(index), b.get(index));
        a.to_bits() == b.to_bits()
    };
    for (slot, written) in written.iter().enumerate() {
        for head in (0..p.nh as usize).filter(|_| !written) {
            assert!(same(&r.pools.m, &before.m, &[slot, head]), "slot {slot}: m");
            for x in 0..p.dhqk as usize {
                assert!(same(&r.pools.n, &before.n, &[slot, head, x]), "slot {slot}: n");
                for y in 0..p.dhhv as usize {
                    assert!(same(&r.pools.c, &before.c, &[slot, head, x, y]), "slot {slot}: c");
                }
            }
        }
    }
}

fn verify(spec: &ProblemSpec, rows: &Rows, extreme: bool, random: &Random) {
    let d = inputs(spec, rows, extreme, random);
    let bound = if spec.dtype == DType::F64 { 1e-10 } else { 1e-4 };
    let index = random.pick(&[DType::I32, DType::I64]);
    for &level in Level::available() {
        let one = run(&d, rows, level, 1, index).unwrap();
        check(&d, rows, &one, bound);
        for threads in [2, 3] {
            let other = run(&d, rows, level, threads, index).unwrap();
            let equal = one.h.bytes() == other.h.bytes()
                && one.pools.c.bytes() == other.pools.c.bytes()
                && one.pools.n.bytes() == other.pools.n.bytes()
                && one.pools.m.bytes() == other.pools.m.bytes();
            assert!(equal, "bits differ on {threads} threads: {spec:?}");
        }
    }
}

fn spec(shape: [i64; 5], dtype: DType) -> ProblemSpec {
    let [b, nh, s, dhqk, dhhv] = shape;
    ProblemSpec { b, nh, s, dhqk, dhhv, dtype, ..ProblemSpec::default() }
}

#[test]
fn one_and_more_tokens_agree_with_the_recurrence() {
    let random = Random::new();
    for s in [1, 2, 5, 16] {
        for dims in [(1, 1), (7, 24), (64, 300), (33, 16)] {
            let dtype = random.pick(&[DType::F32, DType::F64, DType::Bf16, DType::F16]);
            let b = random.pick(&[1, 3]);
            let mut spec = spec([b, 2, s, dims.0, dims.1], dtype);
            if matches!(dtype, DType::Bf16 | DType::F16) {
                spec.gate_dtype = Some(DType::F32);
            }
            if dtype != DType::F64 {
                let choices = [DType::F32, DType::Bf16, DType::F16];
                spec.state_dtype = Some(random.pick(&choices));
            }
            if dtype == DType::F16 {
                spec.dtype = DType::Bf16;
            }
            let rows = Rows { apart: random.below(2) == 0, ..Rows::default() };
            verify(&spec, &rows, false, &random);
        }
    }
}

#[test]
fn every_gate_stays_right_at_its_extremes() {
    let random = Random::new();
    for gate in
        [Gate::Exponential, Gate::Sigmoid { normalize: true }, Gate::Sigmoid { normalize: false }]
    {
        for _ in 0..3 {
            let mut spec = spec([3, 2, 3, 16, 40], DType::F64);
            spec.gate = gate;
            verify(&spec, &Rows::default(), gate.has_stabilizer(), &random);
        }
    }
}

#[test]
fn a_reset_forgets_even_a_poisoned_slot() {
    let random = Random::new();
    let rows = Rows::default();
    let mut d = inputs(&spec([1, 1, 1, 8, 8], DType::F32), &rows, false, &random);
    d.f.set(&[0, 0, 0], f64::NEG_INFINITY);
    d.pools.c = Pools::poisoned(&d.problem).c;
    d.pools.n = Pools::poisoned(&d.problem).n;
    for &level in Level::available() {
        check(&d, &rows, &run(&d, &rows, level, 1, DType::I32).unwrap(), 1e-5);
    }
}

#[test]
fn padding_new_requests_and_moves_touch_only_their_slots() {
    let random = Random::new();
    let mut spec = spec([6, 2, 3, 16, 136], DType::F32);
    spec.num_slots = 9;
    for apart in [false, true] {
        // A padding row, a new request, an output without a state, a move, no token at all.
        let rows = Rows {
            src: Some(vec![-1, 3, 0, 5, 7, 8]),
            dst: Some(vec![2, 3, -1, 4, 7, 6]),
            has_state: Some(vec![1, 0, 1, 1, 1, 1]),
            tokens: Some(vec![3, 2, 3, 1, 0, 0]),
            apart,
        };
        verify(&spec, &rows, false, &random);
        let rows = Rows { src: Some(vec![-1; 6]), apart, ..Rows::default() };
        verify(&spec, &rows, false, &random);
        let rows = Rows { src: Some(vec![8, 7, 6, 5, 4, 3]), apart, ..Rows::default() };
        verify(&spec, &rows, false, &random);
    }
}

#[test]
fn bad_slots_are_refused_before_anything_is_written() {
    let random = Random::new();
    let mut spec = spec([3, 1, 2, 4, 4], DType::F32);
    spec.num_slots = 5;
    let good = Rows { src: Some(vec![0, 1, 2]), ..Rows::default() };
    let cases = [
        (Rows { src: Some(vec![0, 1, 5]), ..Rows::default() }, "src_slots[2]"),
        (Rows { src: Some(vec![0, -2, 1]), ..Rows::default() }, "src_slots[1]"),
        (Rows { src: Some(vec![0, 1, 1]), ..Rows::default() }, "src_slots[1]"),
        (Rows { dst: Some(vec![3, 3, 1]), ..good.clone() }, "dst_slots[0]"),
        (Rows { dst: Some(vec![3, 9, 1]), ..good.clone() }, "dst_slots[1]"),
        (Rows { dst: Some(vec![1, 3, 4]), ..good.clone() }, "src_slots[1]"),
        (Rows { tokens: Some(vec![0, 1, 3]), ..good.clone() }, "num_tokens[2]"),
        (Rows { tokens: Some(vec![0, -1, 1]), ..good.clone() }, "num_tokens[1]"),
    ];
    let d = inputs(&spec, &good, false, &random);
    for (rows, named) in cases {
        match run(&d, &rows, Level::Scalar, 1, DType::I64) {
            Ok(_) => panic!("{rows:?} went through"),
            Err(error) => assert!(error.to_string().starts_with(named), "{error}"),
        }
    }
    // Reading what another row writes is fine when the pools are apart.
    let rows = Rows { dst: Some(vec![1, 3, 4]), apart: true, ..good };
    verify(&spec, &rows, false, &random);
}
