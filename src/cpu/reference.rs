//! The oracle: the recurrence of one head, token by token in float64, and its gradient by plain
//! back-propagation through time, m included. Slow, obvious, and independent of the fast kernels'
//! formulas; the tests hold every kernel against it.

use crate::problem::Gate;

/// Options of the cell, as in `Problem`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cell {
    /// The input gate.
    pub gate: Gate,
    /// Factor on q.
    pub qk_scale: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Leave the denominator out of the gradient.
    pub detach_denominator: bool,
}

/// A state: C (DHQK x DHHV, row-major), n (DHQK), m.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "named above")]
pub struct State {
    pub c: Vec<f64>,
    pub n: Vec<f64>,
    pub m: f64,
}

impl State {
    /// The state before the first token when none is given.
    pub fn zero(dhqk: usize, dhhv: usize) -> Self {
        Self { c: vec![0.0; dhqk * dhhv], n: vec![0.0; dhqk], m: 0.0 }
    }
}

/// One head of one sequence: q, k (S x DHQK), v (S x DHHV), i, f (S), row-major.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "named above")]
pub struct Sequence {
    pub dhqk: usize,
    pub dhhv: usize,
    pub q: Vec<f64>,
    pub k: Vec<f64>,
    pub v: Vec<f64>,
    pub i: Vec<f64>,
    pub f: Vec<f64>,
    pub initial: State,
}

/// Result of [`forward`]: h (S x DHHV), N and m per token, the last state.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "named above")]
pub struct Forward {
    pub h: Vec<f64>,
    pub n: Vec<f64>,
    pub m: Vec<f64>,
    pub last: State,
}

/// Gradients of what [`forward`] returns; `dm_last` is `None` if the last state counts as the
/// frame-invariant (C e^m, n e^m).
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "named above")]
pub struct Incoming {
    pub dh: Vec<f64>,
    pub dc_last: Vec<f64>,
    pub dn_last: Vec<f64>,
    pub dm_last: Option<f64>,
}

/// Gradients of what [`forward`] takes.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "named above")]
pub struct Gradients {
    pub dq: Vec<f64>,
    pub dk: Vec<f64>,
    pub dv: Vec<f64>,
    pub di: Vec<f64>,
    pub df: Vec<f64>,
    pub initial: State,
}

/// log(sigmoid(x)) without overflow.
fn logsigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    logsigmoid(x).exp()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// Everything about one token that both directions need.
struct Token {
    /// Factor on the previous state.
    decay: f64,
    /// Factor on k v^T.
    gain: f64,
    /// m after the token.
    m: f64,
}

fn token(cell: &Cell, i: f64, f: f64, m_previous: f64) -> Token {
    match cell.gate {
        Gate::Exponential => {
            let kept = logsigmoid(f) + m_previous;
            let m = kept.max(i);
            if m == f64::NEG_INFINITY {
                // Nothing has been seen since the reset: the state is zero in any frame.
                return Token { decay: 0.0, gain: 0.0, m };
            }
            Token { decay: (kept - m).exp(), gain: (i - m).exp(), m }
        }
        Gate::Sigmoid { .. } => Token { decay: sigmoid(f), gain: sigmoid(i), m: 0.0 },
    }
}

fn update(state: &State, token: &Token, k: &[f64], v: &[f64]) -> State {
    let mut next = State { c: vec![], n: vec![], m: token.m };
    next.c.reserve(state.c.len());
    for (row, &kd) in state.c.chunks(v.len()).zip(k) {
        // A factor of zero forgets whatever was there, NaN included (reset).
        next.c.extend(
            row.iter().zip(v).map(|(c, ve)| scaled(token.decay, *c) + token.gain * kd * ve),
        );
    }
    next.n.extend(state.n.iter().zip(k).map(|(n, kd)| scaled(token.decay, *n) + token.gain * kd));
    next
}

fn scaled(factor: f64, value: f64) -> f64 {
    if factor == 0.0 { 0.0 } else { factor * value }
}

/// (s q^T C, N) of a token.
fn read_out(cell: &Cell, state: &State, q: &[f64], dhhv: usize) -> (Vec<f64>, f64) {
    let mut numerator = vec![0.0; dhhv];
    for (row, qd) in state.c.chunks(dhhv).zip(q) {
        for (sum, c) in numerator.iter_mut().zip(row) {
            *sum += cell.qk_scale * qd * c;
        }
    }
    (numerator, cell.qk_scale * dot(q, &state.n))
}

