//! The operations with their tensors. Every check across tensors lives here, once, for every
//! binding and every backend: an `Fw`, `Bw` or `Step` that exists is valid but for the contents of
//! index tensors, which only the device that holds them can read.

use std::fmt;

use crate::error::{Error, Result};
use crate::problem::{Op, Problem};
use crate::tensor::{DType, Extent, View};

/// Tensors of a forward call. Shapes: q, k (B, NH, S, DHQK); v, h (B, NH, S, DHHV);
/// i, f, n, m (B, NH, S); states C (R, NH, DHQK, DHHV), n (R, NH, DHQK), m (R, NH), where R is B
/// or, with `cu_seqlens` (R + 1), the number of packed sequences.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs, reason = "named and shaped above")]
pub struct FwTensors {
    pub q: View,
    pub k: View,
    pub v: View,
    pub i: View,
    pub f: View,
    pub c_initial: Option<View>,
    pub n_initial: Option<View>,
    pub m_initial: Option<View>,
    pub cu_seqlens: Option<View>,
    pub h: View,
    pub n: Option<View>,
    pub m: Option<View>,
    pub c_last: Option<View>,
    pub n_last: Option<View>,
    pub m_last: Option<View>,
}

impl FwTensors {
    /// [`View::suits_copy_engine`] of all that it would copy.
    pub fn suit_copy_engine(&self) -> bool {
        [&self.q, &self.k, &self.v, &self.h].into_iter().all(View::suits_copy_engine)
    }
}

/// Tensors of a backward call: the forward's, the incoming gradients and the outgoing ones, each
/// of the shape and dtype of what it is the gradient of.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs, reason = "named and shaped above")]
pub struct BwTensors {
    pub q: View,
    pub k: View,
    pub v: View,
    pub i: View,
    pub f: View,
    pub c_initial: Option<View>,
    pub n_initial: Option<View>,
    pub m_initial: Option<View>,
    pub cu_seqlens: Option<View>,
    pub h: Option<View>,
    pub n: Option<View>,
    pub m: Option<View>,
    pub dh: View,
    pub dc_last: Option<View>,
    pub dn_last: Option<View>,
    pub dm_last: Option<View>,
    pub dq: View,
    pub dk: View,
    pub dv: View,
    pub di: View,
    pub df: View,
    pub dc_initial: Option<View>,
    pub dn_initial: Option<View>,
    pub dm_initial: Option<View>,
}

impl BwTensors {
    /// [`View::suits_copy_engine`] of all that it would copy.
    pub fn suit_copy_engine(&self) -> bool {
        let always = [&self.q, &self.k, &self.v, &self.dh, &self.dq, &self.dk, &self.dv];
        always.into_iter().chain(&self.h).all(View::suits_copy_engine)
    }
}

/// Tensors of a step: tokens as in a forward of S = 1 to 16, and pools of states
/// C (num_slots, NH, DHQK, DHHV), n (num_slots, NH, DHQK), m (num_slots, NH). Without `*_dst` the
/// pools are updated in place. Per row, all (B): `src_slots`, `dst_slots`, `has_state`,
/// `num_tokens`.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs, reason = "named and shaped above")]
pub struct StepTensors {
    pub q: View,
    pub k: View,
    pub v: View,
    pub i: View,
    pub f: View,
    pub c: View,
    pub n: View,
    pub m: Option<View>,
    pub c_dst: Option<View>,
    pub n_dst: Option<View>,
    pub m_dst: Option<View>,
    pub src_slots: Option<View>,
    pub dst_slots: Option<View>,
    pub has_state: Option<View>,
    pub num_tokens: Option<View>,
    pub h: View,
}

/// A validated forward.
#[derive(Debug, Clone, Copy)]
pub struct Fw {
    /// What to compute.
    pub problem: Problem,
    /// On which memory.
    pub tensors: FwTensors,
}

/// A validated backward.
#[derive(Debug, Clone, Copy)]
pub struct Bw {
    /// What to compute.
    pub problem: Problem,
    /// On which memory.
    pub tensors: BwTensors,
}

/// A validated step.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// What to compute.
    pub problem: Problem,
    /// On which memory.
    pub tensors: StepTensors,
}

