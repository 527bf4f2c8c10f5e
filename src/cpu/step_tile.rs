//! Body of the step: one head's state passes through the registers once, for all tokens.
#![allow(clippy::needless_range_loop, reason = "indices run over registers, and are unrolled")]

use super::codec::Codec;
use super::real::Real;
use super::simd::{LANES, Simd};
use super::vecops::{Mat, Rows};

/// Rows of the state that are streamed side by side.
const STREAMS: usize = 8;

/// Columns of one head's state and the tokens that act on them.
pub(crate) struct StepTile<T> {
    /// DHQK rows of the state, and how many columns from `src` and `dst` on.
    pub rows: usize,
    pub cols: usize,
    pub tokens: usize,
    /// The state before; `None` is a zero state.
    pub src: Option<Rows>,
    /// Where the state after goes, if anywhere; may be `src`.
    pub dst: Option<Rows>,
    /// Per token: factor on the old state.
    pub decay: *const T,
    /// Per token: k times the input weight and q times the scale, by row of the state.
    pub k: Mat<T>,
    pub q: Mat<T>,
    /// Per token: v, and q C to be written; rows padded.
    pub v: Mat<T>,
    pub h: Mat<T>,
}

/// # Safety
/// The CPU has the level's instructions, and all pointers cover what the fields describe.
#[inline(always)]
pub(crate) unsafe fn step_tile<S: Simd, C: Codec>(t: &StepTile<S::T>) {
    let mut row = 0;
    // SAFETY: the caller's contract.
    unsafe {
        while row + STREAMS <= t.rows {
            if t.tokens == 1 {
                step_rows::<S, C, STREAMS, true>(t, row);
            } else {
                step_rows::<S, C, STREAMS, false>(t, row);
            }
            row += STREAMS;
        }
        while row < t.rows {
            step_rows::<S, C, 1, false>(t, row);
            row += 1;
        }
    }
}

/// `ONE` is the case of one token, whose k and q stay in registers.
///
/// # Safety
/// As [`step_tile`].
#[inline(always)]
unsafe fn step_rows<S: Simd, C: Codec, const R: usize, const ONE: bool>(
    t: &StepTile<S::T>,
    row: usize,
) {
    let size = C::size::<S>();
    // SAFETY: the caller's contract; `count` keeps the last vector within the row.
    unsafe {
        let zero = S::splat(S::T::ZERO);
        let (mut k, mut q, mut decay) = ([zero; R], [zero; R], zero);
        if ONE {
            decay = S::splat(*t.decay);
            for r in 0..R {
                k[r] = S::splat(*t.k.p.add(row + r));
                q[r] = S::splat(*t.q.p.add(row + r));
            }
        }
        let mut col = 0;
        while col < t.cols {
            let count = (t.cols - col).min(S::W);
            let mut c = [zero; R];
            if let Some(src) = t.src {
                for r in 0..R {
                    let at = (row + r) as isize * src.stride + col as isize;
                    let p = src.p.offset(at * size as isize);
                    // The rows after these, which the hardware's own prefetch starts late on.
                    S::prefetch(p.wrapping_offset(R as isize * src.stride * size as isize));
                    c[r] = load_some::<S, C>(p, count);
                }
            }
            if ONE {
                let v = S::load(t.v.p.add(col));
                let to = t.h.p.add(col);
                let mut h = if row == 0 { zero } else { S::load(to) };
                for r in 0..R {
                    c[r] = S::fma(k[r], v, S::mul(decay, c[r]));
                    h = S::fma(q[r], c[r], h);
                }
                S::store(to, h);
            } else {
                for token in 0..t.tokens {
                    let decay = S::splat(*t.decay.add(token));
                    let v = S::load(t.v.row(token).add(col));
                    let (k, q) = (t.k.row(token).add(row), t.q.row(token).add(row));
                    let to = t.h.row(token).add(col);
                    let mut h = if row == 0 { zero } else { S::load(to) };
                    for r in 0..R {
                        c[r] = S::fma(S::splat(*k.add(r)), v, S::mul(decay, c[r]));
                        h = S::fma(S::splat(*q.add(r)), c[r], h);
                    }
                    S::store(to, h);
                }
            }
            if let Some(dst) = t.dst {
                for r in 0..R {
                    let at = (row + r) as isize * dst.stride + col as isize;
                    store_some::<S, C>(dst.p.offset(at * size as isize), c[r], count);
                }
            }
            col += S::W;
        }
    }
}

/// # Safety
/// `p` covers `count` elements; as [`step_tile`] else.
#[inline(always)]
unsafe fn load_some<S: Simd, C: Codec>(p: *const u8, count: usize) -> S::V {
    // SAFETY: the caller's contract.
    unsafe {
        if count == S::W {
            return C::load::<S>(p);
        }
        let mut buffer = [0u64; LANES];
        let buffer = buffer.as_mut_ptr().cast::<u8>();
        p.copy_to_nonoverlapping(buffer, count * C::size::<S>());
        C::load::<S>(buffer)
    }
}

/// # Safety
/// As [`load_some`].
#[inline(always)]
unsafe fn store_some<S: Simd, C: Codec>(p: *mut u8, v: S::V, count: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        if count == S::W {
            return C::store::<S>(p, v);
        }
        let mut buffer = [0u64; LANES];
        let buffer = buffer.as_mut_ptr().cast::<u8>();
        C::store::<S>(buffer, v);
        buffer.copy_to_nonoverlapping(p, count * C::size::<S>());
    }
}
