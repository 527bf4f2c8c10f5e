//! Lanes: one head of one row or packed sequence, the unit that a recurrence runs along.

use super::vecops::Rows;
use crate::error::{Error, Result};
use crate::problem::Problem;
use crate::tensor::{DType, View};

/// One head of one sequence.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Lane {
    /// Index of the batch row that holds its tokens (0 with packed sequences).
    pub batch: usize,
    /// Index of its row in the state tensors.
    pub row: usize,
    pub head: usize,
    /// Its first token and their number.
    pub start: usize,
    pub len: usize,
    /// Its first token's place in the per-token vectors of the workspace.
    pub token: usize,
    /// Its first chunk's place in the per-chunk vectors of the workspace.
    pub chunk: usize,
}

/// All lanes of a problem.
#[derive(Clone, Copy)]
pub(crate) struct Lanes {
    nh: usize,
    s: usize,
    rows: usize,
    chunk_size: usize,
    chunks_per_head: usize,
    offsets: Option<View>,
}

impl Lanes {
    /// Checks the offsets' contents. `chunks_per_head` bounds the chunks of one head of a row.
    pub(crate) fn new(
        problem: &Problem,
        chunk_size: usize,
        chunks_per_head: usize,
        offsets: Option<View>,
    ) -> Result<Self> {
        let (nh, s) = (problem.nh as usize, problem.s as usize);
        let rows = problem.state_rows() as usize;
        if let Some(view) = &offsets {
            let mut last = 0;
            for index in 0..=rows {
                let offset = read_index(view, index);
                let valid = if index == 0 { offset == 0 } else { offset >= last };
                if !valid || offset > problem.s {
                    let wanted = if index == 0 {
                        "0".to_owned()
                    } else {
                        format!("{last} to {} (offsets never decrease, up to s)", problem.s)
                    };
                    return Err(Error::invalid(format!("cu_seqlens[{index}]"), wanted, offset));
                }
                last = offset;
            }
            if last != problem.s {
                return Err(Error::invalid(
                    format!("cu_seqlens[{rows}]"),
                    format!("{} (s)", problem.s),
                    last,
                ));
            }
        }
        Ok(Self { nh, s, rows, chunk_size, chunks_per_head, offsets })
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.rows * self.nh
    }

    /// The lane with this number.
    pub(crate) fn get(&self, index: usize) -> Lane {
        let (row, head) = (index / self.nh, index % self.nh);
        match &self.offsets {
            None => {
                let line = row * self.nh + head;
                Lane {
                    batch: row,
                    row,
                    head,
                    start: 0,
                    len: self.s,
                    token: line * self.s,
                    chunk: line * self.chunks_per_head,
                }
            }
            Some(view) => {
                let start = read_index(view, row) as usize;
                let end = read_index(view, row + 1) as usize;
                Lane {
                    batch: 0,
                    row,
                    head,
                    start,
                    len: end - start,
                    token: head * self.s + start,
                    // Earlier sequences have at most this many chunks: each adds one at most to
                    // the chunks of unbroken tokens.
                    chunk: head * self.chunks_per_head + start / self.chunk_size + row,
                }
            }
        }
    }
}

/// Address of an element: checks in `ops` keep indices within the view's memory.
fn element(view: &View, index: [usize; 3]) -> *mut u8 {
    let offset: i64 = index.iter().zip(view.stride).map(|(&i, stride)| i as i64 * stride).sum();
    view.data.wrapping_offset(offset as isize * view.dtype.size() as isize)
}

/// Rows of a (B, NH, S, D) tensor from a lane's token on.
pub(crate) fn token_rows(view: &View, lane: &Lane, token: usize) -> Rows {
    let p = element(view, [lane.batch, lane.head, lane.start + token]);
    Rows { p, stride: view.stride[2] as isize }
}

/// Rows of a lane's state C (R, NH, DHQK, DHHV), from a row and column on; of n (R, NH, DHQK) as
/// one row, from a column on.
pub(crate) fn state_rows(view: &View, lane: &Lane, row: usize, col: usize) -> Rows {
    state_rows_at(view, lane.row, lane.head, row, col)
}

/// As [`state_rows`], by row and head.
pub(crate) fn state_rows_at(
    view: &View,
    index: usize,
    head: usize,
    row: usize,
    col: usize,
) -> Rows {
    let size = view.dtype.size();
    let p = element(view, [index, head, row]);
    if view.rank == 3 {
        debug_assert_eq!(row, 0);
        return Rows { p: p.wrapping_add(col * size), stride: 0 };
    }
    Rows { p: p.wrapping_add(col * size), stride: view.stride[2] as isize }
}

/// Element of an index tensor.
pub(crate) fn read_index(view: &View, index: usize) -> i64 {
    let p = element(view, [index, 0, 0]);
    // SAFETY: within the view's memory, aligned to its dtype (checked in `ops`).
    unsafe {
        match view.dtype {
            DType::I32 => i64::from(*p.cast::<i32>()),
            DType::U8 => i64::from(*p),
            _ => *p.cast::<i64>(),
        }
    }
}

/// Element of a floating-point tensor of up to three dimensions.
#[inline]
pub(crate) fn read_real(view: &View, index: [usize; 3]) -> f64 {
    let p = element(view, index);
    // SAFETY: as `read_index`.
    unsafe {
        match view.dtype {
            DType::F64 => *p.cast::<f64>(),
            DType::Bf16 => (*p.cast::<half::bf16>()).to_f64(),
            DType::F16 => (*p.cast::<half::f16>()).to_f64(),
            _ => f64::from(*p.cast::<f32>()),
        }
    }
}

/// Writes what [`read_real`] reads, rounded to nearest even.
///
/// # Safety
/// No other thread touches the element.
#[inline]
pub(crate) unsafe fn write_real(view: &View, index: [usize; 3], x: f64) {
    let p = element(view, index);
    // SAFETY: as `read_index`, and the caller's contract. To 16 bits by way of float32: x comes
    // from float32 arithmetic unless the tensor is float64 itself.
    unsafe {
        match view.dtype {
            DType::F64 => *p.cast::<f64>() = x,
            DType::Bf16 => *p.cast::<half::bf16>() = half::bf16::from_f32(x as f32),
            DType::F16 => *p.cast::<half::f16>() = half::f16::from_f32(x as f32),
            _ => *p.cast::<f32>() = x as f32,
        }
    }
}
