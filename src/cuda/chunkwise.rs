//! The launch sequences of forward and backward.

use std::ptr::null_mut;

use super::driver::{self, Device};
use super::layout::{self, ceil_div};
use super::params::{self, Args, Tensor};
use crate::dispatch::Plan;
use crate::error::{Error, Result};
use crate::ops::{Bw, Fw};
use crate::problem::Problem;
use crate::tensor::{DType, View};
use crate::workspace::{Stream, Workspace};

/// The larger state tiles pay from this many blocks of 128 x 128 on, measured on an H200; with fewer
/// the time is that of one block's walk along the chunks.
const BIG_TILE_BLOCKS: i64 = 200;

/// A kernel on tiles of a matrix, chosen for the problem.
struct Tiled {
    name: String,
    /// Tiles of one chunk state, or column tiles of one block of rows.
    tiles: i64,
    grid: i64,
}

/// Sets the equally named members of kernel arguments from views.
macro_rules! set {
    ($args:ident from $views:ident: $($name:ident)*) => {
        $($args.$name = Tensor::from(&$views.$name);)*
    };
}

/// What every kernel of a forward is passed.
pub(super) fn forward_args(call: &Fw, plan: &Plan, workspace: Workspace) -> Result<Args> {
    let (p, t) = (&call.problem, &call.tensors);
    let mut args = common(p, plan, &t.cu_seqlens, workspace, false)?;
    set!(args from t: q k v i f c_initial n_initial m_initial h n m c_last n_last m_last);
    args.write_m = i32::from(t.m.is_some());
    args.vector_ok = i32::from([&t.q, &t.k, &t.v, &t.h].into_iter().all(View::has_aligned_rows));
    Ok(args)
}

/// Enqueues a forward.
pub(super) fn forward(call: &Fw, plan: &Plan, workspace: Workspace, stream: Stream) -> Result<()> {
    let p = &call.problem;
    let args = forward_args(call, plan, workspace)?;
    let run = Run { device: driver::device(p.device_index)?, stream, problem: p, args };
    let kernels = [run.states_kernel("states")?, run.sweep("outputs", p.dhhv)?];
    run.device.enqueue(|| {
        run.gates()?;
        kernels.iter().try_for_each(|kernel| run.tiled(kernel))
    })
}

/// What every kernel of a backward is passed.
pub(super) fn backward_args(call: &Bw, plan: &Plan, workspace: Workspace) -> Result<Args> {
    let (p, t) = (&call.problem, &call.tensors);
    let mut args = common(p, plan, &t.cu_seqlens, workspace, true)?;
    set!(args from t: q k v i f c_initial n_initial m_initial h n m dh dc_last dn_last dm_last dq
        dk dv di df dc_initial dn_initial dm_initial);
    let vectors = [&t.q, &t.k, &t.v, &t.dh, &t.dq, &t.dk, &t.dv].into_iter().chain(&t.h);
    args.vector_ok = i32::from(vectors.into_iter().all(View::has_aligned_rows));
    Ok(args)
}

/// Enqueues a backward.
pub(super) fn backward(call: &Bw, plan: &Plan, workspace: Workspace, stream: Stream) -> Result<()> {
    let p = &call.problem;
    let args = backward_args(call, plan, workspace)?;
    let mut run = Run { device: driver::device(p.device_index)?, stream, problem: p, args };
    let dstates = run.states_kernel("dstates")?;
    run.args.e_tiles = params::size("dhhv", dstates.tiles)?;
    let [dv, dq, dk] =
        [run.sweep("dv", p.dhhv)?, run.sweep("dq", p.dhqk)?, run.sweep("dk", p.dhqk)?];
    run.args.qk_tiles = params::size("dhqk", dq.tiles)?;
    run.device.enqueue(|| {
        run.gates()?;
        run.tiled(&run.states_kernel("states")?)?;
        let tokens = p.b * p.nh * p.s;
        run.launch_items(&format!("delta_{}", run.data()), tokens, false)?;
        for kernel in [&dstates, &dv, &dq, &dk] {
            run.tiled(kernel)?;
        }
        run.gate_gradients()
    })
}

