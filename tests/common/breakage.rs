//! Every way to break exactly one rule of a valid call, with the answer it must get.

use mlstm::ffi::*;

use super::call::Structs;
use super::case::Setup;
use super::tensor::{Role, Tensor, item};

/// A broken call.
pub struct Break {
    pub what: String,
    pub structs: Structs,
    pub status: mlstm_status,
    /// The message starts with one of these.
    pub names: Vec<String>,
    /// Memory that `structs` points to besides the setup's.
    pub keep: Vec<Tensor>,
}

pub struct Breaks<'a> {
    setup: &'a Setup,
    valid: Structs,
    pub all: Vec<Break>,
}

const INDICES: [&str; 5] = ["cu_seqlens", "src_slots", "dst_slots", "has_state", "num_tokens"];
/// Members whose absence is no mistake.
const OPTIONAL: [&str; 7] =
    ["dc_last", "dn_last", "dm_last", "src_slots", "dst_slots", "has_state", "num_tokens"];

impl<'a> Breaks<'a> {
    pub fn new(setup: &'a Setup, valid: &Structs) -> Self {
        let mut breaks = Self { setup, valid: valid.clone(), all: vec![] };
        for tensor in &setup.tensors {
            breaks.descriptor(tensor);
            breaks.numbers_of(tensor);
            breaks.strides(tensor);
            breaks.overlaps(tensor);
        }
        breaks.strays();
        breaks.workspace();
        breaks.problem();
        breaks.offsets();
        breaks.slots();
        breaks
    }

    fn add(&mut self, what: String, names: &[&str], bend: impl FnOnce(&mut Structs)) -> &mut Break {
        let mut structs = self.valid.clone();
        bend(&mut structs);
        let names = names.iter().map(ToString::to_string).collect();
        let status = MLSTM_INVALID_ARGUMENT;
        self.all.push(Break { what, structs, status, names, keep: vec![] });
        self.all.last_mut().unwrap()
    }

