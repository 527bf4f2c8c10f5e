//! The safe Rust API on borrowed slices: the same random problems as through the C ABI, dense, and
//! the errors that only Rust callers can meet.

mod common;

use std::collections::BTreeMap;

use common::case::{Case, Setup};
use common::oracle::{self, core_dtype};
use common::runner;
use common::tensor::{Role, Tensor as Model};
use half::{bf16, f16};
use mlstm::ffi::*;
use mlstm::{
    DType, Device, Error, Gate, Gradients, Inputs, Op, Outputs, ProblemSpec, Saved, Scratch, Slots,
    State, StateMut, Tensor, TensorMut,
};
use proptest::prelude::*;

/// A dense tensor in a Rust vector.
enum Data {
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    I32(Vec<i32>),
    I64(Vec<i64>),
    U8(Vec<u8>),
}

macro_rules! each {
    ($data:expr, $vector:ident => $body:expr) => {
        match $data {
            Data::F32($vector) => $body,
            Data::F64($vector) => $body,
            Data::Bf16($vector) => $body,
            Data::F16($vector) => $body,
            Data::I32($vector) => $body,
            Data::I64($vector) => $body,
            Data::U8($vector) => $body,
        }
    };
}

struct Buffer {
    data: Data,
    shape: Vec<i64>,
}

impl Buffer {
    fn new(model: &Model) -> Self {
        let values = if model.role == Role::Out {
            vec![f64::NAN; model.len()]
        } else {
            model.values.clone()
        };
        let data = match model.dtype {
            MLSTM_F32 => Data::F32(values.iter().map(|&x| x as f32).collect()),
            MLSTM_F64 => Data::F64(values),
            MLSTM_BF16 => Data::Bf16(values.into_iter().map(bf16::from_f64).collect()),
            MLSTM_F16 => Data::F16(values.into_iter().map(f16::from_f64).collect()),
            MLSTM_I32 => Data::I32(values.iter().map(|&x| x as i32).collect()),
            MLSTM_I64 => Data::I64(values.iter().map(|&x| x as i64).collect()),
            _ => Data::U8(values.iter().map(|&x| x as u8).collect()),
        };
        Self { data, shape: model.shape.clone() }
    }

    fn tensor(&self) -> Tensor<'_> {
        each!(&self.data, vector => Tensor::new(vector, &self.shape)).unwrap()
    }

    fn tensor_mut(&mut self) -> TensorMut<'_> {
        each!(&mut self.data, vector => TensorMut::new(vector, &self.shape)).unwrap()
    }

    fn values(&self) -> Vec<f64> {
        match &self.data {
            Data::F32(x) => x.iter().map(|&x| f64::from(x)).collect(),
            Data::F64(x) => x.clone(),
            Data::Bf16(x) => x.iter().map(|x| x.to_f64()).collect(),
            Data::F16(x) => x.iter().map(|x| x.to_f64()).collect(),
            _ => vec![],
        }
    }
}

fn spec(p: &mlstm_problem) -> ProblemSpec {
    let given = |dtype| (dtype != MLSTM_DTYPE_DEFAULT).then(|| core_dtype(dtype));
    let no_eps = p.flags & MLSTM_FLAG_NO_EPS != 0;
    ProblemSpec {
        b: p.b,
        nh: p.nh,
        s: p.s,
        dhqk: p.dhqk,
        dhhv: p.dhhv,
        num_seqs: p.num_seqs,
        num_slots: p.num_slots,
        qk_scale: p.qk_scale,
        eps: (p.eps != 0.0 || no_eps).then_some(p.eps),
        gate: match p.gate {
            MLSTM_GATE_EXP => Gate::Exponential,
            _ => Gate::Sigmoid { normalize: p.flags & MLSTM_FLAG_NO_NORMALIZE == 0 },
        },
        detach_denominator: p.flags & MLSTM_FLAG_DETACH_DENOMINATOR != 0,
        allow_tf32: p.flags & MLSTM_FLAG_ALLOW_TF32 != 0,
        generic_engine: p.flags & MLSTM_FLAG_GENERIC_ENGINE != 0,
        dtype: core_dtype(p.dtype),
        gate_dtype: given(p.gate_dtype),
        state_dtype: given(p.state_dtype),
        chunk_size: p.chunk_size.into(),
        ..ProblemSpec::default()
    }
}

type Written<'a> = BTreeMap<&'static str, TensorMut<'a>>;

/// Takes the state to be written from the outputs.
fn state<'a>(out: &mut Written<'a>, names: [&str; 3]) -> Option<StateMut<'a>> {
    let (c, n) = (out.remove(names[0])?, out.remove(names[1])?);
    Some(StateMut { c, n, m: out.remove(names[2]) })
}

type Buffers = BTreeMap<&'static str, Buffer>;