/// Everything but the tensors that forward and backward have of their own.
fn common(
    p: &Problem,
    plan: &Plan,
    cu_seqlens: &Option<View>,
    workspace: Workspace,
    backward: bool,
) -> Result<Args> {
    let none = Tensor::ABSENT;
    Ok(Args {
        s: p.s,
        num_chunks: layout::total_chunks(p, plan),
        b: params::size("b", p.b)?,
        nh: params::size("nh", p.nh)?,
        rows: params::size("num_seqs", p.state_rows())?,
        dhqk: params::size("dhqk", p.dhqk)?,
        dhhv: params::size("dhhv", p.dhhv)?,
        chunk_len: params::size("chunk_size", plan.chunk_size)?,
        chunks_per_row: params::size("s", ceil_div(p.s, plan.chunk_size))?,
        flags: params::flags(p),
        gate_dtype: params::dtype(p.gate_dtype),
        state_dtype: params::dtype(p.state_dtype),
        vector_ok: 0,
        qk_tiles: 0,
        e_tiles: 0,
        write_m: 0,
        qk_scale: p.qk_scale,
        eps: p.eps,
        q: none,
        k: none,
        v: none,
        i: none,
        f: none,
        c_initial: none,
        n_initial: none,
        m_initial: none,
        h: none,
        n: none,
        m: none,
        c_last: none,
        n_last: none,
        m_last: none,
        dh: none,
        dc_last: none,
        dn_last: none,
        dm_last: none,
        dq: none,
        dk: none,
        dv: none,
        di: none,
        df: none,
        dc_initial: none,
        dn_initial: none,
        dm_initial: none,
        cu_seqlens: cu_seqlens.map_or(null_mut(), |view| view.data),
        cu_seqlens_stride: cu_seqlens.map_or(0, |view| view.stride[0]),
        cu_seqlens_wide: i64::from(cu_seqlens.is_some_and(|view| view.dtype == DType::I64)),
        buffers: layout::buffers(p, plan, backward, workspace),
        segments: params::size("segments", plan.segments)?,
        group_chunks: if backward { layout::GROUP_CHUNKS as i32 } else { 1 },
        boundary_parts: 0,
        rho_parts: 0,
        segment_columns: params::size("dhhv", p.dhhv)?,
        parts_before: 0,
        parts_after: 0,
    })
}

fn no_kernel(name: &str) -> Error {
    Error::unsupported(
        "problem.dtype",
        format!("the kernel {name} needs more shared memory than a block of this device can have"),
    )
}

/// One call on its way to the device.
pub(super) struct Run<'a> {
    pub(super) device: &'static Device,
    pub(super) stream: Stream,
    pub(super) problem: &'a Problem,
    pub(super) args: Args,
}

