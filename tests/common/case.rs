//! A random valid problem as a few numbers; zeros are the plainest choice, so proptest shrinks
//! towards dense float32 without options.

use mlstm::ffi::*;
use proptest::prelude::*;

use super::noise::Noise;
use super::tensor::{Role, Tensor};

#[derive(Clone, Debug)]
pub struct Case {
    pub op: mlstm_op,
    pub b: i64,
    pub nh: i64,
    pub s: i64,
    pub dhqk: i64,
    pub dhhv: i64,
    pub dtype: mlstm_dtype,
    pub chunk_size: i32,
    /// Lengths of packed sequences; empty for none.
    pub lengths: Vec<i64>,
    /// Seeds of the options, the strides and the numbers; 0 for the plain ones.
    pub options: u64,
    pub strides: u64,
    pub numbers: u64,
}

fn size() -> impl Strategy<Value = i64> {
    prop_oneof![8 => 1i64..4, 1 => 0i64..2, 1 => 4i64..9]
}

fn head_dim() -> impl Strategy<Value = i64> {
    prop_oneof![20 => 1i64..25, 1 => 25i64..100]
}

fn tokens() -> impl Strategy<Value = i64> {
    prop_oneof![20 => 0i64..41, 1 => 41i64..200]
}

impl Case {
    pub fn any(op: mlstm_op) -> impl Strategy<Value = Self> {
        let sizes = (size(), size(), tokens(), head_dim(), head_dim());
        let dtype = prop::sample::select(vec![MLSTM_F32, MLSTM_F64, MLSTM_BF16, MLSTM_F16]);
        let lengths = prop_oneof![
            2 => Just(vec![]),
            1 => prop::collection::vec(prop_oneof![0i64..3, 0i64..20], 1..6)
        ];
        let chunk_size = prop_oneof![Just(0), 1i32..20, Just(i32::MAX)];
        (sizes, dtype, lengths, chunk_size, any::<[u64; 3]>()).prop_map(
            move |((b, nh, s, dhqk, dhhv), dtype, lengths, chunk_size, seeds)| {
                let [options, strides, numbers] = seeds;
                let mut case = Self {
                    op,
                    b,
                    nh,
                    s,
                    dhqk,
                    dhhv,
                    dtype,
                    chunk_size,
                    lengths,
                    options,
                    strides,
                    numbers,
                };
                if op == MLSTM_OP_STEP {
                    case.s = s % 16 + 1;
                    case.lengths.clear();
                } else if !case.lengths.is_empty() {
                    case.b = 1;
                    case.s = case.lengths.iter().sum();
                }
                case
            },
        )
    }

    /// Rows of the states.
    pub fn rows(&self) -> i64 {
        if self.lengths.is_empty() { self.b } else { self.lengths.len() as i64 }
    }

    /// dtype of the arithmetic.
    pub fn compute(&self) -> mlstm_dtype {
        if self.dtype == MLSTM_F64 { MLSTM_F64 } else { MLSTM_F32 }
    }
}

/// The case spelled out: a problem and its tensors, inputs filled in, outputs poisoned.
pub struct Setup {
    pub case: Case,
    pub problem: mlstm_problem,
    pub tensors: Vec<Tensor>,
}

/// Makes one choice after the other; with seed 0 always the first.
struct Options(Option<Noise>);

impl Options {
    fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.0.as_mut().map_or(0, |noise| noise.below(choices.len()))]
    }

    fn maybe(&mut self) -> bool {
        self.pick(&[false, true])
    }
}

