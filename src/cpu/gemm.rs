//! Small matrix products, `out = beta * cin + A B`.
//!
//! A is read one element at a time and may have any strides, so that A and A^T are the same to it;
//! B and the result are row-major with rows padded to whole vectors. Each element of the result is
//! one chain of multiply-adds over the inner dimension, whatever the blocking: slicing the columns
//! of a product over tasks does not change its bits. That, the causal shapes (16 rows and fewer at
//! a time) and `cin` apart from `out` are why this is not a general crate's: `gemm` 0.19 promises
//! none of them.
#![allow(clippy::needless_range_loop, reason = "indices run over registers, and are unrolled")]

use super::real::Real;
use super::simd::Simd;

/// Inner dimension of one pass: a panel of B of this many rows stays in the first-level cache.
const INNER: usize = 256;

/// One product.
pub(crate) struct Gemm<T> {
    /// Rows of A and of the result.
    pub m: usize,
    /// Columns of B and of the result, padded.
    pub n: usize,
    /// Inner dimension.
    pub k: usize,
    /// A's first element, the step to the next row and the step along the inner dimension.
    pub a: *const T,
    pub a_row: usize,
    pub a_inner: usize,
    pub b: *const T,
    pub b_row: usize,
    /// What is added; not read if `beta` is 0. May be `out` itself.
    pub beta: T,
    pub cin: *const T,
    pub cin_row: usize,
    pub out: *mut T,
    pub out_row: usize,
}

/// # Safety
/// The level's instructions are there, all pointers cover what `g` describes, `n` is a multiple of
/// the vector width, and `out` overlaps none of the inputs but for `cin` with equal strides.
#[inline(always)]
pub(crate) unsafe fn gemm<S: Simd>(g: &Gemm<S::T>) {
    let (mut beta, mut cin, mut cin_row) = (g.beta, g.cin, g.cin_row);
    let mut k0 = 0;
    loop {
        let k = (g.k - k0).min(INNER);
        let mut j = 0;
        while j < g.n {
            let vectors = ((g.n - j) / S::W).min(S::NR);
            let mut i = 0;
            while i < g.m {
                let rows = (g.m - i).min(S::MR);
                // SAFETY: the block lies within the matrices, by the loop bounds.
                unsafe {
                    let tile = Tile::<S::T> {
                        k,
                        a: g.a.add(i * g.a_row + k0 * g.a_inner),
                        a_row: g.a_row,
                        a_inner: g.a_inner,
                        b: g.b.add(k0 * g.b_row + j),
                        b_row: g.b_row,
                        beta,
                        cin: cin.wrapping_add(i * cin_row + j),
                        cin_row,
                        out: g.out.add(i * g.out_row + j),
                        out_row: g.out_row,
                    };
                    micro_any::<S>(rows, vectors, &tile);
                }
                i += rows;
            }
            j += vectors * S::W;
        }
        k0 += k;
        if k0 >= g.k {
            return;
        }
        (beta, cin, cin_row) = (S::T::ONE, g.out.cast_const(), g.out_row);
    }
}

/// One block of the result, held in registers.
struct Tile<T> {
    k: usize,
    a: *const T,
    a_row: usize,
    a_inner: usize,
    b: *const T,
    b_row: usize,
    beta: T,
    cin: *const T,
    cin_row: usize,
    out: *mut T,
    out_row: usize,
}

/// # Safety
/// As [`gemm`].
#[inline(always)]
unsafe fn micro_any<S: Simd>(rows: usize, vectors: usize, tile: &Tile<S::T>) {
    macro_rules! pick {
        ($(($rows:literal, $vectors:literal))*) => {
            match (rows, vectors) {
                // SAFETY: the caller's contract.
                $(($rows, $vectors) => unsafe { micro::<S, $rows, $vectors>(tile) },)*
                _ => unreachable!("no micro-kernel for {rows} rows of {vectors} vectors"),
            }
        };
    }
    if S::NR <= 2 {
        pick!((6, 2)(6, 1)(5, 2)(5, 1)(4, 2)(4, 1)(3, 2)(3, 1)(2, 2)(2, 1)(1, 2)(1, 1));
    } else {
        pick!(
            (6, 4)(6, 3)(6, 2)(6, 1)(5, 4)(5, 3)(5, 2)(5, 1)(4, 4)(4, 3)(4, 2)(4, 1)(3, 4)(3, 3)(
                3, 2
            )(3, 1)(2, 4)(2, 3)(2, 2)(2, 1)(1, 4)(1, 3)(1, 2)(1, 1)
        );
    }
}

/// # Safety
/// As [`gemm`].
#[inline(always)]
unsafe fn micro<S: Simd, const ROWS: usize, const VECTORS: usize>(t: &Tile<S::T>) {
    // SAFETY: the caller's contract.
    unsafe {
        let zero = S::splat(S::T::ZERO);
        let mut acc = [[zero; VECTORS]; ROWS];
        let (mut a, mut b) = (t.a, t.b);
        for _ in 0..t.k {
            let mut bv = [zero; VECTORS];
            for j in 0..VECTORS {
                bv[j] = S::load(b.add(j * S::W));
            }
            for i in 0..ROWS {
                let av = S::splat(*a.add(i * t.a_row));
                for j in 0..VECTORS {
                    acc[i][j] = S::fma(av, bv[j], acc[i][j]);
                }
            }
            a = a.wrapping_add(t.a_inner);
            b = b.wrapping_add(t.b_row);
        }
        if t.beta == S::T::ZERO {
            for i in 0..ROWS {
                for j in 0..VECTORS {
                    S::store(t.out.add(i * t.out_row + j * S::W), acc[i][j]);
                }
            }
        } else {
            let beta = S::splat(t.beta);
            for i in 0..ROWS {
                for j in 0..VECTORS {
                    let old = S::load(t.cin.add(i * t.cin_row + j * S::W));
                    S::store(t.out.add(i * t.out_row + j * S::W), S::fma(beta, old, acc[i][j]));
                }
            }
        }
    }
}