    fn tensor(
        &mut self,
        what: &str,
        name: &'static str,
        at: &[&str],
        bend: impl Fn(&mut mlstm_tensor),
    ) {
        let names: Vec<String> = at.iter().map(|member| format!("{name}{member}:")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        self.add(format!("{name} {what}"), &names, |structs| {
            bend(structs.tensors.get_mut(name).unwrap());
        });
    }

    fn descriptor(&mut self, tensor: &Tensor) {
        let (name, setup) = (tensor.name, self.setup);
        let forward = matches!(setup.case.op, MLSTM_OP_CHUNKWISE_FW | MLSTM_OP_PARALLEL_FW);
        let backward = matches!(setup.case.op, MLSTM_OP_CHUNKWISE_BW | MLSTM_OP_PARALLEL_BW);
        let spare = OPTIONAL.contains(&name)
            || (forward && matches!(name, "n" | "m"))
            || (backward && matches!(name, "h" | "n") && !setup.normalized());
        if !spare {
            self.add(format!("{name} absent"), &[&format!("{name}:")], |structs| {
                structs.tensors.remove(name);
            });
        }
        if tensor.len() > 0 {
            self.tensor("null", name, &[".data"], |t| t.data = std::ptr::null_mut());
            if item(tensor.dtype) > 1 {
                self.tensor("misaligned", name, &[".data"], |t| {
                    t.data = t.data.wrapping_byte_add(1)
                });
            }
        }
        let rank = tensor.shape.len() as i32;
        for bad in [-1, 0, 1, 2, 3, 4, 5, i32::MAX, i32::MIN] {
            if bad != rank {
                // The unused sizes that a higher rank uncovers are negative.
                self.tensor(&format!("rank {bad}"), name, &[".rank", ".shape"], |t| t.rank = bad);
            }
        }
        for bad in [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, i32::MAX] {
            let other = match name {
                "has_state" => matches!(bad, MLSTM_U8 | MLSTM_I32),
                _ if INDICES.contains(&name) => matches!(bad, MLSTM_I32 | MLSTM_I64),
                _ => bad == tensor.dtype,
            };
            if !other {
                self.tensor(&format!("dtype {bad}"), name, &[".dtype"], |t| t.dtype = bad);
            }
        }
    }

    fn numbers_of(&mut self, tensor: &Tensor) {
        for dim in 0..tensor.shape.len() {
            let size = tensor.shape[dim];
            for bad in [size + 1, size - 1, -1, i64::MAX, i64::MIN, 1 << 61] {
                let what = format!("shape[{dim}] {bad}");
                self.tensor(&what, tensor.name, &[".shape"], |t| t.shape[dim] = bad);
            }
        }
    }

    fn strides(&mut self, tensor: &Tensor) {
        let last = tensor.shape.len() - 1;
        let step = self.setup.case.op == MLSTM_OP_STEP;
        let feature = last == 3 || super::case::is_n_state(tensor.name, step);
        if tensor.len() == 0 {
            return;
        }
        let long: Vec<usize> = (0..=last).filter(|&dim| tensor.shape[dim] > 1).collect();
        for &dim in &long {
            let mut bad = vec![i64::MAX, i64::MIN];
            if feature && dim == last {
                bad.extend([0, 2, -1, -1000]);
            }
            if tensor.role != Role::In {
                bad.push(0);
            }
            for stride in bad {
                let member = format!(".stride[{dim}]");
                let what = format!("stride[{dim}] {stride}");
                let at = [".stride", member.as_str()];
                self.tensor(&what, tensor.name, &at, |t| t.stride[dim] = stride);
            }
            for &other in long.iter().filter(|&&other| other < dim && tensor.role != Role::In) {
                let what = format!("stride[{other}] as stride[{dim}]");
                self.tensor(&what, tensor.name, &[".stride"], |t| t.stride[other] = t.stride[dim]);
            }
        }
    }

    fn overlaps(&mut self, tensor: &Tensor) {
        let setup = self.setup;
        if tensor.role == Role::In || tensor.len() == 0 {
            return;
        }
        let others = setup.tensors.iter().filter(|t| t.name != tensor.name && t.len() > 0);
        for other in others.filter(|t| (t.address() as usize).is_multiple_of(item(tensor.dtype))) {
            let (name, target) = (tensor.name, other.name);
            // Whichever of the two comes first is named, and the moved one may meet a third.
            let names = [&format!("{name}:"), &format!("{target}:"), "c_dst:", "*"];
            let names: Vec<&str> = names.iter().map(|name| name.as_ref()).collect();
            self.add(format!("{name} on {target}"), &names, |structs| {
                structs.tensors.get_mut(name).unwrap().data = other.address().cast();
            });
        }
    }

    /// Tensors that this problem has no use for.
    fn strays(&mut self) {
        let setup = self.setup;
        if !setup.exponential() {
            for &name in self.valid.names().iter().filter(|name| is_m(name)) {
                self.add(format!("{name} with the sigmoid gate"), &[&format!("{name}:")], |s| {
                    s.tensors.insert(name, s.tensors["i"]);
                });
            }
        }
        let names = self.valid.names();
        if names.contains(&"dc_initial") && setup.get("c_initial").is_none() {
            let case = &setup.case;
            let (rows, nh) = (case.rows(), case.nh);
            let states = match setup.problem.state_dtype {
                MLSTM_DTYPE_DEFAULT => case.compute(),
                dtype => dtype,
            };
            let tensor = |name, dtype, shape: &[i64]| {
                Tensor::new(name, Role::Out, dtype, shape, [true, false], 0)
            };
            let c = tensor("dc_initial", states, &[rows, nh, case.dhqk, case.dhhv]);
            let n = tensor("dn_initial", case.compute(), &[rows, nh, case.dhqk]);
            let m = tensor("dm_initial", case.compute(), &[rows, nh]);
            let mut keep = vec![c, n];
            keep.extend(setup.exponential().then_some(m));
            let extra = self.add("gradients of no state".into(), &["dc_initial:"], |structs| {
                structs.tensors.extend(keep.iter().map(|t| (t.name, t.descriptor())));
            });
            extra.keep = keep;
        }
        if names.contains(&"cu_seqlens") && setup.case.lengths.is_empty() {
            self.add("stray cu_seqlens".into(), &["problem.num_seqs:"], |structs| {
                structs.tensors.insert("cu_seqlens", structs.tensors["q"]);
            });
        }
    }

    fn workspace(&mut self) {
        let size = self.valid.workspace_size;
        if size == 0 {
            return;
        }
        self.add("workspace null".into(), &["workspace:"], |s| s.workspace = std::ptr::null_mut());
        for by in [1, 8, 32] {
            self.add(format!("workspace misaligned by {by}"), &["workspace:"], |structs| {
                structs.workspace = structs.workspace.wrapping_byte_add(by);
            });
        }
        for short in [0, 1, size / 2, size - 1] {
            let broken = self.add(format!("workspace of {short}"), &["workspace:"], |structs| {
                structs.workspace_size = short;
            });
            broken.status = MLSTM_WORKSPACE_TOO_SMALL;
        }
        for tensor in self.setup.tensors.iter().filter(|tensor| tensor.len() > 0) {
            let name = tensor.name;
            let names = [&format!("{name}:"), "workspace:", "*"];
            self.add(format!("workspace on {name}"), &names, |structs| {
                structs.workspace = ((tensor.address() as usize) & !63) as *mut _;
            });
        }
    }

    fn field(
        &mut self,
        name: &str,
        what: &str,
        bend: impl FnOnce(&mut mlstm_problem),
    ) -> &mut Break {
        let names = [&format!("problem.{name}:"), "problem:"];
        let names: Vec<&str> = names.iter().map(|name| name.as_ref()).collect();
        self.add(format!("problem.{name} {what}"), &names, |structs| bend(&mut structs.problem))
    }

    fn problem(&mut self) {
        let valid = self.setup.problem;
        let step = self.setup.case.op == MLSTM_OP_STEP;
        for (name, at) in SIZES {
            for bad in [-1, i64::MIN, i64::MAX, 1 << 60] {
                let broken = self.field(name, &bad.to_string(), |p| *at(p) = bad);
                if name == "num_seqs" {
                    // Rows and packed sequences exclude each other.
                    broken.names.push("problem.b:".into());
                }
            }
        }
        self.field("dhqk", "0", |p| p.dhqk = 0);
        self.field("dhhv", "0", |p| p.dhhv = 0);
        for (name, at) in SIZES.into_iter().take(5) {
            let broken = self.field(name, "+ 1", |p| *at(p) += 1);
            broken.names.push("*".into());
        }
        if step {
            self.field("s", "0", |p| p.s = 0);
            self.field("s", "17", |p| p.s = 17);
            self.field("num_seqs", "1", |p| p.num_seqs = 1);
        } else {
            self.field("num_slots", "1", |p| p.num_slots = 1);
            if valid.num_seqs > 0 {
                self.field("b", "2", |p| p.b = 2);
                self.field("b", "0", |p| p.b = 0);
            }
        }
        for bad in [2, -1, i32::MAX] {
            self.field("gate", &bad.to_string(), |p| p.gate = bad);
        }
        for bad in [0, 3, -1, i32::MIN] {
            self.field("device", &bad.to_string(), |p| p.device = bad);
        }
        for bad in [-2, 1, i32::MIN] {
            self.field("device_index", &bad.to_string(), |p| p.device_index = bad);
        }
        // Where there is a GPU, the call would hand it these host pointers.
        if mlstm_preload(MLSTM_DEVICE_CUDA, 0) != MLSTM_OK {
            let broken = self.field("device", "CUDA", |p| p.device = MLSTM_DEVICE_CUDA);
            broken.status = MLSTM_DEVICE_ERROR;
            broken.names = vec!["device: ".into()];
        }
        for bad in [0, MLSTM_I32, MLSTM_I64, MLSTM_U8, 8, -1] {
            self.field("dtype", &bad.to_string(), |p| p.dtype = bad);
        }
        for bad in [MLSTM_F32, MLSTM_F64, MLSTM_BF16, MLSTM_F16, MLSTM_I32, MLSTM_U8, 8, -1] {
            if bad != valid.dtype && bad != MLSTM_F32 {
                self.field("gate_dtype", &bad.to_string(), |p| p.gate_dtype = bad);
            }
            if (bad == MLSTM_F64) != (valid.dtype == MLSTM_F64) || !(1..=4).contains(&bad) {
                self.field("state_dtype", &bad.to_string(), |p| p.state_dtype = bad);
            }
        }
        self.field("chunk_size", "-1", |p| p.chunk_size = -1);
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            self.field("qk_scale", &bad.to_string(), |p| p.qk_scale = bad);
            self.field("eps", &bad.to_string(), |p| p.eps = bad);
        }
        self.field("eps", "-1", |p| p.eps = -1.0);
        self.field("eps", "with NO_EPS", |p| {
            (p.eps, p.flags) = (1e-3, p.flags | MLSTM_FLAG_NO_EPS);
        });
        if valid.dtype != MLSTM_F64 {
            self.field("eps", "1e39", |p| p.eps = 1e39);
            self.field("qk_scale", "-1e300", |p| p.qk_scale = -1e300);
        }
        if valid.gate == MLSTM_GATE_EXP {
            self.field("flags", "NO_NORMALIZE", |p| p.flags |= MLSTM_FLAG_NO_NORMALIZE);
        }
        for bad in [64, 1 << 31, u32::MAX] {
            self.field("flags", &bad.to_string(), |p| p.flags = bad).status = MLSTM_UNSUPPORTED;
        }
    }

