//! Gates: the max-plus scan for m in the forward direction, and the gates' gradients.
//!
//! The scan runs in float64 (it is one short pass per token), and what it hands on is relative to
//! the token's own m: exponents that are <= 0 and small where the weight matters, so rounding them
//! to float32 costs nothing, however large m is.

use super::lanes::{Lane, read_real, write_real};
use super::layout::{Memory, Vector};
use super::real::Real;
use super::table::Kernels;
use super::vecops::padded;
use crate::problem::{Gate, Problem};
use crate::tensor::View;

/// log(sigmoid(x)) = min(x, 0) - log1p(exp(-|x|)), exact at both infinities.
pub(crate) fn log_sigmoid(x: f64) -> f64 {
    let low = if x > 0.0 { 0.0 } else { x };
    low - (-x.abs()).exp().ln_1p()
}

/// sigmoid(-x).
fn sigmoid_neg(x: f64) -> f64 {
    1.0 / (1.0 + x.exp())
}

/// What a token does to the state, relative to the token's own m.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GateStep {
    /// m_t; 0 with the sigmoid gate.
    pub m: f64,
    /// Exponent of the factor on the state before.
    pub step: f64,
    /// Exponent of the token's own weight.
    pub source: f64,
    /// Lower bound of |N_t| in the denominator.
    pub floor: f64,
}

/// One step of the scan.
pub(crate) fn gate_step(gate: Gate, i: f64, f: f64, m: f64) -> GateStep {
    let log_f = log_sigmoid(f);
    if !gate.has_stabilizer() {
        return GateStep { m: 0.0, step: log_f, source: log_sigmoid(i), floor: 1.0 };
    }
    let kept = log_f + m;
    let m = if i > kept { i } else { kept };
    if m == f64::NEG_INFINITY {
        // Nothing so far, and nothing now: weights of 0, not exp(-inf + inf).
        return GateStep { m, step: m, source: m, floor: f64::INFINITY };
    }
    GateStep { m, step: kept - m, source: i - m, floor: (-m).exp() }
}

/// The gates' tensors of a call.
#[derive(Clone, Copy)]
pub(crate) struct GateViews {
    pub i: View,
    pub f: View,
    pub m_initial: Option<View>,
    /// Outputs of the forward.
    pub m: Option<View>,
    pub m_last: Option<View>,
}

/// Scans one lane: fills its `Step`, `Source` and `Floor` vectors, and m and the last m if wanted.
///
/// # Safety
/// No other thread touches the lane's vectors and outputs.
pub(crate) unsafe fn scan<T: Real>(
    problem: &Problem,
    views: &GateViews,
    lane: &Lane,
    memory: &Memory<'_, T>,
) {
    let initial = views.m_initial.map(|m| read_real(&m, [lane.row, lane.head, 0]));
    let mut m = initial.unwrap_or(0.0);
    let [step, source, floor] =
        [Vector::Step, Vector::Source, Vector::Floor].map(|v| memory.vector(v, lane.token));
    for t in 0..lane.len {
        let at = [lane.batch, lane.head, lane.start + t];
        let next = gate_step(problem.gate, read_real(&views.i, at), read_real(&views.f, at), m);
        m = next.m;
        // SAFETY: t is within the lane; the caller keeps others away.
        unsafe {
            *step.add(t) = T::from_f64(next.step);
            *source.add(t) = T::from_f64(next.source);
            *floor.add(t) = T::from_f64(next.floor);
            if let Some(out) = &views.m {
                write_real(out, at, m);
            }
        }
    }
    if let Some(out) = &views.m_last {
        // SAFETY: as above.
        unsafe { write_real(out, [lane.row, lane.head, 0], m) };
    }
}

/// Sum of the exponents, in float64.
///
/// # Safety
/// `step` covers `len` elements.
pub(crate) unsafe fn total<T: Real>(step: *const T, len: usize) -> f64 {
    // SAFETY: the caller's contract.
    (0..len).map(|t| unsafe { *step.add(t) }.to_f64()).sum()
}

/// `out[t] = exp(before + sum of step[..=t])`: decay from before the first token to each. Returns
/// `before` plus the whole sum.
///
/// # Safety
/// `step` covers `len` elements, `out` their padded number.
pub(crate) unsafe fn decay_to<T: Real>(
    kernels: &Kernels<T>,
    step: *const T,
    len: usize,
    before: f64,
    out: *mut T,
) -> f64 {
    let mut sum = before;
    // SAFETY: the caller's contract.
    unsafe {
        for t in 0..len {
            sum += (*step.add(t)).to_f64();
            *out.add(t) = T::from_f64(sum);
        }
        for t in len..padded(len) {
            *out.add(t) = T::from_f64(f64::NEG_INFINITY);
        }
        (kernels.exp)(out, padded(len));
    }
    sum
}

