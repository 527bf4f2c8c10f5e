//! Storage types of tensors, read into and written from vectors of the compute type.

use super::simd::Simd;

/// A storage type.
pub(crate) trait Codec: 'static {
    /// Bytes per element.
    fn size<S: Simd>() -> usize;
    /// # Safety
    /// `p` covers a vector of elements, and the CPU has the level's instructions.
    unsafe fn load<S: Simd>(p: *const u8) -> S::V;
    /// # Safety
    /// As [`Codec::load`].
    unsafe fn store<S: Simd>(p: *mut u8, v: S::V);
}

/// The compute type itself.
pub(crate) struct Native;
/// bfloat16.
pub(crate) struct Bf16;
/// IEEE binary16.
pub(crate) struct F16;

impl Codec for Native {
    #[inline(always)]
    fn size<S: Simd>() -> usize {
        size_of::<S::T>()
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::V {
        // SAFETY: the caller's contract.
        unsafe { S::load(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut u8, v: S::V) {
        // SAFETY: the caller's contract.
        unsafe { S::store(p.cast(), v) }
    }
}

impl Codec for Bf16 {
    #[inline(always)]
    fn size<S: Simd>() -> usize {
        2
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::V {
        // SAFETY: the caller's contract.
        unsafe { S::load_bf16(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut u8, v: S::V) {
        // SAFETY: the caller's contract.
        unsafe { S::store_bf16(p.cast(), v) }
    }
}

impl Codec for F16 {
    #[inline(always)]
    fn size<S: Simd>() -> usize {
        2
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::V {
        // SAFETY: the caller's contract.
        unsafe { S::load_f16(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut u8, v: S::V) {
        // SAFETY: the caller's contract.
        unsafe { S::store_f16(p.cast(), v) }
    }
}
