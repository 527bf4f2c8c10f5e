//! The SIMD surface: what a kernel body may ask of a vector, and the portable implementation.
//! Bodies are `#[inline(always)]` and generic over [`Simd`]; `table.rs` instantiates each one
//! inside a function with the level's target features.

use super::real::Real;

/// Every padded row in scratch memory has a multiple of this many elements, a whole number of
/// vectors at every level, so that kernels have no column tails.
pub(crate) const LANES: usize = 16;

/// Vectors of one level and element type.
///
/// # Safety
/// All functions require that the CPU has the level's instructions; loads and stores require
/// [`Simd::W`] valid elements (of the named storage type), unaligned.
#[allow(clippy::missing_safety_doc, reason = "stated once for the trait")]
pub(crate) trait Simd: 'static {
    type T: Real;
    type V: Copy;
    /// Elements per vector.
    const W: usize;
    /// Rows of the GEMM micro-kernel, and its vectors per row: accumulators fill the register file.
    const MR: usize;
    const NR: usize;

    unsafe fn splat(x: Self::T) -> Self::V;
    unsafe fn load(p: *const Self::T) -> Self::V;
    unsafe fn store(p: *mut Self::T, v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, fused where the level can.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Sum of the lanes, in an order fixed by the level.
    unsafe fn sum(v: Self::V) -> Self::T;
    /// `exp(x)` for x <= 0 to 2 ulp; results below the smallest normal number become 0.
    unsafe fn exp(x: Self::V) -> Self::V;

    unsafe fn load_bf16(p: *const u16) -> Self::V;
    unsafe fn store_bf16(p: *mut u16, v: Self::V);
    unsafe fn load_f16(p: *const u16) -> Self::V;
    unsafe fn store_f16(p: *mut u16, v: Self::V);

    /// Asks for the cache line at `p`, which need not be valid.
    #[inline(always)]
    fn prefetch(_p: *const u8) {}

    /// Side of the square that [`Simd::transpose`] handles.
    const SQUARE: usize;
    /// Transposes one square; `dst` must not overlap `src`.
    unsafe fn transpose(src: *const Self::T, lds: usize, dst: *mut Self::T, ldd: usize);
}

/// Baseline of the target, on arrays the compiler keeps in vector registers.
pub(crate) struct Portable<T>(std::marker::PhantomData<T>);

/// Constants of the float32 exponential: argument reduction by powers of two (ln 2 in two parts)
/// and the minimax polynomial of Cephes' `expf`.
pub(crate) mod exp32 {
    /// Below this the result is not a normal number.
    pub(crate) const LOWEST: f32 = -87.336_54;
    pub(crate) const LOG2E: f32 = std::f32::consts::LOG2_E;
    /// 1.5 * 2^23: adding it rounds to an integer, which the low mantissa bits then hold.
    pub(crate) const ROUND: f32 = 12_582_912.0;
    pub(crate) const LN2_HIGH: f32 = 0.693_359_4;
    pub(crate) const LN2_LOW: f32 = -2.121_944_4e-4;
    pub(crate) const POLY: [f32; 6] =
        [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5];
}

fn exp_f32(x: f32) -> f32 {
    use exp32::*;
    let clamped = if x < LOWEST { LOWEST } else { x };
    let rounded = clamped * LOG2E + ROUND;
    let n = rounded - ROUND;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    let mut y = POLY[0];
    for &c in &POLY[1..] {
        y = y * r + c;
    }
    let y = (y * (r * r) + r) + 1.0;
    let scale = f32::from_bits((rounded.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    if x < LOWEST { 0.0 } else { y * scale }
}

macro_rules! portable {
    ($T:ty, $W:literal, $exp:path) => {
        #[allow(clippy::undocumented_unsafe_blocks, reason = "one contract, the trait's")]
        impl Simd for Portable<$T> {
            type T = $T;
            type V = [$T; $W];
            const W: usize = $W;
            // 32 registers on aarch64, 16 on x86-64.
            const MR: usize = if cfg!(target_arch = "aarch64") { 6 } else { 4 };
            const NR: usize = if cfg!(target_arch = "aarch64") { 4 } else { 2 };

            #[inline(always)]
            unsafe fn splat(x: $T) -> Self::V {
                [x; $W]
            }
            #[inline(always)]
            unsafe fn load(p: *const $T) -> Self::V {
                unsafe { p.cast::<Self::V>().read_unaligned() }
            }
            #[inline(always)]
            unsafe fn store(p: *mut $T, v: Self::V) {
                unsafe { p.cast::<Self::V>().write_unaligned(v) }
            }
            #[inline(always)]
            unsafe fn add(mut a: Self::V, b: Self::V) -> Self::V {
                for lane in 0..$W {
                    a[lane] += b[lane];
                }
                a
            }
            #[inline(always)]
            unsafe fn mul(mut a: Self::V, b: Self::V) -> Self::V {
                for lane in 0..$W {
                    a[lane] *= b[lane];
                }
                a
            }
            #[inline(always)]
            unsafe fn fma(a: Self::V, b: Self::V, mut c: Self::V) -> Self::V {
                for lane in 0..$W {
                    c[lane] = if cfg!(target_arch = "aarch64") {
                        a[lane].mul_add(b[lane], c[lane])
                    } else {
                        a[lane] * b[lane] + c[lane]
                    };
                }
                c
            }
            #[inline(always)]
            unsafe fn sum(v: Self::V) -> $T {
                v.iter().sum()
            }
            #[inline(always)]
            unsafe fn exp(mut x: Self::V) -> Self::V {
                for lane in 0..$W {
                    x[lane] = $exp(x[lane]);
                }
                x
            }
            #[inline(always)]
            unsafe fn load_bf16(p: *const u16) -> Self::V {
                let mut v = [0.0; $W];
                for lane in 0..$W {
                    v[lane] = half::bf16::from_bits(unsafe { *p.add(lane) }).to_f32() as $T;
                }
                v
            }
            #[inline(always)]
            unsafe fn store_bf16(p: *mut u16, v: Self::V) {
                for lane in 0..$W {
                    unsafe { *p.add(lane) = half::bf16::from_f32(v[lane] as f32).to_bits() };
                }
            }
            #[inline(always)]
            unsafe fn load_f16(p: *const u16) -> Self::V {
                let mut v = [0.0; $W];
                for lane in 0..$W {
                    v[lane] = half::f16::from_bits(unsafe { *p.add(lane) }).to_f32_const() as $T;
                }
                v
            }
            #[inline(always)]
            unsafe fn store_f16(p: *mut u16, v: Self::V) {
                for lane in 0..$W {
                    unsafe { *p.add(lane) = half::f16::from_f32_const(v[lane] as f32).to_bits() };
                }
            }
            const SQUARE: usize = 4;
            #[inline(always)]
            unsafe fn transpose(src: *const $T, lds: usize, dst: *mut $T, ldd: usize) {
                for row in 0..4 {
                    for col in 0..4 {
                        unsafe { *dst.add(col * ldd + row) = *src.add(row * lds + col) };
                    }
                }
            }
        }
    };
}
portable!(f32, 4, exp_f32);
portable!(f64, 2, f64::exp);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn portable_exp_is_accurate_and_zero_at_minus_infinity() {
        let mut worst = 0.0f64;
        for step in 0..200_000 {
            let x = -87.3 * step as f32 / 200_000.0;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp_f32(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.5e-7, "{worst}");
        assert_eq!(exp_f32(0.0), 1.0);
        assert_eq!(exp_f32(f32::NEG_INFINITY), 0.0);
        assert!(exp_f32(f32::NAN).is_nan());
    }
}