    /// Writes one wrong number into a copy of an index tensor.
    fn contents(&mut self, name: &'static str, index: usize, value: i64, names: &[&str]) {
        let Some(tensor) = self.setup.get(name) else { return };
        if tensor.dtype == MLSTM_I32 && i32::try_from(value).is_err() {
            return;
        }
        let mut copy = tensor.clone();
        let mut values = copy.values.clone();
        values[index] = value as f64;
        copy.store(values.into_iter().map(Some));
        let broken = self.add(format!("{name}[{index}] = {value}"), names, |structs| {
            structs.tensors.insert(name, copy.descriptor());
        });
        broken.keep = vec![copy];
    }

    fn offsets(&mut self) {
        let count = self.setup.case.lengths.len();
        if count == 0 {
            return;
        }
        let s = self.setup.case.s;
        let name = &["cu_seqlens"];
        for bad in [-1, 1, i64::from(i32::MIN), i64::MIN] {
            self.contents("cu_seqlens", 0, bad, name);
        }
        for bad in [s + 1, s - 1, -1, i64::from(i32::MAX), i64::MAX] {
            self.contents("cu_seqlens", count, bad, name);
            if count > 1 && bad != s - 1 {
                self.contents("cu_seqlens", 1, bad, name);
            }
        }
    }