fn run(setup: &Setup, inputs: &Buffers, outputs: &mut Buffers) -> mlstm::Result<()> {
    let spec = spec(&setup.problem);
    let get = |name: &str| inputs.get(name).map(Buffer::tensor);
    let need = |name: &str| get(name).unwrap();
    let given = Inputs {
        q: need("q"),
        k: need("k"),
        v: need("v"),
        i: need("i"),
        f: need("f"),
        initial: get("c_initial").map(|c| State { c, n: need("n_initial"), m: get("m_initial") }),
        cu_seqlens: get("cu_seqlens"),
    };
    let mut out: Written<'_> =
        outputs.iter_mut().map(|(&name, buffer)| (name, buffer.tensor_mut())).collect();
    let scratch = &mut Scratch::new();
    let backward = matches!(setup.case.op, MLSTM_OP_CHUNKWISE_BW | MLSTM_OP_PARALLEL_BW);
    if setup.case.op == MLSTM_OP_STEP {
        let mut pools = state(&mut out, ["c", "n", "m"]).unwrap();
        let slots = Slots {
            src_slots: get("src_slots"),
            dst_slots: get("dst_slots"),
            has_state: get("has_state"),
            num_tokens: get("num_tokens"),
        };
        let h = &mut out.remove("h").unwrap();
        return mlstm::step(&spec, &given, &mut pools, &slots, h, scratch);
    }
    if backward {
        let saved = Saved {
            h: get("h"),
            n: get("n"),
            m: get("m"),
            dh: need("dh"),
            dc_last: get("dc_last"),
            dn_last: get("dn_last"),
            dm_last: get("dm_last"),
        };
        let initial = state(&mut out, ["dc_initial", "dn_initial", "dm_initial"]);
        let mut gradients = Gradients {
            dq: out.remove("dq").unwrap(),
            dk: out.remove("dk").unwrap(),
            dv: out.remove("dv").unwrap(),
            di: out.remove("di").unwrap(),
            df: out.remove("df").unwrap(),
            initial,
        };
        let call = if setup.case.op == MLSTM_OP_CHUNKWISE_BW {
            mlstm::chunkwise_bw
        } else {
            mlstm::parallel_bw
        };
        return call(&spec, &given, &saved, &mut gradients, scratch);
    }
    let last = state(&mut out, ["c_last", "n_last", "m_last"]);
    let mut results =
        Outputs { h: out.remove("h").unwrap(), n: out.remove("n"), m: out.remove("m"), last };
    let call = if setup.case.op == MLSTM_OP_CHUNKWISE_FW {
        mlstm::chunkwise_fw
    } else {
        mlstm::parallel_fw
    };
    call(&spec, &given, &mut results, scratch)
}

fn check(case: &Case) -> Result<(), TestCaseError> {
    let mut setup = Setup::new(&Case { strides: 0, ..case.clone() });
    // The safe API updates pools in place.
    if setup.get("c_dst").is_some() {
        return Ok(());
    }
    if matches!(case.op, MLSTM_OP_CHUNKWISE_BW | MLSTM_OP_PARALLEL_BW) {
        oracle::fill_saved(&mut setup);
    }
    let part = |output: bool| -> Buffers {
        let models = setup.tensors.iter().filter(|model| (model.role != Role::In) == output);
        models.map(|model| (model.name, Buffer::new(model))).collect()
    };
    let (inputs, mut outputs) = (part(false), part(true));
    let outcome = run(&setup, &inputs, &mut outputs);
    prop_assert!(outcome.is_ok(), "{:?}", outcome);
    let expected = oracle::expected(&setup);
    for (name, buffer) in &outputs {
        let dtype = setup.get(name).unwrap().dtype;
        for (index, (got, want)) in buffer.values().iter().zip(&expected.values[name]).enumerate() {
            let (Some(want), false) = (want, expected.ambiguous) else { continue };
            let tolerance = expected.tolerance[name][index];
            prop_assert!(
                oracle::close(*got, *want, tolerance, dtype),
                "{} [{}] is {}, not {} +- {}",
                name,
                index,
                got,
                want,
                tolerance
            );
        }
    }
    Ok(())
}

#[test]
fn random_problems_agree_with_the_oracle() {
    for op in 1..=5 {
        runner::run(runner::cases(12_000) / 100, &Case::any(op), |case| check(&case));
    }
}

/// A forward of one token whose tensors can be replaced.
struct Small {
    spec: ProblemSpec,
    rows: [f32; 4],
    gates: [f32; 1],
    h: [f32; 4],
}

fn small() -> Small {
    let spec = ProblemSpec { b: 1, nh: 1, s: 1, dhqk: 4, dhhv: 4, ..ProblemSpec::default() };
    Small { spec, rows: [1.0; 4], gates: [0.0; 1], h: [f32::NAN; 4] }
}

