//! The vector kernels themselves, at every level.

use super::harness::Random;
use crate::cpu::layout::leading;
use crate::cpu::level::Level;
use crate::cpu::table::{Compute, Left};
use crate::cpu::vecops::{Mat, Rows, padded};
use crate::tensor::DType;

/// A padded matrix: normal numbers, zeros in the padding.
struct Matrix<T> {
    data: Vec<T>,
    ld: usize,
}

impl<T: Compute> Matrix<T> {
    fn new(rows: usize, cols: usize, random: &Random) -> Self {
        let ld = leading(cols);
        let mut data = vec![T::ZERO; rows.max(1) * ld];
        for row in 0..rows {
            for col in 0..cols {
                data[row * ld + col] = T::from_f64(random.normal());
            }
        }
        Self { data, ld }
    }

    fn mat(&mut self) -> Mat<T> {
        Mat { p: self.data.as_mut_ptr(), ld: self.ld }
    }

    fn at(&self, row: usize, col: usize) -> f64 {
        self.data[row * self.ld + col].to_f64()
    }
}

fn products<T: Compute>(tolerance: f64) {
    let random = Random::new();
    for &level in Level::available() {
        let kernels = T::kernels(level);
        for _ in 0..60 {
            let (m, n, k) = (random.below(20), 1 + random.below(90), random.below(300));
            let transposed = random.below(2) == 0;
            let mut a = if transposed {
                Matrix::<T>::new(k, m.max(1), &random)
            } else {
                Matrix::new(m, k.max(1), &random)
            };
            let mut b = Matrix::new(k, n, &random);
            let mut out = Matrix::new(m, n, &random);
            let old = out.data.clone();
            let beta = random.pick(&[0.0, 1.0, -0.5]);
            let left = if transposed { Left::transposed(a.mat()) } else { Left::plain(a.mat()) };
            let size = (m, padded(n), k);
            // SAFETY: the matrices have these sizes.
            unsafe { kernels.multiply(left, b.mat(), size, T::from_f64(beta), out.mat()) };
            for row in 0..m {
                for col in 0..n {
                    let product: f64 = (0..k)
                        .map(|x| {
                            let a = if transposed { a.at(x, row) } else { a.at(row, x) };
                            a * b.at(x, col)
                        })
                        .sum();
                    let expected = beta * old[row * out.ld + col].to_f64() + product;
                    let error = (out.at(row, col) - expected).abs();
                    assert!(error <= tolerance, "{level:?} {m} {n} {k}: {error}");
                }
            }
        }
    }
}

#[test]
fn products_of_any_size_are_right() {
    products::<f32>(1e-4);
    products::<f64>(1e-12);
}

#[test]
fn transposing_moves_every_element_and_pads_with_zeros() {
    let random = Random::new();
    for &level in Level::available() {
        let kernels = f32::kernels(level);
        for _ in 0..20 {
            let (rows, cols) = (1 + random.below(64), 1 + random.below(64));
            let mut from = Matrix::<f32>::new(rows, cols, &random);
            let mut to = Matrix::<f32>::new(padded(cols), padded(rows), &random);
            to.data.fill(f32::NAN);
            // SAFETY: the matrices have these sizes.
            unsafe { (kernels.transpose)(from.mat(), (rows, padded(cols)), to.mat()) };
            for col in 0..cols {
                for row in 0..padded(rows) {
                    let expected = if row < rows { from.at(row, col) } else { 0.0 };
                    assert_eq!(to.at(col, row), expected, "{level:?} {rows} x {cols}");
                }
            }
        }
    }
}

#[test]
fn exponentials_are_accurate_and_zero_at_minus_infinity() {
    for &level in Level::available() {
        let mut x: Vec<f32> = (0..4096).map(|step| -87.0 * step as f32 / 4096.0).collect();
        x.extend([f32::NEG_INFINITY, -1000.0, -88.0, 0.0, -0.0, -1e30, f32::NAN, -1e-30]);
        x.extend([0.0; 8]);
        let inputs = x.clone();
        // SAFETY: a whole number of vectors.
        unsafe { (f32::kernels(level).exp)(x.as_mut_ptr(), x.len()) };
        for (&x, &y) in inputs.iter().zip(&x) {
            let exact = f64::from(x).exp();
            if x.is_nan() {
                assert!(y.is_nan(), "{level:?}");
            } else if x < -87.5 {
                assert_eq!(y, 0.0, "{level:?} {x}");
            } else {
                let error = (f64::from(y) - exact).abs() / exact;
                assert!(error < 2.4e-7, "{level:?} exp({x}): {error:.1e}");
            }
        }
    }
}

#[test]
fn sixteen_bit_types_round_to_nearest_even() {
    let random = Random::new();
    // Ties, overflow, infinities, NaN, subnormal numbers, and whatever else there is.
    let mut values = vec![
        1.0 + f32::powi(2.0, -8),
        1.0 + 3.0 * f32::powi(2.0, -8),
        1.0 + f32::powi(2.0, -11),
        65504.0,
        65519.0,
        65520.0,
        3.4e38,
        f32::MAX,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        6e-8,
        -1e-40,
        0.0,
        -0.0,
    ];
    values.extend((0..1000).map(|_| f32::from_bits(random.bits() as u32)));
    for &level in Level::available() {
        let kernels = f32::kernels(level);
        for dtype in [DType::Bf16, DType::F16] {
            for len in [1, 3, 16, 17, values.len()] {
                let mut row = values[..len].to_vec();
                row.resize(padded(len), 0.0);
                let mut out = vec![0u16; len + 1];
                out[len] = 0xabcd;
                let rows = Rows { p: out.as_mut_ptr().cast(), stride: 0 };
                let mat = Mat { p: row.as_mut_ptr(), ld: row.len() };
                let null = std::ptr::null();
                // SAFETY: one row of `len` elements on both sides.
                unsafe { kernels.store(dtype)(mat, (1, len), null, 1.0, rows) };
                assert_eq!(out[len], 0xabcd, "{level:?} wrote beyond the row");
                for (&x, &bits) in values.iter().zip(&out[..len]) {
                    let (got, expected) = match dtype {
                        DType::Bf16 => {
                            (half::bf16::from_bits(bits).to_f32(), half::bf16::from_f32(x).to_f32())
                        }
                        _ => (half::f16::from_bits(bits).to_f32(), half::f16::from_f32(x).to_f32()),
                    };
                    let equal = got == expected || (got.is_nan() && expected.is_nan());
                    assert!(equal, "{level:?} {dtype}: {x:e} became {got:e}, not {expected:e}");
                }
                // SAFETY: as above.
                unsafe { kernels.load(dtype)(rows, (1, len), null, 1.0, mat) };
                for (&x, &bits) in row.iter().zip(&out[..len]) {
                    let expected = match dtype {
                        DType::Bf16 => half::bf16::from_bits(bits).to_f32(),
                        _ => half::f16::from_bits(bits).to_f32(),
                    };
                    assert!(x == expected || (x.is_nan() && expected.is_nan()), "{level:?} {x}");
                }
            }
        }
    }
}
