//! Plans are a function of the problem and the machine alone: no device is touched here.

use mlstm::dispatch::{Capabilities, Engine, plan};
use mlstm::problem::{Op, ProblemSpec};
use mlstm::{DType, Device, Gate};
use proptest::prelude::*;

const OPS: [Op; 5] = [Op::ChunkwiseFw, Op::ChunkwiseBw, Op::ParallelFw, Op::ParallelBw, Op::Step];

fn spec(s: i64) -> ProblemSpec {
    ProblemSpec { b: 2, nh: 4, s, dhqk: 32, dhhv: 64, ..ProblemSpec::default() }
}

const NO_CUDA: Capabilities = Capabilities { has_cuda: false, hopper: false };

#[test]
fn the_chunk_length_is_the_callers_or_ours_and_at_most_the_sequence() {
    let chunk = |s: i64, wanted: i64| {
        let problem =
            ProblemSpec { chunk_size: wanted, ..spec(s) }.validate(Op::ChunkwiseFw).unwrap();
        let plan = plan(Op::ChunkwiseFw, &problem, NO_CUDA).unwrap();
        (plan.chunk_size, plan.num_chunks)
    };
    assert_eq!(chunk(1000, 100), (100, 10));
    assert_eq!(chunk(1001, 100), (100, 11));
    assert_eq!(chunk(7, 100), (7, 1));
    assert_eq!(chunk(0, 100).0, 1);
    let (ours, count) = chunk(1 << 20, 0);
    assert!((16..=512).contains(&ours) && count == (1 << 20) / ours);
}

#[test]
fn the_parallel_form_is_one_chunk() {
    for op in [Op::ParallelFw, Op::ParallelBw] {
        let problem = ProblemSpec { chunk_size: 16, ..spec(300) }.validate(op).unwrap();
        let plan = plan(op, &problem, NO_CUDA).unwrap();
        assert_eq!((plan.chunk_size, plan.num_chunks), (300, 1));
    }
}

#[test]
fn a_device_without_an_engine_gets_no_plan() {
    for op in OPS {
        let problem = ProblemSpec { device: Device::Cuda, ..spec(8) }.validate(op).unwrap();
        assert_eq!(plan(op, &problem, NO_CUDA), None);
    }
}

#[test]
fn cuda_takes_the_chunk_lengths_its_kernels_have() {
    let cuda = Capabilities { has_cuda: true, hopper: false };
    for (dtype, wanted, length) in [
        (DType::Bf16, 0, 128),
        (DType::F16, 64, 128),
        (DType::F16, 1, 128),
        (DType::Bf16, 65, 128),
        (DType::Bf16, 4096, 128),
        (DType::F32, 0, 64),
        (DType::F64, 128, 64),
    ] {
        for op in [Op::ChunkwiseFw, Op::ChunkwiseBw, Op::ParallelFw, Op::ParallelBw] {
            let device = Device::Cuda;
            let problem = ProblemSpec { device, dtype, chunk_size: wanted, ..spec(300) };
            let plan = plan(op, &problem.validate(op).unwrap(), cuda).unwrap();
            assert_eq!((plan.engine, plan.chunk_size), (Engine::Cuda, length), "{dtype} {wanted}");
            assert_eq!(plan.num_chunks, (300 + length - 1) / length);
        }
    }
}

#[test]
fn the_generic_engine_can_be_asked_for() {
    let hopper = Capabilities { has_cuda: true, hopper: true };
    for (generic_engine, engine) in [(false, Engine::Hopper), (true, Engine::Cuda)] {
        let (device, dtype) = (Device::Cuda, DType::Bf16);
        let spec = ProblemSpec { device, dtype, dhqk: 64, generic_engine, ..spec(300) };
        let problem = spec.validate(Op::ChunkwiseFw).unwrap();
        assert_eq!(plan(Op::ChunkwiseFw, &problem, hopper).unwrap().engine, engine);
    }
}

#[test]
fn hopper_kernels_take_what_they_are_made_for() {
    let hopper = Capabilities { has_cuda: true, hopper: true };
    let base = ProblemSpec {
        device: Device::Cuda,
        dtype: DType::Bf16,
        dhqk: 256,
        dhhv: 512,
        ..spec(4096)
    };
    let engine = |op: Op, spec: ProblemSpec| plan(op, &spec.validate(op).unwrap(), hopper).unwrap();
    let suited = [
        base,
        ProblemSpec { dtype: DType::F16, s: 1, ..base },
        ProblemSpec { dhqk: 512, dhhv: 1024, ..base },
        ProblemSpec { dhqk: 64, dhhv: 576, ..base },
        ProblemSpec { dhqk: 64, dhhv: 64, b: 1, num_seqs: 5, ..base },
    ];
    for spec in suited {
        for op in [Op::ChunkwiseFw, Op::ParallelFw, Op::ChunkwiseBw, Op::ParallelBw] {
            let plan = engine(op, spec);
            assert_eq!((plan.engine, plan.chunk_size), (Engine::Hopper, 64), "{spec:?}");
        }
    }
    let others = [
        ProblemSpec { dtype: DType::F32, ..base },
        ProblemSpec { dhqk: 96, ..base },
        ProblemSpec { dhhv: 80, ..base },
        ProblemSpec { dhqk: 576, ..base },
        ProblemSpec { s: 0, ..base },
        ProblemSpec { b: 0, ..base },
    ];
    for spec in others {
        for op in [Op::ChunkwiseFw, Op::ChunkwiseBw] {
            assert_eq!(engine(op, spec).engine, Engine::Cuda, "{spec:?}");
        }
    }
    let negative = ProblemSpec { qk_scale: -1.0, ..base };
    assert_eq!(engine(Op::ChunkwiseFw, negative).engine, Engine::Hopper);
    assert_eq!(engine(Op::ChunkwiseBw, negative).engine, Engine::Cuda);
    // As many tokens in all heads as the copy engine counts in 32 bits.
    let tokens = |b: i64| engine(Op::ChunkwiseBw, ProblemSpec { b, nh: 16, s: 1 << 20, ..base });
    assert_eq!(tokens(127).engine, Engine::Hopper);
    assert_eq!(tokens(128).engine, Engine::Cuda);
}

