//! Calls with exactly one mistake: the right status, a message that names the argument, and not a
//! byte written. Settings as in `c_abi_properties.rs`; a case here is one valid problem with all
//! its mistakes.

mod common;

use common::breakage::{Break, Breaks};
use common::call::{self, Outcome, Scratch, Structs};
use common::case::{Case, Setup};
use common::runner;
use mlstm::ffi::*;
use proptest::prelude::*;

/// Everything that must not change: all but the workspace, which is undefined anyway.
struct Memory<'a> {
    setup: &'a Setup,
    scratch: &'a Scratch,
    tensors: Vec<Vec<u64>>,
}

impl<'a> Memory<'a> {
    fn new(setup: &'a Setup, scratch: &'a Scratch) -> Self {
        let tensors = setup.tensors.iter().map(|tensor| tensor.bytes().to_vec()).collect();
        Self { setup, scratch, tensors }
    }

    fn is_unchanged(&self) -> bool {
        self.setup.tensors.iter().zip(&self.tensors).all(|(now, then)| now.bytes() == then)
            && self.scratch.margins_are_clean()
    }
}

fn expect(
    what: &str,
    outcome: &Outcome,
    status: mlstm_status,
    names: &[String],
    memory: &Memory<'_>,
) -> Result<(), TestCaseError> {
    let message = &outcome.message;
    prop_assert_eq!(outcome.status, status, "{}: {}", what, message);
    let named = names.iter().any(|name| name == "*" || message.starts_with(name.as_str()));
    prop_assert!(named, "{what}: {message}");
    let says = message.contains(": expected ") && message.contains(", got ");
    let refuses = matches!(status, MLSTM_UNSUPPORTED | MLSTM_DEVICE_ERROR);
    prop_assert!(says || refuses, "{what}: {message}");
    prop_assert!(memory.is_unchanged(), "{what}: wrote something, and said {message}");
    Ok(())
}

/// What a query says about the problem alone must be what the call says.
fn expect_of_query(broken: &Break) -> Result<(), TestCaseError> {
    if !broken.what.starts_with("problem.") || broken.names.iter().any(|name| name == "*") {
        return Ok(());
    }
    // A query needs no device.
    if broken.status == MLSTM_DEVICE_ERROR {
        return Ok(());
    }
    let problem = &broken.structs.problem;
    // One that only the tensors contradict.
    if broken.what.starts_with("problem.num_s") && problem.num_seqs.max(problem.num_slots) >= 0 {
        return Ok(());
    }
    let (outcome, out) = call::query(broken.structs.op, problem);
    prop_assert_eq!(outcome.status, broken.status, "query, {}", broken.what);
    prop_assert_eq!((out.workspace_size, out.num_chunks), (0, 0));
    Ok(())
}

/// Wrong sizes and addresses of the structs themselves.
fn structs(valid: &Structs, memory: &Memory<'_>) -> Result<(), TestCaseError> {
    let args = valid.args(&valid.problem);
    let problem = call::words(&valid.problem, 64);
    let (args_size, problem_size) = (args[0] as usize, problem[0] as usize);
    let call = |args: &[u64], skip: usize| {
        // SAFETY: the words are a struct of the size they begin with, or are refused for it.
        unsafe { valid.call_at(args.as_ptr().wrapping_byte_add(skip)) }
    };
    let check = |what: &str, outcome: Outcome, status, name: &str| {
        expect(what, &outcome, status, &[name.to_string()], memory)
    };
    let invalid = MLSTM_INVALID_ARGUMENT;
    // SAFETY: null is refused.
    check("no args", unsafe { valid.call_at(std::ptr::null()) }, invalid, "args:")?;
    check("misaligned args", call(&args, 4), invalid, "args:")?;
    for size in [0, 1, 8, args_size - 8, args_size - 1, 1 << 17, usize::MAX] {
        let mut args = args.clone();
        args[0] = size as u64;
        check("args of a strange size", call(&args, 0), invalid, "args.struct_size:")?;
    }
    let mut longer = args.clone();
    longer[0] = args_size as u64 + 24;
    longer[args_size / 8 + 2] = 1;
    check("unknown member of args", call(&longer, 0), MLSTM_UNSUPPORTED, "args:")?;

    let with_problem = |problem: *const u64| call(&valid.args(problem.cast()), 0);
    check("no problem", with_problem(std::ptr::null()), invalid, "problem:")?;
    let odd = problem.as_ptr().wrapping_byte_add(2);
    check("misaligned problem", with_problem(odd), invalid, "problem:")?;
    for size in [0, 1, 8, problem_size - 1, 1 << 17, usize::MAX] {
        let mut problem = problem.clone();
        problem[0] = size as u64;
        let outcome = with_problem(problem.as_ptr());
        check("problem of a strange size", outcome, invalid, "problem.struct_size:")?;
    }
    let mut longer = problem.clone();
    longer[0] = problem_size as u64 + 8;
    longer[problem_size / 8] = 1 << 63;
    let outcome = with_problem(longer.as_ptr());
    check("unknown member of problem", outcome, MLSTM_UNSUPPORTED, "problem:")
}