/// Collects the tensors of one call while checking them, then checks that no output overlaps
/// anything else.
struct Checker<'a> {
    problem: &'a Problem,
    inputs: Vec<Reach>,
    outputs: Vec<Reach>,
}

/// A named view and what it touches, found once: there are up to two hundred pairs of views.
type Reach = (&'static str, View, Extent);

fn reach((name, view): (&'static str, View)) -> Reach {
    (name, view, view.extent())
}

/// Dimensions by name, so that shapes and their labels in messages cannot drift apart.
#[derive(Clone, Copy)]
enum Dims {
    /// (B, NH, S, DHQK)
    Qk,
    /// (B, NH, S, DHHV)
    Hv,
    /// (B, NH, S)
    Token,
    /// (R, NH, DHQK, DHHV)
    C,
    /// (R, NH, DHQK)
    N,
    /// (R, NH)
    M,
}

/// The names of a shape's sizes, given that of its rows of states; written in messages only.
struct Labels<'a>(Dims, &'a str);

impl fmt::Display for Labels<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(dims, rows) = self;
        match dims {
            Dims::Qk => out.write_str("b, nh, s, dhqk"),
            Dims::Hv => out.write_str("b, nh, s, dhhv"),
            Dims::Token => out.write_str("b, nh, s"),
            Dims::C => write!(out, "{rows}, nh, dhqk, dhhv"),
            Dims::N => write!(out, "{rows}, nh, dhqk"),
            Dims::M => write!(out, "{rows}, nh"),
        }
    }
}

impl<'a> Checker<'a> {
    fn new(problem: &'a Problem) -> Self {
        Self { problem, inputs: Vec::with_capacity(16), outputs: Vec::with_capacity(12) }
    }

    /// Checks a view against the shape of `dims`, with `rows` rows of states.
    fn shape(
        &self,
        name: &'static str,
        view: &View,
        dims: Dims,
        dtype: DType,
        (rows, row_name): (i64, &str),
    ) -> Result<()> {
        let p = self.problem;
        let shape: &[i64] = match dims {
            Dims::Qk => &[p.b, p.nh, p.s, p.dhqk],
            Dims::Hv => &[p.b, p.nh, p.s, p.dhhv],
            Dims::Token => &[p.b, p.nh, p.s],
            Dims::C => &[rows, p.nh, p.dhqk, p.dhhv],
            Dims::N => &[rows, p.nh, p.dhqk],
            Dims::M => &[rows, p.nh],
        };
        view.check(name, dtype, shape, Labels(dims, row_name))?;
        match dims {
            Dims::Qk | Dims::Hv | Dims::C | Dims::N => view.check_feature_stride(name),
            Dims::Token | Dims::M => Ok(()),
        }
    }

    fn check(&self, name: &'static str, view: &View, dims: Dims, dtype: DType) -> Result<()> {
        let rows = match self.problem.num_seqs {
            Some(count) => (count, "num_seqs"),
            None => (self.problem.b, "b"),
        };
        self.shape(name, view, dims, dtype, rows)
    }

    fn input(&mut self, name: &'static str, view: &View, dims: Dims, dtype: DType) -> Result<()> {
        self.check(name, view, dims, dtype)?;
        self.inputs.push(reach((name, *view)));
        Ok(())
    }

    fn optional_input(
        &mut self,
        name: &'static str,
        view: &Option<View>,
        dims: Dims,
        dtype: DType,
    ) -> Result<()> {
        view.as_ref().map_or(Ok(()), |view| self.input(name, view, dims, dtype))
    }

    /// The sigmoid gate has no m, in whatever role.
    fn no_stray_m(&self, name: &'static str, view: &Option<View>) -> Result<()> {
        if view.is_some() && !self.problem.gate.has_stabilizer() {
            return Err(Error::invalid(
                name,
                "absent (the sigmoid gate has no stabiliser m)",
                "a tensor",
            ));
        }
        Ok(())
    }

    fn output(&mut self, name: &'static str, view: &View, dims: Dims, dtype: DType) -> Result<()> {
        self.check(name, view, dims, dtype)?;
        view.check_writable(name)?;
        self.outputs.push(reach((name, *view)));
        Ok(())
    }