    fn slots(&mut self) {
        let setup = self.setup;
        if setup.case.op != MLSTM_OP_STEP {
            return;
        }
        let p = &setup.problem;
        let slots = if p.num_slots == 0 { p.b } else { p.num_slots };
        let at = |name: &str, row: usize| setup.values(name).map(|x| x[row] as i64);
        let src = |row: usize| at("src_slots", row).unwrap_or(row as i64);
        let dst = |row: usize| at("dst_slots", row).unwrap_or(src(row));
        let rows: Vec<usize> = (0..p.b as usize).filter(|&row| src(row) >= 0).collect();
        let both = &["dst_slots", "src_slots"];
        for &row in &rows {
            for bad in [slots, -2, i64::from(i32::MAX), i64::from(i32::MIN), i64::MIN, i64::MAX] {
                self.contents("src_slots", row, bad, &["src_slots"]);
                self.contents("dst_slots", row, bad, &["dst_slots"]);
            }
            for bad in [-1, p.s + 1, i64::from(i32::MAX), i64::from(i32::MIN), i64::MAX] {
                self.contents("num_tokens", row, bad, &["num_tokens"]);
            }
            for &other in rows.iter().filter(|&&other| other != row) {
                if dst(other) >= 0 {
                    self.contents("dst_slots", row, dst(other), both);
                }
                let in_place = setup.get("c_dst").is_none();
                if in_place && at("has_state", other) != Some(0) && src(other) != src(row) {
                    self.contents("dst_slots", row, src(other), both);
                }
                if setup.get("dst_slots").is_none() {
                    self.contents("src_slots", row, src(other), both);
                }
            }
        }
    }
}

type Field = fn(&mut mlstm_problem) -> &mut i64;

const SIZES: [(&str, Field); 7] = [
    ("b", |p| &mut p.b),
    ("nh", |p| &mut p.nh),
    ("s", |p| &mut p.s),
    ("dhqk", |p| &mut p.dhqk),
    ("dhhv", |p| &mut p.dhhv),
    ("num_seqs", |p| &mut p.num_seqs),
    ("num_slots", |p| &mut p.num_slots),
];

fn is_m(name: &str) -> bool {
    matches!(name.split('_').next(), Some("m" | "dm"))
}
