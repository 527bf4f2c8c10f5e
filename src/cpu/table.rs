//! One table of vector kernels per level and compute type, the only way to reach them: each entry
//! is a generic body compiled with the level's instructions.

use super::codec::{Bf16, F16, Native};
use super::gemm::Gemm;
use super::level::Level;
use super::real::Real;
use super::step_tile::StepTile;
use super::vecops::{Mat, Rows};
use crate::tensor::DType;

type Size = (usize, usize);
type LoadFn<T> = unsafe fn(Rows, Size, *const T, T, Mat<T>);
type StoreFn<T> = unsafe fn(Mat<T>, Size, *const T, T, Rows);
type StepFn<T> = unsafe fn(&StepTile<T>);

/// The kernels; see `vecops.rs`, `gemm.rs` and `step_tile.rs` for what each does and requires.
/// A table exists for available levels only, so the instructions are always there.
#[allow(missing_docs, reason = "documented at the bodies")]
pub(crate) struct Kernels<T: 'static> {
    pub gemm: unsafe fn(&Gemm<T>),
    pub transpose: unsafe fn(Mat<T>, Size, Mat<T>),
    pub exp: unsafe fn(*mut T, usize),
    pub decay_tile: unsafe fn(*const T, *const T, usize, Mat<T>),
    pub outer: unsafe fn(*const T, *const T, Size, Mat<T>),
    pub hadamard: unsafe fn(Mat<T>, Mat<T>, Size, bool, *mut T),
    pub biased_hadamard: unsafe fn(Mat<T>, Mat<T>, Size, bool, *const T),
    pub row_dots: unsafe fn(Mat<T>, Mat<T>, Size, *mut T),
    pub affine_rows: unsafe fn(Mat<T>, Size, *const T, *const T, *const T),
    pub column_sums: unsafe fn(Mat<T>, Size, *const T, T, *const T, *mut T),
    pub dot: unsafe fn(Mat<T>, Mat<T>, Size) -> f64,
    load: [LoadFn<T>; 3],
    store: [StoreFn<T>; 3],
    step_tile: [StepFn<T>; 3],
}

const fn codec(dtype: DType) -> usize {
    match dtype {
        DType::Bf16 => 1,
        DType::F16 => 2,
        _ => 0,
    }
}

impl<T: 'static> Kernels<T> {
    /// The reader of rows of this dtype.
    pub(crate) fn load(&self, dtype: DType) -> LoadFn<T> {
        self.load[codec(dtype)]
    }
    /// The writer of rows of this dtype.
    pub(crate) fn store(&self, dtype: DType) -> StoreFn<T> {
        self.store[codec(dtype)]
    }
    /// The step on states of this dtype.
    pub(crate) fn step_tile(&self, dtype: DType) -> StepFn<T> {
        self.step_tile[codec(dtype)]
    }
}

/// The left side of a product, read by elements: a matrix or its transpose.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Left<T> {
    p: *const T,
    row: usize,
    inner: usize,
}

impl<T> Left<T> {
    /// The matrix itself.
    pub(crate) fn plain(x: Mat<T>) -> Self {
        Self { p: x.p, row: x.ld, inner: 1 }
    }

    /// Its transpose.
    pub(crate) fn transposed(x: Mat<T>) -> Self {
        Self { p: x.p, row: 1, inner: x.ld }
    }
}

impl<T: Real> Kernels<T> {
    /// `out = beta * out + A B` for m x n x k, n padded.
    ///
    /// # Safety
    /// As `gemm.rs`.
    pub(crate) unsafe fn multiply(
        &self,
        a: Left<T>,
        b: Mat<T>,
        (m, n, k): (usize, usize, usize),
        beta: T,
        out: Mat<T>,
    ) {
        let product = Gemm {
            m,
            n,
            k,
            a: a.p,
            a_row: a.row,
            a_inner: a.inner,
            b: b.p,
            b_row: b.ld,
            beta,
            cin: out.p,
            cin_row: out.ld,
            out: out.p,
            out_row: out.ld,
        };
        // SAFETY: the caller's contract.
        unsafe { (self.gemm)(&product) }
    }
}

/// Compute types with kernels.
pub(crate) trait Compute: Real {
    /// The level's table.
    fn kernels(level: Level) -> &'static Kernels<Self>;
}

/// Defines `$entry` as `$body` compiled with the features.
macro_rules! entries {
    ($S:ty, [$($feature:literal)?],
     $($entry:ident = $body:path : ($($arg:ident : $ty:ty),*) $(-> $out:ty)?;)*) => {
        entries!(@each [$($feature)?] $({$entry, [$body], ($($arg: $ty),*), [$($out)?]})*);
    };
    (@each [$($feature:literal)?]) => {};
    (@each [] {$entry:ident, [$body:path], ($($arg:ident : $ty:ty),*), [$($out:ty)?]} $($rest:tt)*) => {
        unsafe fn $entry($($arg: $ty),*) $(-> $out)? {
            // SAFETY: the caller's contract is the body's.
            unsafe { $body($($arg),*) }
        }
        entries!(@each [] $($rest)*);
    };
    (@each [$feature:literal] {$entry:ident, [$body:path], ($($arg:ident : $ty:ty),*), [$($out:ty)?]}
     $($rest:tt)*) => {
        #[target_feature(enable = $feature)]
        unsafe fn $entry($($arg: $ty),*) $(-> $out)? {
            // SAFETY: the caller's contract is the body's.
            unsafe { $body($($arg),*) }
        }
        entries!(@each [$feature] $($rest)*);
    };
}