    /// q, k, v, i, f.
    fn token_inputs(&mut self, views: [&View; 5]) -> Result<()> {
        let (dtype, gate_dtype) = (self.problem.dtype, self.problem.gate_dtype);
        let [q, k, v, i, f] = views;
        self.input("q", q, Dims::Qk, dtype)?;
        self.input("k", k, Dims::Qk, dtype)?;
        self.input("v", v, Dims::Hv, dtype)?;
        self.input("i", i, Dims::Token, gate_dtype)?;
        self.input("f", f, Dims::Token, gate_dtype)
    }

    /// Checks that of a (C, n, m) triple all or none are there, m only with a stabiliser.
    fn triple(
        &self,
        names: [&'static str; 3],
        views: [&Option<View>; 3],
    ) -> Result<Vec<(&'static str, View, Dims, DType)>> {
        let p = self.problem;
        let [c, n, m] = views;
        self.no_stray_m(names[2], m)?;
        let wanted = [(names[0], c), (names[1], n), (names[2], m)];
        let wanted = wanted.get(..if p.gate.has_stabilizer() { 3 } else { 2 }).unwrap_or(&[]);
        if wanted.iter().all(|w| w.1.is_none()) {
            return Ok(vec![]);
        }
        if wanted.iter().any(|w| w.1.is_none()) {
            let given: Vec<&str> = wanted.iter().filter(|w| w.1.is_some()).map(|w| w.0).collect();
            let all: Vec<&str> = wanted.iter().map(|w| w.0).collect();
            let missing = all.iter().find(|name| !given.contains(name)).copied().unwrap_or("");
            return Err(Error::invalid(
                missing,
                format!("all or none of {}", all.join(", ")),
                format!("only {}", given.join(", ")),
            ));
        }
        let compute = p.compute_dtype();
        let kinds = [(Dims::C, p.state_dtype), (Dims::N, compute), (Dims::M, compute)];
        Ok(wanted
            .iter()
            .zip(kinds)
            .filter_map(|((name, view), (dims, dtype))| view.map(|v| (*name, v, dims, dtype)))
            .collect())
    }

    fn input_triple(&mut self, names: [&'static str; 3], views: [&Option<View>; 3]) -> Result<()> {
        for (name, view, dims, dtype) in self.triple(names, views)? {
            self.input(name, &view, dims, dtype)?;
        }
        Ok(())
    }

    fn output_triple(&mut self, names: [&'static str; 3], views: [&Option<View>; 3]) -> Result<()> {
        for (name, view, dims, dtype) in self.triple(names, views)? {
            self.output(name, &view, dims, dtype)?;
        }
        Ok(())
    }

    /// An index or flag tensor of one dimension.
    fn index(
        &mut self,
        name: &'static str,
        view: &Option<View>,
        size: i64,
        size_name: &str,
        dtypes: [DType; 2],
    ) -> Result<()> {
        let Some(view) = view else { return Ok(()) };
        if !dtypes.contains(&view.dtype) {
            return Err(Error::invalid(
                format!("{name}.dtype"),
                format!("{} or {}", dtypes[0], dtypes[1]),
                view.dtype,
            ));
        }
        view.check(name, view.dtype, &[size], size_name)?;
        self.inputs.push(reach((name, *view)));
        Ok(())
    }

    fn cu_seqlens(&mut self, view: &Option<View>) -> Result<()> {
        match (view, self.problem.num_seqs) {
            (None, Some(count)) => Err(Error::invalid(
                "cu_seqlens",
                format!("a tensor of {} offsets (problem.num_seqs is {count})", count + 1),
                "none",
            )),
            (Some(_), None) => Err(Error::invalid(
                "problem.num_seqs",
                "the number of packed sequences, at least 1 (cu_seqlens is given)",
                0,
            )),
            (view, count) => self.index(
                "cu_seqlens",
                view,
                count.unwrap_or(0) + 1,
                "num_seqs + 1",
                [DType::I32, DType::I64],
            ),
        }
    }

    /// No output may share memory with an input, another output or the workspace.
    fn finish(self, workspace: &View) -> Result<()> {
        let Self { inputs, outputs, .. } = self;
        let workspace = reach(("workspace", *workspace));
        for (index, (name, output, extent)) in outputs.iter().enumerate() {
            let others = outputs.iter().skip(index + 1).chain(&inputs).chain([&workspace]);
            for (other_name, other, other_extent) in others {
                if extent.meets(other_extent) && output.overlaps(other) {
                    return Err(Error::invalid(
                        *name,
                        format!("memory of its own, apart from {other_name}"),
                        format!(
                            "{output:?} at {:p} and {other:?} at {:p}",
                            output.data, other.data
                        ),
                    ));
                }
            }
        }
        let (_, workspace, extent) = workspace;
        for (name, input, input_extent) in &inputs {
            if extent.meets(input_extent) && workspace.overlaps(input) {
                return Err(Error::invalid(
                    "workspace",
                    format!("memory of its own, apart from {name}"),
                    "overlapping memory",
                ));
            }
        }
        Ok(())
    }
}

fn required(name: &'static str, view: &Option<View>) -> Result<View> {
    view.ok_or_else(|| Error::invalid(name, "a tensor", "none"))
}

const INITIAL: [&str; 3] = ["c_initial", "n_initial", "m_initial"];

impl Fw {
    /// Checks the tensors of a forward against the problem and against each other.
    pub(crate) fn new(problem: Problem, t: FwTensors, workspace: &View) -> Result<Self> {
        let p = &problem;
        let mut check = Checker::new(p);
        check.token_inputs([&t.q, &t.k, &t.v, &t.i, &t.f])?;
        check.input_triple(INITIAL, [&t.c_initial, &t.n_initial, &t.m_initial])?;
        check.cu_seqlens(&t.cu_seqlens)?;
        check.output("h", &t.h, Dims::Hv, p.dtype)?;
        if let Some(n) = &t.n {
            check.output("n", n, Dims::Token, p.compute_dtype())?;
        }
        check.no_stray_m("m", &t.m)?;
        if let Some(m) = &t.m {
            check.output("m", m, Dims::Token, p.compute_dtype())?;
        }
        check.output_triple(["c_last", "n_last", "m_last"], [&t.c_last, &t.n_last, &t.m_last])?;
        check.finish(workspace)?;
        Ok(Self { problem, tensors: t })
    }
}

impl Bw {
    /// Checks the tensors of a backward against the problem and against each other.
    pub(crate) fn new(problem: Problem, t: BwTensors, workspace: &View) -> Result<Self> {
        let p = &problem;
        let (dtype, compute) = (p.dtype, p.compute_dtype());
        let mut check = Checker::new(p);
        check.token_inputs([&t.q, &t.k, &t.v, &t.i, &t.f])?;
        check.input_triple(INITIAL, [&t.c_initial, &t.n_initial, &t.m_initial])?;
        check.cu_seqlens(&t.cu_seqlens)?;
        // What the gate has no use for may be absent, but is checked if given.
        if p.gate.has_normalizer() {
            required("h", &t.h)?;
            required("n", &t.n)?;
        }
        if p.gate.has_stabilizer() {
            required("m", &t.m)?;
        }
        check.optional_input("h", &t.h, Dims::Hv, dtype)?;
        check.optional_input("n", &t.n, Dims::Token, compute)?;
        check.no_stray_m("m", &t.m)?;
        check.optional_input("m", &t.m, Dims::Token, compute)?;
        check.input("dh", &t.dh, Dims::Hv, dtype)?;
        check.optional_input("dc_last", &t.dc_last, Dims::C, p.state_dtype)?;
        check.optional_input("dn_last", &t.dn_last, Dims::N, compute)?;
        check.no_stray_m("dm_last", &t.dm_last)?;
        check.optional_input("dm_last", &t.dm_last, Dims::M, compute)?;
        check.output("dq", &t.dq, Dims::Qk, dtype)?;
        check.output("dk", &t.dk, Dims::Qk, dtype)?;
        check.output("dv", &t.dv, Dims::Hv, dtype)?;
        check.output("di", &t.di, Dims::Token, p.gate_dtype)?;
        check.output("df", &t.df, Dims::Token, p.gate_dtype)?;
        check.output_triple(
            ["dc_initial", "dn_initial", "dm_initial"],
            [&t.dc_initial, &t.dn_initial, &t.dm_initial],
        )?;
        if t.dc_initial.is_some() && t.c_initial.is_none() {
            return Err(Error::invalid(
                "dc_initial",
                "absent without c_initial, n_initial and m_initial",
                "a tensor",
            ));
        }
        check.finish(workspace)?;
        Ok(Self { problem, tensors: t })
    }
}

impl Step {
    /// Checks the tensors of a step against the problem and against each other.
    pub(crate) fn new(problem: Problem, t: StepTensors, workspace: &View) -> Result<Self> {
        let p = &problem;
        let mut check = Checker::new(p);
        check.token_inputs([&t.q, &t.k, &t.v, &t.i, &t.f])?;
        let index = [DType::I32, DType::I64];
        check.index("src_slots", &t.src_slots, p.b, "b", index)?;
        check.index("dst_slots", &t.dst_slots, p.b, "b", index)?;
        check.index("has_state", &t.has_state, p.b, "b", [DType::U8, DType::I32])?;
        check.index("num_tokens", &t.num_tokens, p.b, "b", index)?;
        if p.num_slots < p.b && t.src_slots.is_none() {
            return Err(Error::invalid(
                "problem.num_slots",
                format!("at least b = {} without src_slots", p.b),
                p.num_slots,
            ));
        }
        check.output("h", &t.h, Dims::Hv, p.dtype)?;
        if p.gate.has_stabilizer() {
            required("m", &t.m)?;
        }
        let source = check.pools(["c", "n", "m"], [&Some(t.c), &Some(t.n), &t.m])?;
        let target = check.pools(["c_dst", "n_dst", "m_dst"], [&t.c_dst, &t.n_dst, &t.m_dst])?;
        check.pool_roles(source, target)?;
        check.finish(workspace)?;
        Ok(Self { problem, tensors: t })
    }

    /// Where the new states go: (C, n, m).
    pub fn destination(&self) -> (View, View, Option<View>) {
        let t = &self.tensors;
        (t.c_dst.unwrap_or(t.c), t.n_dst.unwrap_or(t.n), t.m_dst.or(t.m))
    }

    /// Whether states are read from and written to the same pools.
    pub fn in_place(&self) -> bool {
        self.destination().0.data == self.tensors.c.data
    }
}

impl Checker<'_> {
    /// Checks the pools of a step one by one.
    fn pools(
        &self,
        names: [&'static str; 3],
        views: [&Option<View>; 3],
    ) -> Result<Vec<(&'static str, View)>> {
        let mut pools = Vec::with_capacity(3);
        for (name, view, dims, dtype) in self.triple(names, views)? {
            self.shape(name, &view, dims, dtype, (self.problem.num_slots, "num_slots"))?;
            pools.push((name, view));
        }
        Ok(pools)
    }

    /// Source pools are written without a target, only read with one, and either way when the
    /// target *is* the source: the in-place form spelled out.
    fn pool_roles(
        &mut self,
        source: Vec<(&'static str, View)>,
        target: Vec<(&'static str, View)>,
    ) -> Result<()> {
        let pairs = source.iter().zip(&target);
        let aliases = pairs.filter(|((_, s), (_, t))| t.is_empty() || s.is_same(t)).count();
        let in_place = target.is_empty() || aliases == target.len();
        if !in_place && aliases > 0 {
            let names: Vec<&str> = target.iter().map(|(name, _)| *name).collect();
            return Err(Error::invalid(
                names.first().copied().unwrap_or_default(),
                format!("all or none of {} to be the source pools", names.join(", ")),
                "some of them",
            ));
        }
        let (written, read) = if in_place { (source, vec![]) } else { (target, source) };
        for (name, view) in &written {
            view.check_writable(name)?;
        }
        self.outputs.extend(written.into_iter().map(reach));
        self.inputs.extend(read.into_iter().map(reach));
        Ok(())
    }
}

/// The label of an operation in messages and plans.
impl fmt::Display for Op {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::ChunkwiseFw => "chunkwise_fw",
            Self::ChunkwiseBw => "chunkwise_bw",
            Self::ParallelFw => "parallel_fw",
            Self::ParallelBw => "parallel_bw",
            Self::Step => "step",
        })
    }
}