/// What a token's h is divided by, by its N and m: eps is in it. 1 without a normaliser.
pub fn denominator(cell: &Cell, n: f64, m: f64) -> f64 {
    match cell.gate {
        Gate::Exponential => n.abs().max((-m).exp()) + cell.eps,
        Gate::Sigmoid { normalize: true } => n.abs().max(1.0) + cell.eps,
        Gate::Sigmoid { normalize: false } => 1.0,
    }
}

/// Runs the recurrence, returning the result and all S + 1 states.
fn run(cell: &Cell, sequence: &Sequence) -> (Forward, Vec<State>) {
    let (dhqk, dhhv) = (sequence.dhqk, sequence.dhhv);
    let mut states = vec![sequence.initial.clone()];
    if matches!(cell.gate, Gate::Sigmoid { .. }) {
        states[0].m = 0.0;
    }
    let mut out = Forward { h: vec![], n: vec![], m: vec![], last: states[0].clone() };
    for t in 0..sequence.i.len() {
        let (q, k) = (&sequence.q[t * dhqk..][..dhqk], &sequence.k[t * dhqk..][..dhqk]);
        let v = &sequence.v[t * dhhv..][..dhhv];
        let gates = token(cell, sequence.i[t], sequence.f[t], out.last.m);
        let next = update(&out.last, &gates, k, v);
        let (numerator, n) = read_out(cell, &next, q, dhhv);
        let den = denominator(cell, n, next.m);
        out.h.extend(numerator.iter().map(|x| x / den));
        out.n.push(n);
        out.m.push(next.m);
        states.push(next.clone());
        out.last = next;
    }
    (out, states)
}

/// The forward of one head.
pub fn forward(cell: &Cell, sequence: &Sequence) -> Forward {
    run(cell, sequence).0
}

/// The gradient of one head.
pub fn backward(cell: &Cell, sequence: &Sequence, incoming: &Incoming) -> Gradients {
    let (out, states) = run(cell, sequence);
    let (dhqk, dhhv, s) = (sequence.dhqk, sequence.dhhv, sequence.i.len());
    let mut grad = Gradients {
        dq: vec![0.0; s * dhqk],
        dk: vec![0.0; s * dhqk],
        dv: vec![0.0; s * dhhv],
        di: vec![0.0; s],
        df: vec![0.0; s],
        initial: State::zero(dhqk, dhhv),
    };
    // Gradient of the state after token t.
    let mut d = State { c: incoming.dc_last.clone(), n: incoming.dn_last.clone(), m: 0.0 };
    if cell.gate.has_stabilizer() {
        let invariant = dot(&d.c, &out.last.c) + dot(&d.n, &out.last.n);
        d.m = incoming.dm_last.unwrap_or(invariant);
    }
    for t in (0..s).rev() {
        let (q, k) = (&sequence.q[t * dhqk..][..dhqk], &sequence.k[t * dhqk..][..dhqk]);
        let v = &sequence.v[t * dhhv..][..dhhv];
        let (dh, h) = (&incoming.dh[t * dhhv..][..dhhv], &out.h[t * dhhv..][..dhhv]);
        let (before, after) = (&states[t], &states[t + 1]);
        let gates = token(cell, sequence.i[t], sequence.f[t], before.m);

        let dn_scalar = read_out_backward(cell, after, out.n[t], dot(dh, h), &mut d.m);
        let scale = cell.qk_scale / denominator(cell, out.n[t], after.m);
        let (dq, dk) = (&mut grad.dq[t * dhqk..][..dhqk], &mut grad.dk[t * dhqk..][..dhqk]);
        for x in 0..dhqk {
            let (c_row, d_row) = (&after.c[x * dhhv..][..dhhv], &mut d.c[x * dhhv..][..dhhv]);
            dq[x] = scale * dot(dh, c_row) + cell.qk_scale * dn_scalar * after.n[x];
            for (dc, dh) in d_row.iter_mut().zip(dh) {
                *dc += scale * q[x] * dh;
            }
            d.n[x] += cell.qk_scale * dn_scalar * q[x];
        }

        // C = decay C' + gain k v^T, n = decay n' + gain k.
        let (mut d_decay, mut d_gain) = (dot(&d.n, &before.n), dot(&d.n, k));
        for x in 0..dhqk {
            let d_row = &mut d.c[x * dhhv..][..dhhv];
            let along_v = dot(d_row, v);
            dk[x] = gates.gain * (along_v + d.n[x]);
            d_gain += k[x] * along_v;
            d_decay += dot(d_row, &before.c[x * dhhv..][..dhhv]);
            for (dv, dc) in grad.dv[t * dhhv..][..dhhv].iter_mut().zip(d_row.iter()) {
                *dv += gates.gain * k[x] * dc;
            }
            d_row.iter_mut().for_each(|dc| *dc *= gates.decay);
            d.n[x] *= gates.decay;
        }

        // Through the exponents and the max.
        let (mut d_logf, mut d_logi) = (scaled(gates.decay, d_decay), gates.gain * d_gain);
        if cell.gate.has_stabilizer() {
            let d_m = d.m - d_logf - d_logi;
            d.m = d_logf;
            if logsigmoid(sequence.f[t]) + before.m >= sequence.i[t] {
                d_logf += d_m;
                d.m += d_m;
            } else {
                d_logi += d_m;
            }
        } else {
            d_logi *= sigmoid(-sequence.i[t]);
        }
        grad.di[t] = d_logi;
        grad.df[t] = d_logf * sigmoid(-sequence.f[t]);
    }
    grad.initial = d;
    grad
}