/// `out[s] = exp(source[s] + sum of step[s + 1..] + after)`: each token's weight at the end of the
/// tokens and of what follows them. Returns the sum of all steps plus `after`.
///
/// # Safety
/// As [`decay_to`].
pub(crate) unsafe fn decay_from<T: Real>(
    kernels: &Kernels<T>,
    step: *const T,
    source: *const T,
    len: usize,
    after: f64,
    out: *mut T,
) -> f64 {
    let mut sum = after;
    // SAFETY: the caller's contract.
    unsafe {
        for s in (0..len).rev() {
            *out.add(s) = T::from_f64(sum + (*source.add(s)).to_f64());
            sum += (*step.add(s)).to_f64();
        }
        for s in len..padded(len) {
            *out.add(s) = T::from_f64(f64::NEG_INFINITY);
        }
        (kernels.exp)(out, padded(len));
    }
    sum
}

/// Where the gradients of the gates and of m go.
#[derive(Clone, Copy)]
pub(crate) struct GateGradients {
    pub i: View,
    pub f: View,
    pub di: View,
    pub df: View,
    pub dm_last: Option<View>,
    pub dm_initial: Option<View>,
}

/// Gradients of one lane's gates, from what the tiles left in the workspace.
///
/// In a frame that moves with m, dlogf_t = <dC_t, C_t> + <dn_t, n_t> taken right before token t,
/// which each chunk starts afresh from its end. On top comes the derivative with respect to m
/// itself, by way of eps and of a literal `dm_last`: it flows along the arguments that won the
/// maxima. `first_dot` is <dC_0, C_0> + <dn_0, n_0>.
///
/// # Safety
/// No other thread touches the lane's vectors and outputs.
pub(crate) unsafe fn gradients<T: Real>(
    problem: &Problem,
    views: &GateGradients,
    lane: &Lane,
    memory: &Memory<'_, T>,
    first_dot: f64,
) {
    let chunk_len = memory.layout.chunk;
    let chunks = lane.len.div_ceil(chunk_len);
    // SAFETY: indices stay within the lane and its chunks.
    let dot_at = |chunk: usize| unsafe { *memory.chunk_dot(lane.chunk + chunk) };
    // SAFETY: as above.
    let value = |which: Vector, t: usize| unsafe { *memory.vector(which, lane.token + t) };
    let last_dot = if chunks == 0 { first_dot } else { dot_at(chunks - 1) };
    let mut to_m = match &views.dm_last {
        Some(dm) => read_real(dm, [lane.row, lane.head, 0]) - last_dot,
        None => 0.0,
    };
    let stabilized = problem.gate.has_stabilizer();
    for chunk in (0..chunks).rev() {
        let mut sum = dot_at(chunk);
        let start = chunk * chunk_len;
        for t in (start..lane.len.min(start + chunk_len)).rev() {
            let (step, kdk) = (value(Vector::Step, t).to_f64(), value(Vector::Kdk, t).to_f64());
            sum += value(Vector::Qdq, t).to_f64() - kdk;
            if T::from_f64(step.exp()) == T::ZERO {
                // Nothing passes this token; what is left of the sum is rounding.
                sum = 0.0;
            }
            let (mut d_log_f, mut di) = (sum, kdk);
            if stabilized {
                to_m += value(Vector::Frame, t).to_f64();
                let from_input = step < 0.0 && value(Vector::Source, t) == T::ZERO;
                if from_input {
                    di += std::mem::take(&mut to_m);
                } else {
                    d_log_f += to_m;
                }
            }
            let at = [lane.batch, lane.head, lane.start + t];
            if !stabilized {
                di *= sigmoid_neg(read_real(&views.i, at));
            }
            // SAFETY: the caller keeps others away.
            unsafe {
                write_real(&views.di, at, di);
                write_real(&views.df, at, d_log_f * sigmoid_neg(read_real(&views.f, at)));
            }
        }
    }
    if let Some(dm) = &views.dm_initial {
        // SAFETY: as above.
        unsafe { write_real(dm, [lane.row, lane.head, 0], first_dot + to_m) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gate_steps_stay_finite_and_exact_at_the_extremes() {
        assert_eq!(log_sigmoid(f64::INFINITY), 0.0);
        assert_eq!(log_sigmoid(f64::NEG_INFINITY), f64::NEG_INFINITY);
        assert_eq!(log_sigmoid(-1000.0), -1000.0);
        let inf = f64::INFINITY;
        let nothing = gate_step(Gate::Exponential, -inf, 1.0, -inf);
        assert_eq!((nothing.step, nothing.source, nothing.floor), (-inf, -inf, inf));
        let reset = gate_step(Gate::Exponential, 2.0, -inf, 5.0);
        assert_eq!((reset.m, reset.step, reset.source), (2.0, -inf, 0.0));
        let ignored = gate_step(Gate::Exponential, -inf, 1000.0, 3.0);
        assert_eq!((ignored.m, ignored.step, ignored.source), (3.0, 0.0, -inf));
    }
}
