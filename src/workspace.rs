//! Caller-owned scratch memory. A layout is written once, as calls to [`Carver::take`]; running it
//! gives both the size that `mlstm_query` reports and the offsets the kernels use.

use crate::error::{Error, Result};
use crate::tensor::{DType, View};

/// Alignment of the workspace and of every region in it: a cache line, and a 512-bit vector.
pub const ALIGNMENT: usize = 64;

/// A span of the workspace, in bytes from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Region {
    /// Multiple of [`ALIGNMENT`].
    pub offset: usize,
    /// Elements, of whatever type it was taken for.
    pub len: usize,
}

/// Hands out consecutive, aligned regions and counts their bytes.
#[derive(Debug, Default)]
pub struct Carver {
    bytes: usize,
    overflow: bool,
}

impl Carver {
    /// The next region of `len` elements of `T`.
    pub fn take<T>(&mut self, len: usize) -> Region {
        let offset = self.bytes;
        let end = len
            .checked_mul(size_of::<T>())
            .and_then(|bytes| bytes.checked_next_multiple_of(ALIGNMENT))
            .and_then(|bytes| bytes.checked_add(offset))
            .filter(|&end| end <= isize::MAX as usize);
        match end {
            Some(end) => self.bytes = end,
            None => self.overflow = true,
        }
        Region { offset, len }
    }

    /// Bytes of all regions.
    ///
    /// # Errors
    /// If they exceed the address space.
    pub fn total(&self) -> Result<usize> {
        if self.overflow {
            return Err(Error::invalid(
                "problem",
                "sizes whose workspace fits the address space",
                "a larger one",
            ));
        }
        Ok(self.bytes)
    }
}

/// The caller's `cudaStream_t`, null for the default stream; the CPU has none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stream(
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "CUDA's"))]
    pub(crate)  *mut std::ffi::c_void,
);

impl Stream {
    /// The default stream.
    pub(crate) const DEFAULT: Self = Self(std::ptr::null_mut());
}

/// The caller's memory.
#[derive(Debug, Clone, Copy)]
pub struct Workspace {
    pub(crate) data: *mut u8,
    pub(crate) len: usize,
}

impl Workspace {
    /// No memory at all.
    pub(crate) const NONE: Self = Self { data: std::ptr::null_mut(), len: 0 };

    /// Checks size and alignment against what the plan needs.
    pub(crate) fn check(&self, needed: usize) -> Result<()> {
        if needed == 0 {
            return Ok(());
        }
        // None at all is too small like any other: a query may have said so for aligned tensors.
        if self.data.is_null() && self.len > 0 {
            return Err(Error::invalid(
                "workspace",
                format!("{needed} bytes (ask mlstm_query)"),
                "null",
            ));
        }
        if self.len < needed {
            return Err(Error::WorkspaceTooSmall { expected: needed, got: self.len });
        }
        if !(self.data as usize).is_multiple_of(ALIGNMENT) {
            return Err(Error::invalid(
                "workspace",
                format!("an address that is a multiple of {ALIGNMENT}"),
                format!("{:#x}", self.data as usize),
            ));
        }
        Ok(())
    }

    /// Its first `needed` bytes as a view, for the overlap check.
    pub(crate) fn view(&self, needed: usize) -> View {
        let used = needed.min(self.len) as i64;
        let used = if self.data.is_null() { 0 } else { used };
        View {
            data: self.data,
            shape: [used, 0, 0, 0],
            stride: [1, 0, 0, 0],
            dtype: DType::U8,
            rank: 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        /// Regions are aligned, in order, apart, and within the total.
        #[test]
        fn regions_are_apart(lens in prop::collection::vec(0usize..300, 0..20)) {
            let mut carver = Carver::default();
            let mut end = 0;
            for (index, &len) in lens.iter().enumerate() {
                let (region, item) = match index % 3 {
                    0 => (carver.take::<u8>(len), 1),
                    1 => (carver.take::<f32>(len), 4),
                    _ => (carver.take::<f64>(len), 8),
                };
                prop_assert_eq!(region.len, len);
                prop_assert!(region.offset.is_multiple_of(ALIGNMENT) && region.offset >= end);
                end = region.offset + len * item;
            }
            let total = carver.total().unwrap();
            prop_assert!(total >= end && total - end < ALIGNMENT && total.is_multiple_of(ALIGNMENT));
        }
    }

    #[test]
    fn totals_beyond_the_address_space_are_errors() {
        for lens in [
            &[usize::MAX][..],
            &[usize::MAX / 8],
            &[1 << 60, 1 << 60, 1],
            &[isize::MAX as usize / 8 + 1],
        ] {
            let mut carver = Carver::default();
            lens.iter().for_each(|&len| _ = carver.take::<f64>(len));
            carver.take::<u8>(1);
            let error = carver.total().unwrap_err().to_string();
            assert!(error.starts_with("problem: expected "), "{error}");
        }
        let mut carver = Carver::default();
        carver.take::<f64>(isize::MAX as usize / 8 / 64 * 64);
        assert!(carver.total().is_ok());
    }

    #[test]
    fn memory_must_be_there_large_enough_and_aligned() {
        let at = |address: usize, len| Workspace { data: address as *mut u8, len };
        assert!(Workspace::NONE.check(0).is_ok());
        assert!(at(1, 0).check(0).is_ok());
        assert!(at(64, 10).check(10).is_ok());
        for (small, len) in [(at(64, 9), 9), (Workspace::NONE, 0)] {
            let error = small.check(10).unwrap_err();
            assert!(matches!(error, Error::WorkspaceTooSmall { expected: 10, got } if got == len));
        }
        for bad in [at(0, 100), at(32, 100)] {
            let error = bad.check(10).unwrap_err().to_string();
            assert!(error.starts_with("workspace: expected "), "{error}");
        }
    }

    #[test]
    fn only_the_needed_part_counts_as_used() {
        let workspace = Workspace { data: 64 as *mut u8, len: usize::MAX };
        assert_eq!(workspace.view(100).shape(), [100]);
        assert_eq!(Workspace { len: 7, ..workspace }.view(100).shape(), [7]);
        assert!(Workspace::NONE.view(100).is_empty());
    }
}
