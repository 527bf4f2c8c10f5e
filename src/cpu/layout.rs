//! The workspace of forward and backward: which vectors, chunk states and per-thread scratch there
//! are. Written once with [`Carver`], so that the size asked for is the size used.

use super::pool;
use super::vecops::{Mat, TILE, padded};
use crate::dispatch::Plan;
use crate::error::Result;
use crate::problem::{Op, Problem};
use crate::workspace::{Carver, Region, Workspace};

/// Lanes worked on at the same time, at most.
pub(crate) const WAVE: usize = 64;
/// Chunks whose states are kept between a sweep along the sequence and the work on its tiles.
const GROUP: usize = 16;
/// Chunk states should stay within the outer caches between being written and read.
const STATE_BYTES: usize = 16 << 20;

/// Elements from row to row of a scratch matrix: never a multiple of 64 elements, or the rows of a
/// column panel would fall on few cache sets.
pub(crate) const fn leading(cols: usize) -> usize {
    let cols = padded(cols);
    if cols.is_multiple_of(64) { cols + 16 } else { cols }
}

/// Elements from row to row of a TILE x TILE matrix.
pub(crate) const TILE_LD: usize = leading(TILE);

/// Sizes and places of everything in the workspace.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub dk: usize,
    pub dv: usize,
    /// L, and the number of chunks per group.
    pub chunk: usize,
    pub group: usize,
    /// Chunks of one head over all sequences of a batch row, at most.
    pub chunks_per_head: usize,
    /// Rows and padded columns of a chunk state: (DHQK, DHHV) forward, transposed backward.
    pub state_rows: usize,
    pub state_cols: usize,
    /// Elements of one chunk state with its n.
    pub slot: usize,
    pub slots: usize,
    pub slot_region: Region,
    /// Per-token vectors, in the order of [`Vector`].
    vectors: [Region; 8],
    /// Backward: <dC, C> + <dn, n> at the end of each chunk, f64.
    pub chunk_dots: Region,
    scratch: Region,
    scratch_len: usize,
    pub bytes: usize,
}

/// Per-token vectors in the workspace.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Vector {
    /// logf_t + m_{t-1} - m_t: exponent of the decay from the token before, in its frame.
    Step,
    /// i_t - m_t: exponent of the token's own weight.
    Source,
    /// exp(-m_t), the lower bound of |N| in the denominator (1 with the sigmoid gate).
    Floor,
    /// Backward: 1 / (den_t + eps).
    Inverse,
    /// Backward: delta_t * (den_t + eps), from the derivative of |N_t|.
    Pull,
    /// Backward: derivative with respect to m_t by way of eps.
    Frame,
    /// Backward: q_t . dq_t and k_t . dk_t.
    Qdq,
    Kdk,
}

impl Layout {
    pub(crate) fn new<T>(problem: &Problem, plan: &Plan) -> Result<Self> {
        let backward = matches!(plan.op, Op::ChunkwiseBw | Op::ParallelBw);
        let (dk, dv) = (problem.dhqk as usize, problem.dhhv as usize);
        let chunk = plan.chunk_size as usize;
        let chunks_per_head = plan.num_chunks as usize;
        let lanes = (problem.state_rows() * problem.nh) as usize;
        let (state_rows, state_cols) = if backward { (dv, dk) } else { (dk, dv) };
        // Products saturate: the carver refuses what does not fit the address space.
        let slot = state_rows.saturating_mul(leading(state_cols)).saturating_add(padded(dk));
        // A lane's chunks, all of its row's tokens at most.
        let chunks = (problem.s as usize).div_ceil(chunk);
        let budget = (STATE_BYTES / slot.saturating_mul(size_of::<T>())).max(4 * pool::threads());
        let group = (budget / lanes.clamp(1, 4)).clamp(1, GROUP).min(chunks.max(1));
        let largest = Self::slots_of(chunks, group, backward);
        let all = if problem.num_seqs.is_some() {
            // Per lane as many as for its chunks one by one, and one more at each end.
            let per_chunk = if backward { 3 } else { 1 };
            problem.nh as usize * chunks_per_head * per_chunk + lanes * 2
        } else {
            lanes * largest
        };
        let budget = if backward { budget * 2 } else { budget };
        let slots = budget.max(largest).min(all);
        let tokens = (problem.b * problem.nh * problem.s) as usize;

        let mut carver = Carver::default();
        let mut vectors = [Region::default(); 8];
        let count = if backward { 8 } else { 3 };
        for vector in vectors.iter_mut().take(count) {
            // The last tile of a lane may be read up to a whole vector.
            *vector = carver.take::<T>(tokens + TILE);
        }
        let dots = if backward && tokens > 0 {
            (problem.b * problem.nh) as usize * chunks_per_head
        } else {
            0
        };
        let chunk_dots = carver.take::<f64>(dots);
        let slot_region = carver.take::<T>(slot.saturating_mul(slots));
        let mut layout = Self {
            dk,
            dv,
            chunk,
            group,
            chunks_per_head,
            state_rows,
            state_cols,
            slot,
            slots,
            slot_region,
            vectors,
            chunk_dots,
            scratch: Region::default(),
            scratch_len: 0,
            bytes: 0,
        };
        layout.scratch_len = layout.matrices::<T>(backward).0;
        layout.scratch = carver.take::<u8>(layout.scratch_len.saturating_mul(pool::threads()));
        layout.bytes = carver.total()?;
        Ok(layout)
    }