impl Run<'_> {
    fn launch(&self, name: &str, blocks: i64) -> Result<()> {
        self.device.launch(self.stream, name, blocks, false, &self.args)
    }

    /// A kernel whose blocks take `rows` (of their geometry) items each.
    fn launch_items(&self, name: &str, items: i64, overlap: bool) -> Result<()> {
        let geometry = self.device.geometry(name).ok_or_else(|| no_kernel(name))?;
        let blocks = ceil_div(items, i64::from(geometry.rows));
        self.device.launch(self.stream, name, blocks, overlap, &self.args)
    }

    fn acc(&self) -> &'static str {
        params::suffix(self.problem.compute_dtype())
    }

    pub(super) fn data(&self) -> &'static str {
        params::suffix(self.problem.dtype)
    }

    /// The suffix of kernels made of matrix products.
    fn products(&self) -> &'static str {
        match self.problem.dtype {
            DType::F32 if self.problem.allow_tf32 => "tf32",
            dtype => params::suffix(dtype),
        }
    }

    /// Chunks times heads.
    fn chunks(&self) -> i64 {
        self.args.num_chunks * self.problem.nh
    }

    /// Rows of states times heads.
    pub(super) fn heads(&self) -> i64 {
        self.problem.state_rows() * self.problem.nh
    }

    fn tiled(&self, kernel: &Tiled) -> Result<()> {
        self.launch(&kernel.name, kernel.grid)
    }

    /// A kernel that walks along the chunks with a tile of the state: `states` or `dstates`.
    fn states_kernel(&self, base: &str) -> Result<Tiled> {
        let (p, heads) = (self.problem, self.heads());
        let tiled = |name: String| {
            let geometry = self.device.geometry(&name)?;
            let (rows, cols) = (i64::from(geometry.rows), i64::from(geometry.cols));
            let tiles = ceil_div(p.dhqk, rows) * ceil_div(p.dhhv, cols);
            Some(Tiled { name, tiles, grid: heads * tiles })
        };
        let blocks = heads * ceil_div(p.dhqk, 128) * ceil_div(p.dhhv, 128);
        let big = blocks >= BIG_TILE_BLOCKS && p.dhqk > 64;
        let small = format!("{base}_{}", self.products());
        big.then(|| tiled(format!("{small}_big")))
            .flatten()
            .or_else(|| tiled(small.clone()))
            .ok_or_else(|| no_kernel(&small))
    }

    /// A kernel on blocks of a chunk's tokens with `columns` outputs each.
    fn sweep(&self, base: &str, columns: i64) -> Result<Tiled> {
        let base = format!("{base}_{}", self.products());
        let chunk_len = i64::from(self.args.chunk_len);
        // The narrowest tile that holds all columns, else the widest there is.
        let mut chosen: Option<Tiled> = None;
        for width in ["small", "64", "128", "256"] {
            let name = format!("{base}_{width}");
            let Some(geometry) = self.device.geometry(&name) else { continue };
            let (rows, cols) = (i64::from(geometry.rows), i64::from(geometry.cols));
            if rows > chunk_len {
                continue;
            }
            let tiles = ceil_div(columns, cols);
            let grid = self.chunks() * ceil_div(chunk_len, rows) * tiles;
            let enough = cols >= columns && width != "small";
            chosen = Some(Tiled { name, tiles, grid });
            if enough {
                break;
            }
        }
        chosen.ok_or_else(|| no_kernel(&base))
    }

    fn gates(&self) -> Result<()> {
        let acc = self.acc();
        self.gates_by(&format!("gates_reduce_{acc}"), &format!("gates_emit_{acc}"))
    }

    /// The gates' vectors, in the form that the kernel `last` gives them, the chunks' effects on m by
    /// `reduce`. Each kernel starts while the one before it runs, and waits; the first does not overlap
    /// others'.
    pub(super) fn gates_by(&self, reduce: &str, last: &str) -> Result<()> {
        let packed = self.problem.num_seqs.is_some();
        let stabilizer = self.problem.gate.has_stabilizer();
        self.chunk_table()?;
        if stabilizer {
            self.launch_items(reduce, self.chunks(), packed)?;
            self.launch_items(&format!("gates_scan_{}", self.acc()), self.heads(), true)?;
        }
        self.launch_items(last, self.chunks(), packed || stabilizer)
    }

    /// The chunks of packed sequences.
    pub(super) fn chunk_table(&self) -> Result<()> {
        self.launch("chunk_table", i64::from(self.problem.num_seqs.is_some()))
    }

    fn gate_gradients(&self) -> Result<()> {
        let acc = self.acc();
        if self.problem.gate.has_stabilizer() {
            self.launch_items(&format!("gategrad_reduce_{acc}"), self.chunks(), false)?;
            self.launch_items(&format!("gategrad_scan_{acc}"), self.heads(), false)?;
        }
        self.launch_items(&format!("gategrad_emit_{acc}"), self.chunks(), false)
    }
}