impl Setup {
    pub fn new(case: &Case) -> Self {
        let mut options = Options((case.options != 0).then_some(Noise(case.options)));
        let float64 = case.dtype == MLSTM_F64;
        // SAFETY: all zero is a value of this plain C struct.
        let mut problem: mlstm_problem = unsafe { std::mem::zeroed() };
        problem.struct_size = size_of::<mlstm_problem>();
        (problem.b, problem.nh, problem.s) = (case.b, case.nh, case.s);
        (problem.dhqk, problem.dhhv) = (case.dhqk, case.dhhv);
        problem.num_seqs = case.lengths.len() as i64;
        problem.device = MLSTM_DEVICE_CPU;
        problem.device_index = options.pick(&[0, -1]);
        problem.dtype = case.dtype;
        problem.chunk_size = case.chunk_size;
        problem.qk_scale = options.pick(&[0.0, 0.0, 0.3, -1.5]);
        problem.eps = options.pick(&[0.0, 0.0, 1e-3, 0.5]);
        problem.gate = options.pick(&[MLSTM_GATE_EXP, MLSTM_GATE_EXP, MLSTM_GATE_SIGMOID]);
        if problem.gate == MLSTM_GATE_SIGMOID && options.maybe() {
            problem.flags |= MLSTM_FLAG_NO_NORMALIZE;
        }
        if options.pick(&[false, false, true]) {
            problem.flags |= MLSTM_FLAG_DETACH_DENOMINATOR;
        }
        if problem.eps == 0.0 && options.pick(&[false, false, true]) {
            problem.flags |= MLSTM_FLAG_NO_EPS;
        }
        // Without meaning on the CPU.
        problem.flags |= options.pick(&[
            0,
            MLSTM_FLAG_ALLOW_TF32,
            MLSTM_FLAG_GENERIC_ENGINE,
            MLSTM_FLAG_ALIGNED,
        ]);
        problem.gate_dtype = options.pick(&[0, case.dtype, MLSTM_F32]);
        problem.state_dtype = options.pick(if float64 {
            &[0, MLSTM_F64]
        } else {
            &[0, MLSTM_F32, MLSTM_BF16, MLSTM_F16]
        });
        let mut setup = Self { case: case.clone(), problem, tensors: vec![] };
        setup.tokens();
        match case.op {
            MLSTM_OP_CHUNKWISE_FW | MLSTM_OP_PARALLEL_FW => setup.forward(&mut options),
            MLSTM_OP_CHUNKWISE_BW | MLSTM_OP_PARALLEL_BW => setup.backward(&mut options),
            _ => setup.step(&mut options),
        }
        setup.numbers();
        setup
    }

    pub fn exponential(&self) -> bool {
        self.problem.gate == MLSTM_GATE_EXP
    }

    pub fn normalized(&self) -> bool {
        self.problem.flags & MLSTM_FLAG_NO_NORMALIZE == 0
    }

    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    pub fn values(&self, name: &str) -> Option<&[f64]> {
        self.get(name).map(|tensor| &tensor.values[..])
    }

    fn add(&mut self, name: &'static str, role: Role) {
        let (case, p) = (&self.case, &self.problem);
        let (b, nh, s) = (case.b, case.nh, case.s);
        let slots = if p.num_slots == 0 { b } else { p.num_slots };
        let gates = if p.gate_dtype == 0 { case.dtype } else { p.gate_dtype };
        let states = if p.state_dtype == 0 { case.compute() } else { p.state_dtype };
        let step = case.op == MLSTM_OP_STEP;
        let rows = if step { slots } else { case.rows() };
        let (shape, dtype) = match name {
            "q" | "k" | "dq" | "dk" => (vec![b, nh, s, case.dhqk], case.dtype),
            "v" | "h" | "dv" | "dh" => (vec![b, nh, s, case.dhhv], case.dtype),
            "i" | "f" | "di" | "df" => (vec![b, nh, s], gates),
            "n" | "m" if !step => (vec![b, nh, s], case.compute()),
            _ if name.starts_with("dc_") || name.starts_with('c') => {
                (vec![rows, nh, case.dhqk, case.dhhv], states)
            }
            _ if name.starts_with("dn_") || name.starts_with('n') => {
                (vec![rows, nh, case.dhqk], case.compute())
            }
            _ => (vec![rows, nh], case.compute()),
        };
        let feature = shape.len() == 4 || is_n_state(name, step);
        self.insert(name, role, dtype, &shape, feature);
    }

