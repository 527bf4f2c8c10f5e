//! Bodies of the vector kernels that surround the matrix products. All matrices here are scratch
//! or state memory: row-major, rows padded with zeros to a multiple of [`LANES`] elements.
//!
//! Every function is unsafe under one contract: the CPU has the level's instructions, and pointers
//! cover the rows and (padded) columns named by the arguments.

use super::codec::Codec;
use super::real::Real;
use super::simd::{LANES, Simd};

/// Rows of the largest tile: the intra-chunk products are computed in squares of this side.
pub(crate) const TILE: usize = 64;

/// Columns with their zero padding.
#[inline(always)]
pub(crate) const fn padded(cols: usize) -> usize {
    cols.next_multiple_of(LANES)
}

/// A matrix in scratch or state memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mat<T> {
    pub p: *mut T,
    /// Elements from row to row.
    pub ld: usize,
}

impl<T: Copy> Mat<T> {
    /// Pointer to the row.
    pub(crate) fn row(self, row: usize) -> *mut T {
        self.p.wrapping_add(row * self.ld)
    }

    /// The matrix from this row on.
    pub(crate) fn below(self, row: usize) -> Self {
        Self { p: self.row(row), ld: self.ld }
    }
}

/// Rows of a user tensor: pointer, elements from row to row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    pub p: *mut u8,
    pub stride: isize,
}

/// Rows that [`load`] asks for in advance.
const AHEAD: isize = 8;

/// Reads rows of a user tensor into a padded matrix, times `scale` and, unless null, the row's
/// entry of `row_scale`.
#[inline(always)]
pub(crate) unsafe fn load<S: Simd, C: Codec>(
    src: Rows,
    (rows, cols): (usize, usize),
    row_scale: *const S::T,
    scale: S::T,
    dst: Mat<S::T>,
) {
    let whole = cols / S::W * S::W;
    let size = C::size::<S>();
    for row in 0..rows {
        // SAFETY: the contract above; the last vector goes through a buffer, so nothing beyond
        // the row is read.
        unsafe {
            let factor = if row_scale.is_null() { scale } else { *row_scale.add(row) * scale };
            let factor = S::splat(factor);
            let from = src.p.offset(row as isize * src.stride * size as isize).cast_const();
            // Rows are short: the hardware's own prefetch starts anew with each.
            let ahead = from.wrapping_offset(AHEAD * src.stride * size as isize);
            let to = dst.row(row);
            let mut col = 0;
            while col < whole {
                S::prefetch(ahead.wrapping_add(col * size));
                S::store(to.add(col), S::mul(C::load::<S>(from.add(col * size)), factor));
                col += S::W;
            }
            if col < cols {
                let mut tail = [0u64; LANES];
                let tail = tail.as_mut_ptr().cast::<u8>();
                from.add(col * size).copy_to_nonoverlapping(tail, (cols - col) * size);
                S::store(to.add(col), S::mul(C::load::<S>(tail), factor));
                col += S::W;
            }
            while col < padded(cols) {
                S::store(to.add(col), S::splat(S::T::ZERO));
                col += S::W;
            }
        }
    }
}

/// Writes rows to a user tensor, rounding to nearest even, times `scale` and, unless null, the
/// row's entry of `row_scale`.
#[inline(always)]
pub(crate) unsafe fn store<S: Simd, C: Codec>(
    src: Mat<S::T>,
    (rows, cols): (usize, usize),
    row_scale: *const S::T,
    scale: S::T,
    dst: Rows,
) {
    let size = C::size::<S>();
    for row in 0..rows {
        // SAFETY: the contract above; the last vector goes through a buffer, so nothing beyond
        // the row is written.
        unsafe {
            let factor = if row_scale.is_null() { scale } else { *row_scale.add(row) * scale };
            let factor = S::splat(factor);
            let from = src.row(row).cast_const();
            let to = dst.p.offset(row as isize * dst.stride * size as isize);
            let mut col = 0;
            while col + S::W <= cols {
                C::store::<S>(to.add(col * size), S::mul(S::load(from.add(col)), factor));
                col += S::W;
            }
            if col < cols {
                let mut tail = [0u64; LANES];
                let tail = tail.as_mut_ptr().cast::<u8>();
                C::store::<S>(tail, S::mul(S::load(from.add(col)), factor));
                tail.copy_to_nonoverlapping(to.add(col * size), (cols - col) * size);
            }
        }
    }
}