    /// Chunk states that a lane of this many chunks occupies.
    pub(crate) fn slots_of(chunks: usize, group: usize, backward: bool) -> usize {
        let states = chunks.min(group) + 1;
        if !backward {
            return states;
        }
        let groups = chunks.div_ceil(group);
        // States, their gradients, and the states at the start of each group.
        states * 2 + if groups > 1 { groups } else { 0 }
    }

    /// Bytes of a thread's scratch, and the offsets of its matrices.
    fn matrices<T>(&self, backward: bool) -> (usize, [Region; 14]) {
        let mut carver = Carver::default();
        let (ldk, ldv) = (leading(self.dk), leading(self.dv));
        let (dkp, dvp) = (padded(self.dk), padded(self.dv));
        let tile = TILE * TILE_LD;
        let only = |size| if backward { size } else { 0 };
        let sizes: [usize; 14] = [
            TILE.saturating_mul(ldk),
            TILE.saturating_mul(ldk),
            dkp.saturating_mul(TILE_LD),
            TILE.saturating_mul(ldv),
            tile,
            tile,
            TILE.saturating_mul(ldv),
            TILE * TILE / 2,
            TILE.saturating_mul(ldk),
            only(TILE.saturating_mul(ldk)),
            only(dvp.saturating_mul(TILE_LD)),
            only(TILE.saturating_mul(ldv)),
            only(tile),
            only(dkp.saturating_mul(ldv)),
        ];
        let regions = sizes.map(|size| carver.take::<T>(size));
        (carver.total().unwrap_or(usize::MAX), regions)
    }
}

/// The workspace, carved. Copies share the memory: what may touch what when is up to the kernels.
#[derive(Clone, Copy)]
pub(crate) struct Memory<'a, T> {
    pub layout: &'a Layout,
    base: *mut u8,
    backward: bool,
    compute: std::marker::PhantomData<T>,
}

// SAFETY: a pointer and sizes; tasks agree on who writes what (see the kernels).
unsafe impl<T> Sync for Memory<'_, T> {}

impl<'a, T> Memory<'a, T> {
    /// `workspace` has been checked to hold `layout.bytes`.
    pub(crate) fn new(layout: &'a Layout, workspace: Workspace, backward: bool) -> Self {
        Self { layout, base: workspace.data, backward, compute: std::marker::PhantomData }
    }

    fn at(&self, region: Region) -> *mut u8 {
        self.base.wrapping_add(region.offset)
    }

    /// A per-token vector, from this token on.
    pub(crate) fn vector(&self, which: Vector, token: usize) -> *mut T {
        self.at(self.layout.vectors[which as usize]).cast::<T>().wrapping_add(token)
    }

    /// The chunk's entry of the per-chunk dot products.
    pub(crate) fn chunk_dot(&self, chunk: usize) -> *mut f64 {
        self.at(self.layout.chunk_dots).cast::<f64>().wrapping_add(chunk)
    }

    /// A chunk state and its n.
    pub(crate) fn slot(&self, index: usize) -> (Mat<T>, *mut T) {
        debug_assert!(index < self.layout.slots, "{index} of {}", self.layout.slots);
        let p = self.at(self.layout.slot_region).cast::<T>();
        let p = p.wrapping_add(index * self.layout.slot);
        let ld = leading(self.layout.state_cols);
        (Mat { p, ld }, p.wrapping_add(self.layout.state_rows * ld))
    }

    /// A worker's scratch.
    pub(crate) fn scratch(&self, worker: usize) -> Scratch<T> {
        let layout = self.layout;
        let base = self.at(layout.scratch).wrapping_add(worker * layout.scratch_len);
        let (_, r) = layout.matrices::<T>(self.backward);
        let (ldk, ldv) = (leading(layout.dk), leading(layout.dv));
        let mat =
            |index: usize, ld: usize| Mat::<T> { p: base.wrapping_add(r[index].offset).cast(), ld };
        Scratch {
            q: mat(0, ldk),
            k: mat(1, ldk),
            kt: mat(2, TILE_LD),
            v: mat(3, ldv),
            p: mat(4, TILE_LD),
            d: mat(5, TILE_LD),
            o: mat(6, ldv),
            vectors: mat(7, TILE),
            q_decayed: mat(8, ldk),
            dq: mat(8, ldk),
            dk: mat(9, ldk),
            vt: mat(10, TILE_LD),
            dv: mat(11, ldv),
            ds: mat(12, TILE_LD),
            dc: mat(13, ldv),
        }
    }
}

/// Scratch matrices of one worker. `kt` and `vt` have padded DHQK and DHHV rows, `dc` padded DHQK,
/// the others TILE; `q_decayed` exists forward, what follows it backward only.
pub(crate) struct Scratch<T> {
    pub q: Mat<T>,
    pub k: Mat<T>,
    pub kt: Mat<T>,
    pub v: Mat<T>,
    pub p: Mat<T>,
    pub d: Mat<T>,
    /// Forward: the tile's q C + P V. Backward: dh.
    pub o: Mat<T>,
    /// 32 vectors of TILE elements.
    pub vectors: Mat<T>,
    pub q_decayed: Mat<T>,
    pub dq: Mat<T>,
    pub dk: Mat<T>,
    pub vt: Mat<T>,
    pub dv: Mat<T>,
    pub ds: Mat<T>,
    pub dc: Mat<T>,
}
