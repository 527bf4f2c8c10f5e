//! TEMPORARY: every operation through the oracle, until the fast kernels replace it.
use super::reference::{self, Cell, Incoming, Sequence, State};
use crate::error::{Error, Result};
use crate::ops::{Bw, Fw, Step};
use crate::problem::Problem;
use crate::tensor::{DType, View};

fn at(view: &View, index: &[i64]) -> *mut u8 {
    let off: i64 = index.iter().zip(view.strides()).map(|(i, s)| i * s).sum();
    view.data.wrapping_offset(off as isize * view.dtype.size() as isize)
}
fn get(view: &View, index: &[i64]) -> f64 {
    let p = at(view, index);
    // SAFETY: validated view.
    unsafe {
        match view.dtype {
            DType::F32 => f64::from(*p.cast::<f32>()),
            DType::F64 => *p.cast::<f64>(),
            DType::Bf16 => (*p.cast::<half::bf16>()).to_f64(),
            DType::F16 => (*p.cast::<half::f16>()).to_f64(),
            DType::I32 => f64::from(*p.cast::<i32>()),
            DType::I64 => *p.cast::<i64>() as f64,
            DType::U8 => f64::from(*p),
        }
    }
}
fn put(view: &View, index: &[i64], x: f64) {
    let p = at(view, index);
    // SAFETY: validated view.
    unsafe {
        match view.dtype {
            DType::F32 => *p.cast::<f32>() = x as f32,
            DType::F64 => *p.cast::<f64>() = x,
            DType::Bf16 => *p.cast::<half::bf16>() = half::bf16::from_f64(x),
            DType::F16 => *p.cast::<half::f16>() = half::f16::from_f64(x),
            _ => {}
        }
    }
}
fn cell(p: &Problem) -> Cell {
    Cell { gate: p.gate, qk_scale: p.qk_scale, eps: p.eps, detach_denominator: p.detach_denominator }
}
fn rows(view: &View, b: i64, h: i64, t0: i64, t1: i64) -> Vec<f64> {
    let d = view.shape[3];
    (t0..t1).flat_map(|t| (0..d).map(move |x| (t, x))).map(|(t, x)| get(view, &[b, h, t, x])).collect()
}
fn toks(view: &View, b: i64, h: i64, t0: i64, t1: i64) -> Vec<f64> {
    (t0..t1).map(|t| get(view, &[b, h, t])).collect()
}
fn put_rows(view: &View, b: i64, h: i64, t0: i64, x: &[f64]) {
    let d = view.shape[3];
    for (j, x) in x.iter().enumerate() {
        put(view, &[b, h, t0 + j as i64 / d, j as i64 % d], *x);
    }
}
fn put_toks(view: &View, b: i64, h: i64, t0: i64, x: &[f64]) {
    for (j, x) in x.iter().enumerate() {
        put(view, &[b, h, t0 + j as i64], *x);
    }
}
fn get_state(p: &Problem, c: &Option<View>, n: &Option<View>, m: &Option<View>, r: i64, h: i64) -> State {
    let mut s = State::zero(p.dhqk as usize, p.dhhv as usize);
    if let Some(c) = c {
        for x in 0..p.dhqk * p.dhhv {
            s.c[x as usize] = get(c, &[r, h, x / p.dhhv, x % p.dhhv]);
        }
    }
    if let Some(n) = n {
        for x in 0..p.dhqk {
            s.n[x as usize] = get(n, &[r, h, x]);
        }
    }
    if let Some(m) = m {
        s.m = get(m, &[r, h]);
    }
    s
}
fn put_state(p: &Problem, c: &Option<View>, n: &Option<View>, m: &Option<View>, r: i64, h: i64, s: &State) {
    if let Some(c) = c {
        for x in 0..p.dhqk * p.dhhv {
            put(c, &[r, h, x / p.dhhv, x % p.dhhv], s.c[x as usize]);
        }
    }
    if let Some(n) = n {
        for x in 0..p.dhqk {
            put(n, &[r, h, x], s.n[x as usize]);
        }
    }
    if let Some(m) = m {
        put(m, &[r, h], s.m);
    }
}
fn sequences(p: &Problem, cu: &Option<View>) -> Result<Vec<(i64, i64, i64, i64)>> {
    let Some(cu) = cu else { return Ok((0..p.b).map(|b| (b, b, 0, p.s)).collect()) };
    let n = p.num_seqs.unwrap_or(0);
    let offs: Vec<i64> = (0..=n).map(|j| get(cu, &[j]) as i64).collect();
    if offs[0] != 0 || offs[n as usize] != p.s || offs.windows(2).any(|w| w[0] > w[1]) {
        return Err(Error::invalid("cu_seqlens", format!("offsets from 0 to s = {}, not decreasing", p.s), format!("{offs:?}")));
    }
    Ok((0..n).map(|j| (j, 0, offs[j as usize], offs[j as usize + 1])).collect())
}
pub(crate) fn forward(op: &Fw) -> Result<()> {
    let (p, t) = (&op.problem, &op.tensors);
    for (r, b, t0, t1) in sequences(p, &t.cu_seqlens)? {
        for h in 0..p.nh {
            let seq = Sequence {
                dhqk: p.dhqk as usize, dhhv: p.dhhv as usize,
                q: rows(&t.q, b, h, t0, t1), k: rows(&t.k, b, h, t0, t1), v: rows(&t.v, b, h, t0, t1),
                i: toks(&t.i, b, h, t0, t1), f: toks(&t.f, b, h, t0, t1),
                initial: get_state(p, &t.c_initial, &t.n_initial, &t.m_initial, r, h),
            };
            let out = reference::forward(&cell(p), &seq);
            put_rows(&t.h, b, h, t0, &out.h);
            if let Some(n) = &t.n { put_toks(n, b, h, t0, &out.n); }
            if let Some(m) = &t.m { put_toks(m, b, h, t0, &out.m); }
            put_state(p, &t.c_last, &t.n_last, &t.m_last, r, h, &out.last);
        }
    }
    Ok(())
}
pub(crate) fn backward(op: &Bw) -> Result<()> {
    let (p, t) = (&op.problem, &op.tensors);
    for (r, b, t0, t1) in sequences(p, &t.cu_seqlens)? {
        for h in 0..p.nh {
            let seq = Sequence {
                dhqk: p.dhqk as usize, dhhv: p.dhhv as usize,
                q: rows(&t.q, b, h, t0, t1), k: rows(&t.k, b, h, t0, t1), v: rows(&t.v, b, h, t0, t1),
                i: toks(&t.i, b, h, t0, t1), f: toks(&t.f, b, h, t0, t1),
                initial: get_state(p, &t.c_initial, &t.n_initial, &t.m_initial, r, h),
            };
            let d = get_state(p, &t.dc_last, &t.dn_last, &t.dm_last, r, h);
            let inc = Incoming { dh: rows(&t.dh, b, h, t0, t1), dc_last: d.c, dn_last: d.n, dm_last: t.dm_last.map(|_| d.m) };
            let g = reference::backward(&cell(p), &seq, &inc);
            put_rows(&t.dq, b, h, t0, &g.dq);
            put_rows(&t.dk, b, h, t0, &g.dk);
            put_rows(&t.dv, b, h, t0, &g.dv);
            put_toks(&t.di, b, h, t0, &g.di);
            put_toks(&t.df, b, h, t0, &g.df);
            put_state(p, &t.dc_initial, &t.dn_initial, &t.dm_initial, r, h, &g.initial);
        }
    }
    Ok(())
}
pub(crate) fn step(op: &Step) -> Result<()> {
    let (p, t) = (&op.problem, &op.tensors);
    let idx = |v: &Option<View>, b: i64, d: i64| v.as_ref().map_or(d, |v| get(v, &[b]) as i64);
    let (cd, nd, md) = op.destination();
    let mut used = std::collections::HashSet::new();
    for b in 0..p.b {
        let src = idx(&t.src_slots, b, b);
        let dst = idx(&t.dst_slots, b, src);
        for (name, x) in [("src_slots", src), ("dst_slots", dst)] {
            if x < -1 || x >= p.num_slots {
                return Err(Error::invalid(format!("{name}[{b}]"), format!("-1 to num_slots - 1 = {}", p.num_slots - 1), x));
            }
        }
        let n = idx(&t.num_tokens, b, p.s);
        if !(0..=p.s).contains(&n) {
            return Err(Error::invalid(format!("num_tokens[{b}]"), format!("0 to s = {}", p.s), n));
        }
        if src >= 0 && dst >= 0 && !used.insert(dst) {
            return Err(Error::invalid(format!("dst_slots[{b}]"), "a slot no other row writes", dst));
        }
    }
    for b in 0..p.b {
        let src = idx(&t.src_slots, b, b);
        let dst = idx(&t.dst_slots, b, src);
        if src < 0 { continue; }
        let n = idx(&t.num_tokens, b, p.s);
        for h in 0..p.nh {
            let initial = if idx(&t.has_state, b, 1) != 0 {
                get_state(p, &Some(t.c), &Some(t.n), &t.m, src, h)
            } else {
                State::zero(p.dhqk as usize, p.dhhv as usize)
            };
            let seq = Sequence {
                dhqk: p.dhqk as usize, dhhv: p.dhhv as usize,
                q: rows(&t.q, b, h, 0, n), k: rows(&t.k, b, h, 0, n), v: rows(&t.v, b, h, 0, n),
                i: toks(&t.i, b, h, 0, n), f: toks(&t.f, b, h, 0, n), initial,
            };
            let out = reference::forward(&cell(p), &seq);
            put_rows(&t.h, b, h, 0, &out.h);
            if dst >= 0 { put_state(p, &Some(cd), &Some(nd), &md, dst, h, &out.last); }
        }
    }
    Ok(())
}