/// `dst[col][row] = src[row][col]`; the padding of dst's rows becomes 0. `cols` is padded.
#[inline(always)]
pub(crate) unsafe fn transpose<S: Simd>(
    src: Mat<S::T>,
    (rows, cols): (usize, usize),
    dst: Mat<S::T>,
) {
    let mut row = 0;
    // SAFETY: the contract above.
    unsafe {
        while row + S::SQUARE <= rows {
            let mut col = 0;
            while col < cols {
                S::transpose(src.row(row).add(col), src.ld, dst.row(col).add(row), dst.ld);
                col += S::SQUARE;
            }
            row += S::SQUARE;
        }
        for col in 0..cols {
            for rest in row..rows {
                *dst.row(col).add(rest) = *src.row(rest).add(col);
            }
            for pad in rows..padded(rows) {
                *dst.row(col).add(pad) = S::T::ZERO;
            }
        }
    }
}

/// `x = exp(x)` for a padded vector of values <= 0.
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: *mut S::T, len: usize) {
    let mut i = 0;
    while i < len {
        // SAFETY: the contract above.
        unsafe { S::store(x.add(i), S::exp(S::load(x.add(i)))) };
        i += S::W;
    }
}

/// Decay within a tile: `d[t][s] = exp(source[s] + sum of step[s+1..=t])` for s <= t, else 0.
///
/// The exponents are carried from row to row, so only values <= 0 are ever added: a reset
/// (`step = -inf`) is exact, and nothing cancels. Row t is written up to the multiple of
/// [`LANES`] after column t.
#[inline(always)]
pub(crate) unsafe fn decay_tile<S: Simd>(
    step: *const S::T,
    source: *const S::T,
    rows: usize,
    d: Mat<S::T>,
) {
    let mut exponent = [S::T::from_f64(f64::NEG_INFINITY); TILE];
    let exponent = exponent.as_mut_ptr();
    for t in 0..rows {
        // SAFETY: the contract above; rows <= TILE.
        unsafe {
            let add = S::splat(*step.add(t));
            let mut s = 0;
            while s < padded(t + 1) {
                S::store(exponent.add(s), S::add(S::load(exponent.add(s)), add));
                s += S::W;
            }
            *exponent.add(t) = *source.add(t);
            s = 0;
            while s < padded(t + 1) {
                S::store(d.row(t).add(s), S::exp(S::load(exponent.add(s))));
                s += S::W;
            }
        }
    }
}

/// `d[t][s] = row[t] * col[s]` over padded columns.
#[inline(always)]
pub(crate) unsafe fn outer<S: Simd>(
    row: *const S::T,
    col: *const S::T,
    (rows, cols): (usize, usize),
    d: Mat<S::T>,
) {
    for t in 0..rows {
        // SAFETY: the contract above.
        unsafe {
            let factor = S::splat(*row.add(t));
            let mut s = 0;
            while s < cols {
                S::store(d.row(t).add(s), S::mul(factor, S::load(col.add(s))));
                s += S::W;
            }
        }
    }
}

/// Columns of row t that count: all, or those up to the diagonal rounded up to [`LANES`].
#[inline(always)]
fn width(t: usize, cols: usize, causal: bool) -> usize {
    if causal { padded(t + 1) } else { cols }
}

/// `x *= d`, and adds the row sums of the result to `sums`.
#[inline(always)]
pub(crate) unsafe fn hadamard<S: Simd>(
    x: Mat<S::T>,
    d: Mat<S::T>,
    (rows, cols): (usize, usize),
    causal: bool,
    sums: *mut S::T,
) {
    for t in 0..rows {
        // SAFETY: the contract above.
        unsafe {
            let mut sum = S::splat(S::T::ZERO);
            let mut s = 0;
            while s < width(t, cols, causal) {
                let product = S::mul(S::load(x.row(t).add(s)), S::load(d.row(t).add(s)));
                S::store(x.row(t).add(s), product);
                sum = S::add(sum, product);
                s += S::W;
            }
            *sums.add(t) += S::sum(sum);
        }
    }
}