fn check(case: &Case) -> Result<usize, TestCaseError> {
    let setup = Setup::new(case);
    let (outcome, needs) = call::query(case.op, &setup.problem);
    prop_assert_eq!(outcome.status, MLSTM_OK, "{}", outcome.message);
    let scratch = Scratch::new(needs.workspace_size, needs.workspace_alignment);
    let memory = Memory::new(&setup, &scratch);
    let valid = Structs::new(&setup, &scratch);
    structs(&valid, &memory)?;
    let breaks = Breaks::new(&setup, &valid);
    for broken in &breaks.all {
        let outcome = broken.structs.call();
        expect(&broken.what, &outcome, broken.status, &broken.names, &memory)?;
        expect_of_query(broken)?;
    }
    Ok(breaks.all.len())
}

fn rejected(op: mlstm_op) {
    let count = std::cell::Cell::new(0);
    runner::run(runner::cases(12_000) / 60, &Case::any(op), |case| {
        count.set(count.get() + check(&case)?);
        Ok(())
    });
    eprintln!("{} broken calls", count.get());
}

#[test]
fn chunkwise_forward() {
    rejected(MLSTM_OP_CHUNKWISE_FW);
}

#[test]
fn chunkwise_backward() {
    rejected(MLSTM_OP_CHUNKWISE_BW);
}

#[test]
fn parallel_forward() {
    rejected(MLSTM_OP_PARALLEL_FW);
}

#[test]
fn parallel_backward() {
    rejected(MLSTM_OP_PARALLEL_BW);
}

#[test]
fn step() {
    rejected(MLSTM_OP_STEP);
}

#[test]
fn query_checks_its_own_arguments() {
    // SAFETY: all zero is a value of this plain C struct.
    let mut problem: mlstm_problem = unsafe { std::mem::zeroed() };
    problem.struct_size = size_of::<mlstm_problem>();
    (problem.device, problem.dtype) = (MLSTM_DEVICE_CPU, MLSTM_F32);
    (problem.b, problem.nh, problem.s, problem.dhqk, problem.dhhv) = (1, 1, 1, 1, 1);
    for op in [0, 6, -1, i32::MAX] {
        let (outcome, _) = call::query(op, &problem);
        assert_eq!(outcome.status, MLSTM_INVALID_ARGUMENT);
        assert!(outcome.message.starts_with("op: expected "), "{}", outcome.message);
    }
    // SAFETY: null is refused.
    let outcome = call::outcome(unsafe { mlstm_query(1, &problem, std::ptr::null_mut()) });
    assert!(outcome.message.starts_with("out: expected "), "{}", outcome.message);
    // SAFETY: as above.
    let outcome = call::outcome(unsafe {
        let mut out: mlstm_requirements = std::mem::zeroed();
        mlstm_query(1, &problem, &mut out)
    });
    assert!(outcome.message.starts_with("out.struct_size: expected "), "{}", outcome.message);
    for device in [0, 3, -1] {
        let outcome = call::outcome(mlstm_preload(device, 0));
        assert!(outcome.message.starts_with("device: expected "), "{}", outcome.message);
    }
    assert_eq!(mlstm_preload(MLSTM_DEVICE_CPU, 0), MLSTM_OK);
    assert_eq!(call::outcome(MLSTM_OK).message, "", "a success clears the message");
}

/// Sizes in the billions without memory behind them: rejected or done in no time, never a crash.
#[test]
fn huge_empty_problems_return() {
    let case = Case { options: 0, strides: 0, ..plain(MLSTM_OP_CHUNKWISE_FW) };
    for (b, nh, s) in [(1 << 30, 1 << 20, 0), (0, 1 << 40, 1 << 10), (1 << 40, 0, 1 << 10)] {
        for op in 1..=5 {
            let s = if op == MLSTM_OP_STEP { 1 } else { s };
            // A step's slots have memory behind them.
            if op == MLSTM_OP_STEP && b != 0 {
                continue;
            }
            let setup = Setup::new(&Case { op, b, nh, s, ..case.clone() });
            let (outcome, needs) = call::query(op, &setup.problem);
            assert_eq!(outcome.status, MLSTM_OK, "{}", outcome.message);
            if needs.workspace_size > 1 << 26 {
                continue;
            }
            let scratch = Scratch::new(needs.workspace_size, needs.workspace_alignment);
            let mut structs = Structs::new(&setup, &scratch);
            structs.tensors.retain(|name, _| !name.contains("_initial") && !name.contains("_last"));
            let start = std::time::Instant::now();
            let outcome = structs.call();
            assert_eq!(outcome.status, MLSTM_OK, "{}", outcome.message);
            assert!(start.elapsed().as_secs() < 5);
        }
    }
}

fn plain(op: mlstm_op) -> Case {
    Case {
        op,
        b: 1,
        nh: 1,
        s: 1,
        dhqk: 1,
        dhhv: 1,
        dtype: MLSTM_F32,
        chunk_size: 0,
        lengths: vec![],
        options: 0,
        strides: 0,
        numbers: 0,
    }
}