macro_rules! table {
    ($name:ident, $T:ty, $S:ty, [$($feature:literal)?]) => {
        mod $name {
            use super::*;
            use crate::cpu::{gemm, step_tile as step, vecops};
            type T = $T;
            type S = $S;
            entries! { S, [$($feature)?],
                gemm_ = gemm::gemm::<S>: (g: &Gemm<T>);
                transpose = vecops::transpose::<S>: (src: Mat<T>, size: Size, dst: Mat<T>);
                exp = vecops::exp::<S>: (x: *mut T, len: usize);
                decay_tile = vecops::decay_tile::<S>:
                    (step: *const T, source: *const T, rows: usize, d: Mat<T>);
                outer = vecops::outer::<S>: (row: *const T, col: *const T, size: Size, d: Mat<T>);
                hadamard = vecops::hadamard::<S>:
                    (x: Mat<T>, d: Mat<T>, size: Size, causal: bool, sums: *mut T);
                biased_hadamard = vecops::biased_hadamard::<S>:
                    (x: Mat<T>, d: Mat<T>, size: Size, causal: bool, bias: *const T);
                row_dots = vecops::row_dots::<S>: (x: Mat<T>, y: Mat<T>, size: Size, out: *mut T);
                affine_rows = vecops::affine_rows::<S>:
                    (x: Mat<T>, size: Size, factor: *const T, weight: *const T, vector: *const T);
                column_sums = vecops::column_sums::<S>:
                    (x: Mat<T>, size: Size, weight: *const T, beta: T, old: *const T, out: *mut T);
                dot = vecops::dot::<S>: (x: Mat<T>, y: Mat<T>, size: Size) -> f64;
                load = vecops::load::<S, Native>:
                    (src: Rows, size: Size, row_scale: *const T, scale: T, dst: Mat<T>);
                load_bf16 = vecops::load::<S, Bf16>:
                    (src: Rows, size: Size, row_scale: *const T, scale: T, dst: Mat<T>);
                load_f16 = vecops::load::<S, F16>:
                    (src: Rows, size: Size, row_scale: *const T, scale: T, dst: Mat<T>);
                store = vecops::store::<S, Native>:
                    (src: Mat<T>, size: Size, row_scale: *const T, scale: T, dst: Rows);
                store_bf16 = vecops::store::<S, Bf16>:
                    (src: Mat<T>, size: Size, row_scale: *const T, scale: T, dst: Rows);
                store_f16 = vecops::store::<S, F16>:
                    (src: Mat<T>, size: Size, row_scale: *const T, scale: T, dst: Rows);
                step_tile = step::step_tile::<S, Native>: (tile: &StepTile<T>);
                step_tile_bf16 = step::step_tile::<S, Bf16>: (tile: &StepTile<T>);
                step_tile_f16 = step::step_tile::<S, F16>: (tile: &StepTile<T>);
            }
            pub(super) static TABLE: Kernels<T> = Kernels {
                gemm: gemm_,
                transpose,
                exp,
                decay_tile,
                outer,
                hadamard,
                biased_hadamard,
                row_dots,
                affine_rows,
                column_sums,
                dot,
                load: [load, load_bf16, load_f16],
                store: [store, store_bf16, store_f16],
                step_tile: [step_tile, step_tile_bf16, step_tile_f16],
            };
        }
    };
}

// On aarch64 the portable bodies compile to NEON with fused multiply-adds, the target's baseline.
table!(portable_f32, f32, crate::cpu::simd::Portable<f32>, []);
table!(portable_f64, f64, crate::cpu::simd::Portable<f64>, []);
#[cfg(target_arch = "x86_64")]
table!(avx2_f32, f32, crate::cpu::simd_x86::Avx2<f32>, ["avx2,fma,f16c"]);
#[cfg(target_arch = "x86_64")]
table!(avx2_f64, f64, crate::cpu::simd_x86::Avx2<f64>, ["avx2,fma,f16c"]);
#[cfg(target_arch = "x86_64")]
table!(
    avx512_f32,
    f32,
    crate::cpu::simd_x86::Avx512<f32>,
    ["avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"]
);
#[cfg(target_arch = "x86_64")]
table!(
    avx512_f64,
    f64,
    crate::cpu::simd_x86::Avx512<f64>,
    ["avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"]
);

macro_rules! compute {
    ($T:ty, $portable:ident, $avx2:ident, $avx512:ident) => {
        impl Compute for $T {
            fn kernels(level: Level) -> &'static Kernels<$T> {
                match level {
                    Level::Scalar => &$portable::TABLE,
                    #[cfg(target_arch = "aarch64")]
                    Level::Neon => &$portable::TABLE,
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx2 => &$avx2::TABLE,
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx512 => &$avx512::TABLE,
                }
            }
        }
    };
}
compute!(f32, portable_f32, avx2_f32, avx512_f32);
compute!(f64, portable_f64, avx2_f64, avx512_f64);