/// `x = (x + bias[t]) * d`.
#[inline(always)]
pub(crate) unsafe fn biased_hadamard<S: Simd>(
    x: Mat<S::T>,
    d: Mat<S::T>,
    (rows, cols): (usize, usize),
    causal: bool,
    bias: *const S::T,
) {
    for t in 0..rows {
        // SAFETY: the contract above.
        unsafe {
            let add = S::splat(*bias.add(t));
            let mut s = 0;
            while s < width(t, cols, causal) {
                let sum = S::add(S::load(x.row(t).add(s)), add);
                S::store(x.row(t).add(s), S::mul(sum, S::load(d.row(t).add(s))));
                s += S::W;
            }
        }
    }
}

/// `out[t] = x[t] . y[t]`; `y.ld` may be 0.
#[inline(always)]
pub(crate) unsafe fn row_dots<S: Simd>(
    x: Mat<S::T>,
    y: Mat<S::T>,
    (rows, cols): (usize, usize),
    out: *mut S::T,
) {
    for t in 0..rows {
        // SAFETY: the contract above.
        unsafe {
            let mut sum = [S::splat(S::T::ZERO); 2];
            let mut j = 0;
            while j < cols {
                let which = j / S::W % 2;
                let (xv, yv) = (S::load(x.row(t).add(j)), S::load(y.row(t).add(j)));
                sum[which] = S::fma(xv, yv, sum[which]);
                j += S::W;
            }
            *out.add(t) = S::sum(S::add(sum[0], sum[1]));
        }
    }
}

/// `x[t] = factor[t] * (x[t] + weight[t] * vector)`; a null `weight` is all ones, a null `vector`
/// all zeros.
#[inline(always)]
pub(crate) unsafe fn affine_rows<S: Simd>(
    x: Mat<S::T>,
    (rows, cols): (usize, usize),
    factor: *const S::T,
    weight: *const S::T,
    vector: *const S::T,
) {
    for t in 0..rows {
        // SAFETY: the contract above.
        unsafe {
            let scale = S::splat(*factor.add(t));
            let w = S::splat(if weight.is_null() { S::T::ONE } else { *weight.add(t) });
            let mut j = 0;
            while j < cols {
                let mut value = S::load(x.row(t).add(j));
                if !vector.is_null() {
                    value = S::fma(w, S::load(vector.add(j)), value);
                }
                S::store(x.row(t).add(j), S::mul(scale, value));
                j += S::W;
            }
        }
    }
}

/// `out = beta * old + sum over t of weight[t] * x[t]`; a null `weight` is all ones, `old` is not
/// read if `beta` is 0 and may be `out`.
#[inline(always)]
pub(crate) unsafe fn column_sums<S: Simd>(
    x: Mat<S::T>,
    (rows, cols): (usize, usize),
    weight: *const S::T,
    beta: S::T,
    old: *const S::T,
    out: *mut S::T,
) {
    let mut j = 0;
    while j < cols {
        // SAFETY: the contract above.
        unsafe {
            let mut sum = S::splat(S::T::ZERO);
            if beta != S::T::ZERO {
                sum = S::mul(S::splat(beta), S::load(old.add(j)));
            }
            for t in 0..rows {
                let w = S::splat(if weight.is_null() { S::T::ONE } else { *weight.add(t) });
                sum = S::fma(w, S::load(x.row(t).add(j)), sum);
            }
            S::store(out.add(j), sum);
        }
        j += S::W;
    }
}

/// Sum of all products `x * y`, rows added in float64.
#[inline(always)]
pub(crate) unsafe fn dot<S: Simd>(x: Mat<S::T>, y: Mat<S::T>, (rows, cols): (usize, usize)) -> f64 {
    let mut total = 0.0;
    for t in 0..rows {
        let mut sum = S::T::ZERO;
        // SAFETY: the contract above.
        unsafe { row_dots::<S>(x.below(t), y.below(t), (1, cols), &raw mut sum) };
        total += sum.to_f64();
    }
    total
}
