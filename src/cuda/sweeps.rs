//! What the launch sequences of the sweeps of `kernels/backward_sm90.cuh` share; the forward has its
//! segments' states from one of them.

use std::ops::Range;

use super::chunkwise::Run;
use super::layout::{ceil_div, padded};
use super::maps;
use super::params::{BackwardArgs, TensorMap};
use crate::dispatch;
use crate::error::Result;
use crate::tensor::View;

/// The tiles of a sweep's state, transposed as its blocks hold it.
pub(super) struct Sweep {
    rows: i64,
    block: i64,
    /// Columns that kernels are made for.
    columns: i64,
}

impl Sweep {
    /// A state of so many rows, of which each block takes some, and all columns.
    pub(super) const fn of(rows: i64, columns: i64) -> Self {
        Self { rows, block: dispatch::hopper_rows(rows, columns), columns: padded(columns) }
    }

    /// Rows of one block.
    pub(super) const fn block(&self) -> i64 {
        self.block
    }

    /// Blocks for one state.
    pub(super) const fn blocks(&self) -> i64 {
        ceil_div(self.rows, self.block)
    }

    /// Whether two warpgroups share the columns.
    pub(super) const fn is_split(&self) -> bool {
        self.columns > 256
    }

    /// Columns of one state warpgroup.
    const fn unit_columns(&self) -> i64 {
        if self.is_split() { self.columns / 2 } else { self.columns }
    }

    /// State warpgroups for one state: each takes 64 rows.
    pub(super) const fn units(&self) -> i64 {
        self.blocks() * self.block / 64 * (self.columns / self.unit_columns())
    }

    /// Bytes of one unit's part of a boundary, in bf16.
    pub(super) const fn unit_bytes(&self) -> usize {
        (64 * self.unit_columns() * 2) as usize
    }

    /// 64-column slabs of them.
    pub(super) const fn unit_slabs(&self) -> i64 {
        self.unit_columns() / 64
    }

    /// The same of one block's rows.
    pub(super) const fn block_slabs(&self) -> i64 {
        self.block / 64
    }

    pub(super) fn kernel(&self, name: &str, data: &str) -> String {
        format!("{name}_{data}_{}x{}", self.block, self.columns)
    }
}

/// The vectors of all chunks and heads (`Args::packed`), each `pitch` bytes.
#[derive(Clone, Copy)]
pub(super) struct Vectors {
    pub(super) first: *mut u8,
    pub(super) pitch: usize,
    pub(super) count: i64,
}

impl Vectors {
    /// To copy these bytes of one of them.
    pub(super) fn map(&self, part: Range<usize>) -> Result<TensorMap> {
        maps::rows_map(self.first.wrapping_add(part.start), self.count, self.pitch, part.len())
    }
}

/// What the sweeps without outputs need of a chunk's vectors: `kVectorFrom` to `kVectorTo`.
const STATE_VECTORS: Range<usize> = 1024..1552;

/// Launches `segments_c` or `segments_dc`: what segments add to a state, with its k' and v'.
pub(super) fn segment_states(
    run: &Run<'_>,
    name: &str,
    keys: &View,
    values: &View,
    vectors: &Vectors,
) -> Result<()> {
    let p = run.problem;
    // Blocks without outputs need not hold all columns.
    let sweep = Sweep::of(p.dhqk, p.dhhv.min(256));
    let parts = sweep.blocks() * ceil_div(p.dhhv, sweep.columns);
    let blocks = run.heads() * parts * i64::from(run.args.segments - 1);
    let keys = maps::tensor_map(keys, sweep.unit_slabs())?;
    let values = maps::tensor_map(values, sweep.block_slabs())?;
    let vectors = vectors.map(STATE_VECTORS)?;
    // The others are not used.
    let maps = [values, keys, values, values, values, values, vectors, vectors];
    let kernel = sweep.kernel(name, run.data());
    run.device.launch(run.stream, &kernel, blocks, true, &BackwardArgs { maps, args: run.args })
}
