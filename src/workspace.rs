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

/// The caller's memory.
#[derive(Debug, Clone, Copy)]
pub struct Workspace {
    pub(crate) data: *mut u8,
    pub(crate) len: usize,
}

impl Workspace {
    /// Checks size and alignment against what the plan needs.
    pub(crate) fn check(&self, needed: usize) -> Result<()> {
        if needed == 0 {
            return Ok(());
        }
        if self.data.is_null() {
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