impl Small {
    fn inputs(&self) -> Inputs<'_> {
        let rows = Tensor::new(&self.rows, &[1, 1, 1, 4]).unwrap();
        let gates = Tensor::new(&self.gates, &[1, 1, 1]).unwrap();
        Inputs { q: rows, k: rows, v: rows, i: gates, f: gates, initial: None, cu_seqlens: None }
    }

    fn forward(&self, spec: &ProblemSpec, bend: impl FnOnce(&mut Inputs<'_>)) -> String {
        let mut h = self.h;
        let mut inputs = self.inputs();
        bend(&mut inputs);
        let h_out = TensorMut::new(&mut h, &[1, 1, 1, 4]).unwrap();
        let mut outputs = Outputs { h: h_out, n: None, m: None, last: None };
        let outcome = mlstm::chunkwise_fw(spec, &inputs, &mut outputs, &mut Scratch::new());
        let message = outcome.map_or_else(|error| error.to_string(), |()| String::new());
        assert_eq!(h.iter().all(|x| x.is_nan()), !message.is_empty(), "{message}");
        message
    }
}

#[test]
fn inputs_may_share_memory() {
    let small = small();
    assert_eq!(small.forward(&small.spec, |_| ()), "");
}

#[test]
fn mistakes_are_named() {
    let small = small();
    let wrong = |name: &str, bend: &dyn Fn(&mut Inputs<'_>)| {
        let message = small.forward(&small.spec, |inputs| bend(inputs));
        assert!(message.starts_with(name), "{message}");
    };
    wrong("q.shape: expected [1, 1, 1, 4]", &|t| {
        t.q = Tensor::new(&[0f32; 8], &[1, 1, 2, 4]).unwrap()
    });
    wrong("k.rank", &|t| t.k = Tensor::new(&[0f32; 8], &[1, 1, 4]).unwrap());
    wrong("v.dtype: expected float32, got float64", &|t| {
        t.v = Tensor::new(&[0f64; 4], &[1, 1, 1, 4]).unwrap();
    });
    wrong("q.stride[3]", &|t| {
        t.q = Tensor::with_strides(&[0f32; 8], &[1, 1, 1, 4], &[8, 8, 8, 2]).unwrap();
    });
    wrong("m_initial", &|t| {
        let c = Tensor::new(&[0f32; 16], &[1, 1, 4, 4]).unwrap();
        t.initial = Some(State { c, n: Tensor::new(&[0f32; 4], &[1, 1, 4]).unwrap(), m: None });
    });
    wrong("problem.num_seqs", &|t| t.cu_seqlens = Some(Tensor::new(&[0i32, 1], &[2]).unwrap()));
    let packed = ProblemSpec { num_seqs: 1, ..small.spec };
    let message = small.forward(&packed, |_| ());
    assert!(message.starts_with("cu_seqlens"), "{message}");
    let message =
        small.forward(&packed, |t| t.cu_seqlens = Some(Tensor::new(&[0i32, 2], &[2]).unwrap()));
    assert!(message.starts_with("cu_seqlens"), "{message}");
}

#[test]
fn slices_that_are_too_short_are_refused() {
    let data = [0f32; 15];
    assert!(Tensor::new(&data, &[1, 1, 4, 4]).is_err());
    assert!(Tensor::with_strides(&data, &[1, 1, 2, 4], &[0, 0, 12, 1]).is_err());
    assert!(TensorMut::new(&mut [0f32; 3], &[1, 4]).is_err());
    let message = Tensor::new(&data, &[4, 4]).unwrap_err().to_string();
    assert!(message.contains("15 elements"), "{message}");
}

#[test]
fn borrowed_slices_are_host_memory() {
    let small = small();
    let cuda = ProblemSpec { device: Device::Cuda, ..small.spec };
    let message = small.forward(&cuda, |_| ());
    assert!(message.starts_with("problem.device"), "{message}");
    // A query needs no device, but a build for it.
    assert_eq!(mlstm::query(Op::Step, &cuda).is_ok(), cfg!(feature = "cuda"));
    assert!(matches!(
        mlstm::preload(Device::Cuda, i32::MAX),
        Err(Error::Device(_) | Error::InvalidArgument { .. })
    ));
    mlstm::preload(Device::Cpu, 0).unwrap();
}

/// Tensors are checked before the workspace is allocated: this one would be petabytes.
#[test]
fn a_huge_problem_without_its_tensors_allocates_nothing() {
    let small = small();
    let huge = ProblemSpec { s: 1 << 48, dtype: DType::F32, ..small.spec };
    assert!(mlstm::query(Op::ChunkwiseFw, &huge).unwrap().workspace_size > 1 << 46);
    let message = small.forward(&huge, |_| ());
    assert!(message.starts_with("q.shape"), "{message}");
}
