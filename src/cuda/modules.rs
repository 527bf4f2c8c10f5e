//! The compiled kernels, embedded by `kernels/build.rs`.

/// Fatbins are read in place by the driver, which wants them aligned.
#[repr(align(64))]
pub(super) struct Aligned<T: ?Sized>(pub(super) T);

/// One fatbin: a .cu file for all architectures.
pub(super) struct Image {
    pub(super) name: &'static str,
    /// Is for backwards alone.
    pub(super) backward: bool,
    /// Holds code for compute capability 9.0 alone.
    pub(super) hopper_only: bool,
    pub(super) code: &'static Aligned<[u8]>,
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