    fn insert(
        &mut self,
        name: &'static str,
        role: Role,
        dtype: mlstm_dtype,
        shape: &[i64],
        feature: bool,
    ) {
        let seed = match self.case.strides {
            0 => 0,
            seed => Noise(seed ^ self.tensors.len() as u64).bits(),
        };
        // Every other tensor stays plain.
        let choice = if seed % 2 == 0 { 0 } else { seed };
        // What the forward saved has a value of its own per token.
        let repeat = role == Role::In && !matches!(name, "h" | "n" | "m");
        self.tensors.push(Tensor::new(name, role, dtype, shape, [feature, repeat], choice));
    }

    fn add_all(&mut self, names: &[&'static str], role: Role) {
        for &name in names {
            if self.exponential() || !matches!(name.split('_').next(), Some("m" | "dm")) {
                self.add(name, role);
            }
        }
    }

    fn tokens(&mut self) {
        self.add_all(&["q", "k", "v", "i", "f"], Role::In);
    }

    fn offsets(&mut self, options: &mut Options) {
        if self.case.lengths.is_empty() {
            return;
        }
        let dtype = options.pick(&[MLSTM_I32, MLSTM_I64]);
        let count = self.case.lengths.len() as i64 + 1;
        let mut tensor = Tensor::new("cu_seqlens", Role::In, dtype, &[count], [false; 2], 0);
        let mut end = 0;
        let ends = self.case.lengths.iter().map(|length| {
            end += length;
            Some(end as f64)
        });
        tensor.store([Some(0.0)].into_iter().chain(ends));
        self.tensors.push(tensor);
    }

    fn forward(&mut self, options: &mut Options) {
        if options.maybe() {
            self.add_all(&["c_initial", "n_initial", "m_initial"], Role::In);
        }
        self.offsets(options);
        self.add("h", Role::Out);
        for name in ["n", "m"] {
            if options.maybe() {
                self.add_all(&[name], Role::Out);
            }
        }
        if options.maybe() {
            self.add_all(&["c_last", "n_last", "m_last"], Role::Out);
        }
    }

    fn backward(&mut self, options: &mut Options) {
        let initial = options.maybe();
        if initial {
            self.add_all(&["c_initial", "n_initial", "m_initial"], Role::In);
        }
        self.offsets(options);
        if self.normalized() || options.maybe() {
            self.add_all(&["h", "n"], Role::In);
        }
        self.add_all(&["m"], Role::In);
        self.add("dh", Role::In);
        for name in ["dc_last", "dn_last", "dm_last"] {
            if options.maybe() {
                self.add_all(&[name], Role::In);
            }
        }
        self.add_all(&["dq", "dk", "dv", "di", "df"], Role::Out);
        if initial && options.maybe() {
            self.add_all(&["dc_initial", "dn_initial", "dm_initial"], Role::Out);
        }
    }

    fn step(&mut self, options: &mut Options) {
        let b = self.case.b;
        let indexed = options.maybe();
        let extra = options.pick(&[0, 1, 3]);
        // Without a given count there are b slots; with indices there may be fewer than rows.
        let slots = if extra == 0 { b } else { b + extra };
        self.problem.num_slots = if extra == 0 && options.maybe() { 0 } else { slots };
        let pools = ["c", "n", "m"];
        let apart = options.maybe();
        self.add_all(&pools, if apart { Role::In } else { Role::InOut });
        if apart {
            self.add_all(&["c_dst", "n_dst", "m_dst"], Role::Out);
        }
        self.add("h", Role::Out);
        let dtype = options.pick(&[MLSTM_I32, MLSTM_I64]);
        let mut noise = Noise(self.case.options);
        let order = noise.shuffled(slots as usize);
        let src: Vec<i64> =
            (0..b as usize).map(|row| if noise.once_in(5) { -1 } else { order[row] }).collect();
        if indexed {
            self.index("src_slots", dtype, &src);
        }
        let rows: Vec<i64> = if indexed { src } else { (0..b).collect() };
        // Rows move to slots that no row reads, keep nothing, or stay.
        let mut unread: Vec<i64> = (0..slots).filter(|slot| !rows.contains(slot)).collect();
        if options.maybe() {
            let dst: Vec<i64> = rows
                .iter()
                .map(|&slot| match noise.below(4) {
                    _ if slot < 0 => -1,
                    0 => -1,
                    1 => unread.pop().unwrap_or(slot),
                    _ => slot,
                })
                .collect();
            self.index("dst_slots", dtype, &dst);
        }
        if options.maybe() {
            let flags: Vec<i64> = (0..b).map(|_| i64::from(!noise.once_in(3)) * 3).collect();
            self.index("has_state", options.pick(&[MLSTM_U8, MLSTM_I32]), &flags);
        }
        if options.maybe() {
            let counts: Vec<i64> =
                (0..b).map(|_| noise.below(self.case.s as usize + 1) as i64).collect();
            self.index("num_tokens", dtype, &counts);
        }
    }

    fn index(&mut self, name: &'static str, dtype: mlstm_dtype, values: &[i64]) {
        let mut tensor = Tensor::new(name, Role::In, dtype, &[self.case.b], [false; 2], 0);
        tensor.store(values.iter().map(|&value| Some(value as f64)));
        self.tensors.push(tensor);
    }

    /// Fills the inputs. What a forward would have saved (h, n, m of a backward) comes from the
    /// oracle, later.
    fn numbers(&mut self) {
        let mut noise = Noise(self.case.numbers);
        let wild = self.case.numbers % 3 == 1;
        for tensor in &mut self.tensors {
            if tensor.role == Role::Out || matches!(tensor.dtype, MLSTM_I32 | MLSTM_I64 | MLSTM_U8)
            {
                continue;
            }
            let name = tensor.name;
            let count = tensor.len();
            let values: Vec<Option<f64>> = (0..count)
                .map(|_| {
                    Some(match name {
                        "i" => input_gate(&mut noise, wild),
                        "f" => forget_gate(&mut noise, wild),
                        "m" | "m_initial" if wild && noise.once_in(6) => f64::NEG_INFINITY,
                        _ => noise.normal(),
                    })
                })
                .collect();
            tensor.store(values);
        }
        self.poison_unread_slots();
    }

    /// Slots that no row reads hold NaN: reading one shows.
    fn poison_unread_slots(&mut self) {
        if self.case.op != MLSTM_OP_STEP {
            return;
        }
        let read: Vec<usize> = (0..self.case.b as usize)
            .filter(|&row| self.values("has_state").is_none_or(|flags| flags[row] != 0.0))
            .map(|row| self.values("src_slots").map_or(row as f64, |slots| slots[row]))
            .filter(|&slot| slot >= 0.0)
            .map(|slot| slot as usize)
            .collect();
        for tensor in
            self.tensors.iter_mut().filter(|tensor| matches!(tensor.name, "c" | "n" | "m"))
        {
            // Where slots share memory, none is unread.
            if tensor.shape[0] > 1 && tensor.stride[0] == 0 {
                continue;
            }
            let per_slot = tensor.len() / (tensor.shape[0].max(1) as usize);
            let values = tensor.values.clone();
            let keep = |index: usize| read.contains(&(index / per_slot.max(1)));
            tensor.store(
                values
                    .into_iter()
                    .enumerate()
                    .map(|(index, x)| Some(if keep(index) { x } else { f64::NAN })),
            );
        }
    }
}

/// Whether a tensor of rank 3 is an n state, whose last dimension must be dense.
pub fn is_n_state(name: &str, step: bool) -> bool {
    name.starts_with("n_") || name.starts_with("dn_") || (step && name == "n")
}

fn input_gate(noise: &mut Noise, wild: bool) -> f64 {
    if wild && noise.once_in(8) {
        let choices = [f64::NEG_INFINITY, -1000.0, -30.0, 15.0, 60.0];
        return choices[noise.below(choices.len())];
    }
    noise.normal() * 2.0
}

fn forget_gate(noise: &mut Noise, wild: bool) -> f64 {
    if wild && noise.once_in(8) {
        let choices = [f64::NEG_INFINITY, -1000.0, -50.0, 100.0, 1000.0, f64::INFINITY];
        return choices[noise.below(choices.len())];
    }
    noise.normal() * 2.0 + 2.0
}
