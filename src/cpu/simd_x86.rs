//! AVX2 and AVX-512 vectors.
#![allow(clippy::needless_range_loop, reason = "indices run over registers, and are unrolled")]
#![allow(clippy::undocumented_unsafe_blocks, reason = "one contract, that of the Simd trait")]

use std::arch::x86_64::*;

use super::simd::{Simd, exp32};

/// AVX2 with FMA and F16C, by element type.
pub(crate) struct Avx2<T>(std::marker::PhantomData<T>);
/// AVX-512, by element type.
pub(crate) struct Avx512<T>(std::marker::PhantomData<T>);

impl Simd for Avx512<f32> {
    type T = f32;
    type V = __m512;
    const W: usize = 16;
    const MR: usize = 6;
    const NR: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn sum(v: __m512) -> f32 {
        unsafe { _mm512_reduce_add_ps(v) }
    }
    #[inline(always)]
    unsafe fn exp(x: __m512) -> __m512 {
        unsafe {
            let lowest = _mm512_set1_ps(exp32::LOWEST);
            let normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, lowest);
            // The second operand is returned when either is NaN.
            let clamped = _mm512_max_ps(lowest, x);
            let round = _mm512_set1_ps(exp32::ROUND);
            let rounded = _mm512_fmadd_ps(clamped, _mm512_set1_ps(exp32::LOG2E), round);
            let n = _mm512_sub_ps(rounded, round);
            let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(exp32::LN2_HIGH), clamped);
            let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(exp32::LN2_LOW), r);
            let mut y = _mm512_set1_ps(exp32::POLY[0]);
            for c in &exp32::POLY[1..] {
                y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(*c));
            }
            let y = _mm512_fmadd_ps(y, _mm512_mul_ps(r, r), r);
            let y = _mm512_add_ps(y, _mm512_set1_ps(1.0));
            let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(rounded));
            let one = _mm512_castps_si512(_mm512_set1_ps(1.0));
            let scale = _mm512_castsi512_ps(_mm512_add_epi32(exponent, one));
            _mm512_maskz_mul_ps(normal, y, scale)
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m512 {
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: __m512) {
        unsafe {
            let bits = _mm512_castps_si512(v);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, bias));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            let quiet = _mm512_set1_epi32(0x7fc0);
            let rounded = _mm512_mask_mov_epi32(rounded, nan, quiet);
            _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(rounded));
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, v: __m512) {
        unsafe {
            let half = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
            _mm256_storeu_si256(p.cast(), half);
        }
    }
    #[inline(always)]
    fn prefetch(p: *const u8) {
        // SAFETY: a hint; SSE is the baseline.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    const SQUARE: usize = 16;
    #[inline(always)]
    unsafe fn transpose(src: *const f32, lds: usize, dst: *mut f32, ldd: usize) {
        unsafe {
            let zero = _mm512_setzero_ps();
            let (mut r, mut t) = ([zero; 16], [zero; 16]);
            for i in 0..16 {
                r[i] = _mm512_loadu_ps(src.add(i * lds));
            }
            for i in 0..8 {
                t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            // r[4g + c]: 128-bit lane l holds column 4l + c of rows 4g to 4g + 3.
            for g in 0..4 {
                r[4 * g] = _mm512_shuffle_ps::<0x44>(t[4 * g], t[4 * g + 2]);
                r[4 * g + 1] = _mm512_shuffle_ps::<0xee>(t[4 * g], t[4 * g + 2]);
                r[4 * g + 2] = _mm512_shuffle_ps::<0x44>(t[4 * g + 1], t[4 * g + 3]);
                r[4 * g + 3] = _mm512_shuffle_ps::<0xee>(t[4 * g + 1], t[4 * g + 3]);
            }
            for c in 0..4 {
                let even_low = _mm512_shuffle_f32x4::<0x88>(r[c], r[4 + c]);
                let even_high = _mm512_shuffle_f32x4::<0x88>(r[8 + c], r[12 + c]);
                let odd_low = _mm512_shuffle_f32x4::<0xdd>(r[c], r[4 + c]);
                let odd_high = _mm512_shuffle_f32x4::<0xdd>(r[8 + c], r[12 + c]);
                r[c] = _mm512_shuffle_f32x4::<0x88>(even_low, even_high);
                r[4 + c] = _mm512_shuffle_f32x4::<0x88>(odd_low, odd_high);
                r[8 + c] = _mm512_shuffle_f32x4::<0xdd>(even_low, even_high);
                r[12 + c] = _mm512_shuffle_f32x4::<0xdd>(odd_low, odd_high);
            }
            for i in 0..16 {
                _mm512_storeu_ps(dst.add(i * ldd), r[i]);
            }
        }
    }
}

impl Simd for Avx2<f32> {
    type T = f32;
    type V = __m256;
    const W: usize = 8;
    const MR: usize = 6;
    const NR: usize = 2;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m256) {
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn sum(v: __m256) -> f32 {
        unsafe {
            let half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)))
        }
    }
    #[inline(always)]
    unsafe fn exp(x: __m256) -> __m256 {
        unsafe {
            let lowest = _mm256_set1_ps(exp32::LOWEST);
            let normal = _mm256_cmp_ps::<_CMP_NLT_UQ>(x, lowest);
            // The second operand is returned when either is NaN.
            let clamped = _mm256_max_ps(lowest, x);
            let round = _mm256_set1_ps(exp32::ROUND);
            let rounded = _mm256_fmadd_ps(clamped, _mm256_set1_ps(exp32::LOG2E), round);
            let n = _mm256_sub_ps(rounded, round);
            let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(exp32::LN2_HIGH), clamped);
            let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(exp32::LN2_LOW), r);
            let mut y = _mm256_set1_ps(exp32::POLY[0]);
            for c in &exp32::POLY[1..] {
                y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(*c));
            }
            let y = _mm256_fmadd_ps(y, _mm256_mul_ps(r, r), r);
            let y = _mm256_add_ps(y, _mm256_set1_ps(1.0));
            let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(rounded));
            let one = _mm256_castps_si256(_mm256_set1_ps(1.0));
            let scale = _mm256_castsi256_ps(_mm256_add_epi32(exponent, one));
            _mm256_and_ps(normal, _mm256_mul_ps(y, scale))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m256 {
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: __m256) {
        unsafe {
            let bits = _mm256_castps_si256(v);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
            let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, bias));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
            let rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
            let packed = _mm256_packus_epi32(rounded, rounded);
            let packed = _mm256_permute4x64_epi64::<0b1000>(packed);
            _mm_storeu_si128(p.cast(), _mm256_castsi256_si128(packed));
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, v: __m256) {
        unsafe {
            _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v));
        }
    }
    #[inline(always)]
    fn prefetch(p: *const u8) {
        // SAFETY: a hint; SSE is the baseline.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    const SQUARE: usize = 8;
    #[inline(always)]
    unsafe fn transpose(src: *const f32, lds: usize, dst: *mut f32, ldd: usize) {
        unsafe {
            let zero = _mm256_setzero_ps();
            let (mut r, mut t) = ([zero; 8], [zero; 8]);
            for i in 0..8 {
                r[i] = _mm256_loadu_ps(src.add(i * lds));
            }
            for i in 0..4 {
                t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            // r[4g + c]: 128-bit lane l holds column 4l + c of rows 4g to 4g + 3.
            for g in 0..2 {
                r[4 * g] = _mm256_shuffle_ps::<0x44>(t[4 * g], t[4 * g + 2]);
                r[4 * g + 1] = _mm256_shuffle_ps::<0xee>(t[4 * g], t[4 * g + 2]);
                r[4 * g + 2] = _mm256_shuffle_ps::<0x44>(t[4 * g + 1], t[4 * g + 3]);
                r[4 * g + 3] = _mm256_shuffle_ps::<0xee>(t[4 * g + 1], t[4 * g + 3]);
            }
            for c in 0..4 {
                let low = _mm256_permute2f128_ps::<0x20>(r[c], r[4 + c]);
                let high = _mm256_permute2f128_ps::<0x31>(r[c], r[4 + c]);
                _mm256_storeu_ps(dst.add(c * ldd), low);
                _mm256_storeu_ps(dst.add((4 + c) * ldd), high);
            }
        }
    }
}

/// float64 vectors; exp and the 16-bit storage types (which never meet float64) go by lanes.
macro_rules! f64_vectors {
    ($Level:ident, $V:ty, $W:literal, $MR:literal, $NR:literal, $set1:ident, $load:ident,
     $store:ident, $add:ident, $mul:ident, $fma:ident) => {
        impl Simd for $Level<f64> {
            type T = f64;
            type V = $V;
            const W: usize = $W;
            const MR: usize = $MR;
            const NR: usize = $NR;

            #[inline(always)]
            unsafe fn splat(x: f64) -> $V {
                unsafe { $set1(x) }
            }
            #[inline(always)]
            unsafe fn load(p: *const f64) -> $V {
                unsafe { $load(p) }
            }
            #[inline(always)]
            unsafe fn store(p: *mut f64, v: $V) {
                unsafe { $store(p, v) }
            }
            #[inline(always)]
            unsafe fn add(a: $V, b: $V) -> $V {
                unsafe { $add(a, b) }
            }
            #[inline(always)]
            unsafe fn mul(a: $V, b: $V) -> $V {
                unsafe { $mul(a, b) }
            }
            #[inline(always)]
            unsafe fn fma(a: $V, b: $V, c: $V) -> $V {
                unsafe { $fma(a, b, c) }
            }
            #[inline(always)]
            unsafe fn sum(v: $V) -> f64 {
                let mut lanes = [0.0; $W];
                unsafe { $store(lanes.as_mut_ptr(), v) };
                lanes.iter().sum()
            }
            #[inline(always)]
            unsafe fn exp(x: $V) -> $V {
                let mut lanes = [0.0; $W];
                unsafe { $store(lanes.as_mut_ptr(), x) };
                for lane in &mut lanes {
                    *lane = lane.exp();
                }
                unsafe { $load(lanes.as_ptr()) }
            }
            #[inline(always)]
            unsafe fn load_bf16(p: *const u16) -> $V {
                let mut lanes = [0.0; $W];
                for (i, lane) in lanes.iter_mut().enumerate() {
                    *lane = half::bf16::from_bits(unsafe { *p.add(i) }).to_f64();
                }
                unsafe { $load(lanes.as_ptr()) }
            }
            #[inline(always)]
            unsafe fn store_bf16(p: *mut u16, v: $V) {
                let mut lanes = [0.0; $W];
                unsafe { $store(lanes.as_mut_ptr(), v) };
                for (i, lane) in lanes.iter().enumerate() {
                    unsafe { *p.add(i) = half::bf16::from_f64(*lane).to_bits() };
                }
            }
            #[inline(always)]
            unsafe fn load_f16(p: *const u16) -> $V {
                let mut lanes = [0.0; $W];
                for (i, lane) in lanes.iter_mut().enumerate() {
                    *lane = half::f16::from_bits(unsafe { *p.add(i) }).to_f64();
                }
                unsafe { $load(lanes.as_ptr()) }
            }
            #[inline(always)]
            unsafe fn store_f16(p: *mut u16, v: $V) {
                let mut lanes = [0.0; $W];
                unsafe { $store(lanes.as_mut_ptr(), v) };
                for (i, lane) in lanes.iter().enumerate() {
                    unsafe { *p.add(i) = half::f16::from_f64(*lane).to_bits() };
                }
            }
            #[inline(always)]
            fn prefetch(p: *const u8) {
                // SAFETY: a hint; SSE is the baseline.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
            }
            const SQUARE: usize = 4;
            #[inline(always)]
            unsafe fn transpose(src: *const f64, lds: usize, dst: *mut f64, ldd: usize) {
                for row in 0..4 {
                    for col in 0..4 {
                        unsafe { *dst.add(col * ldd + row) = *src.add(row * lds + col) };
                    }
                }
            }
        }
    };
}
f64_vectors!(
    Avx512,
    __m512d,
    8,
    6,
    4,
    _mm512_set1_pd,
    _mm512_loadu_pd,
    _mm512_storeu_pd,
    _mm512_add_pd,
    _mm512_mul_pd,
    _mm512_fmadd_pd
);
f64_vectors!(
    Avx2,
    __m256d,
    4,
    6,
    2,
    _mm256_set1_pd,
    _mm256_loadu_pd,
    _mm256_storeu_pd,
    _mm256_add_pd,
    _mm256_mul_pd,
    _mm256_fmadd_pd
);