/// Gradient of N through the denominator; adds to `dm` what reaches m there.
fn read_out_backward(cell: &Cell, state: &State, n: f64, dh_h: f64, dm: &mut f64) -> f64 {
    match cell.gate {
        Gate::Exponential if state.m == f64::NEG_INFINITY => 0.0,
        Gate::Exponential if cell.detach_denominator => {
            // The denominator is a constant of the unstabilised cell: it scales with e^-m here.
            *dm += dh_h;
            0.0
        }
        Gate::Exponential => {
            let floor = (-state.m).exp();
            let d_den = -dh_h / denominator(cell, n, state.m);
            if n.abs() > floor {
                d_den * n.signum()
            } else {
                // An infinite floor (m far below zero) leaves h = 0, and nothing to pass on.
                *dm -= if floor.is_finite() { d_den * floor } else { 0.0 };
                0.0
            }
        }
        Gate::Sigmoid { normalize: true } if !cell.detach_denominator && n.abs() > 1.0 => {
            -dh_h / denominator(cell, n, state.m) * n.signum()
        }
        Gate::Sigmoid { .. } => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A fixed pseudo-random sequence; the point here is the calculus, not the inputs.
    fn noise(count: usize, seed: u64) -> Vec<f64> {
        let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        (0..count)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                (x >> 11) as f64 / (1u64 << 53) as f64 * 4.0 - 2.0
            })
            .collect()
    }

    const S: usize = 9;
    const DHQK: usize = 3;
    const DHHV: usize = 2;

    fn sequence_of(x: &[f64]) -> Sequence {
        let mut rest = x;
        let mut take = |count: usize| {
            let (head, tail) = rest.split_at(count);
            rest = tail;
            head.to_vec()
        };
        Sequence {
            dhqk: DHQK,
            dhhv: DHHV,
            q: take(S * DHQK),
            k: take(S * DHQK),
            v: take(S * DHHV),
            i: take(S),
            f: take(S),
            initial: State { c: take(DHQK * DHHV), n: take(DHQK), m: take(1)[0] },
        }
    }

    /// All of the gradient at once against central differences of a random linear loss.
    fn check(cell: Cell) {
        let count = S * (2 * DHQK + DHHV + 2) + DHQK * DHHV + DHQK + 1;
        let x = noise(count, 7);
        let incoming = Incoming {
            dh: noise(S * DHHV, 1),
            dc_last: noise(DHQK * DHHV, 2),
            dn_last: noise(DHQK, 3),
            dm_last: Some(0.7),
        };
        let loss = |x: &[f64]| {
            let out = forward(&cell, &sequence_of(x));
            let m = if cell.gate.has_stabilizer() { 0.7 * out.last.m } else { 0.0 };
            dot(&out.h, &incoming.dh)
                + dot(&out.last.c, &incoming.dc_last)
                + dot(&out.last.n, &incoming.dn_last)
                + m
        };
        let g = backward(&cell, &sequence_of(&x), &incoming);
        let got =
            [g.dq, g.dk, g.dv, g.di, g.df, g.initial.c, g.initial.n, vec![g.initial.m]].concat();
        for index in 0..count {
            let mut moved = x.clone();
            moved[index] = x[index] + 1e-6;
            let up = loss(&moved);
            moved[index] = x[index] - 1e-6;
            let expected = (up - loss(&moved)) / 2e-6;
            let error = (got[index] - expected).abs();
            assert!(error < 1e-7 * (1.0 + expected.abs()), "{cell:?} at {index}: {error}");
        }
    }

    #[test]
    fn gradient_matches_central_differences() {
        for gate in [
            Gate::Exponential,
            Gate::Sigmoid { normalize: true },
            Gate::Sigmoid { normalize: false },
        ] {
            for eps in [0.0, 1e-6, 0.3] {
                check(Cell { gate, qk_scale: 0.6, eps, detach_denominator: false });
            }
        }
    }
}