#[test]
fn long_sequences_of_few_heads_are_cut_in_segments() {
    let hopper = Capabilities { has_cuda: true, hopper: true };
    let plan_of = |op: Op, b: i64, nh: i64, s: i64| {
        let (device, dtype) = (Device::Cuda, DType::Bf16);
        let spec =
            ProblemSpec { device, dtype, b, nh, s, dhqk: 256, dhhv: 512, ..ProblemSpec::default() };
        plan(op, &spec.validate(op).unwrap(), hopper).unwrap()
    };
    let segments_of = |op: Op, b: i64, nh: i64, s: i64| plan_of(op, b, nh, s).segments;
    let segments = |b: i64, nh: i64, s: i64| segments_of(Op::ChunkwiseFw, b, nh, s);
    assert_eq!(segments(8, 8, 8192), 1, "the machine is full as it is");
    assert_eq!(segments(1, 8, 65536), 4, "32 blocks of 132 multiprocessors");
    assert_eq!(segments(1, 8, 512), 4);
    assert_eq!(segments(1, 8, 1024), 4);
    assert!(segments(1, 1, 65536) > 4);
    assert!(plan_of(Op::ChunkwiseFw, 1, 8, 512).catch_up, "short enough to take again");
    assert!(!plan_of(Op::ChunkwiseFw, 1, 8, 65536).catch_up);
    assert!(!plan_of(Op::ChunkwiseFw, 2, 8, 32768).catch_up);
    let small = |s: i64| {
        let (device, dtype) = (Device::Cuda, DType::Bf16);
        let dims = ProblemSpec { b: 1, dhqk: 64, dhhv: 64, ..spec(s) };
        let spec = ProblemSpec { device, dtype, ..dims };
        plan(Op::ChunkwiseFw, &spec.validate(Op::ChunkwiseFw).unwrap(), hopper).unwrap()
    };
    assert_eq!(small(256).segments, 1, "in one kernel");
    assert!(small(2048).catch_up);
    assert!(!plan_of(Op::ChunkwiseFw, 8, 8, 8192).catch_up, "in one piece");
    assert!(!plan_of(Op::ChunkwiseBw, 1, 8, 1024).catch_up);
    assert_eq!(segments_of(Op::ChunkwiseBw, 8, 8, 8192), 1);
    assert_eq!(segments_of(Op::ChunkwiseBw, 1, 8, 65536), 4, "four slices of DHQK per head");
}

#[test]
fn plans_print_themselves() {
    let problem = spec(128).validate(Op::ChunkwiseFw).unwrap();
    let plan = plan(Op::ChunkwiseFw, &problem, NO_CUDA).unwrap();
    let text = plan.to_string();
    assert!(text.contains("chunkwise_fw") && text.contains("Cpu"), "{text}");
    assert!(text.contains(&format!("L {}", plan.chunk_size)), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    /// Whatever passes validation has a plan: no overflow, chunks that cover the tokens.
    #[test]
    fn every_valid_problem_has_a_plan(
        (b, nh, s) in (size(), size(), size()),
        (dhqk, dhhv) in (size(), size()),
        (num_seqs, chunk_size) in (prop_oneof![Just(0), size()], prop_oneof![Just(0), size()]),
        op in prop::sample::select(OPS.to_vec()),
        sigmoid in any::<bool>(),
        hopper in any::<bool>(),
    ) {
        let gate = if sigmoid { Gate::Sigmoid { normalize: true } } else { Gate::Exponential };
        let dtype = DType::Bf16;
        let device = if hopper { Device::Cuda } else { Device::Cpu };
        let capabilities = Capabilities { has_cuda: hopper, hopper };
        let dims = ProblemSpec { dhqk, dhhv, device, ..spec(0) };
        let spec = ProblemSpec { b, nh, s, num_seqs, chunk_size, gate, dtype, ..dims };
        let Ok(problem) = spec.validate(op) else { return Ok(()) };
        let plan = plan(op, &problem, capabilities).unwrap();
        prop_assert_eq!(plan.op, op);
        prop_assert_eq!(plan.engine == Engine::Cpu, !hopper);
        prop_assert!(plan.segments >= 1);
        prop_assert!(plan.chunk_size >= 1 && plan.num_chunks >= 1);
        prop_assert!(hopper || plan.chunk_size <= s.max(1));
        let covered = i128::from(plan.chunk_size) * i128::from(plan.num_chunks);
        prop_assert!(covered >= i128::from(s));
        prop_assert!(plan.num_chunks >= num_seqs);
    }
}

fn size() -> impl Strategy<Value = i64> {
    prop_oneof![0i64..5, 1i64..1000, (0u32..63).prop_map(|bits| 1i64 << bits), any::<i64>()]
}
