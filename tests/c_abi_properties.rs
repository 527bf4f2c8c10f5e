//! Random valid problems through the C ABI against the float64 oracle: numbers within rounding,
//! every output element written and no other byte, the same bits on a second call.
//!
//! `MLSTM_PROPTEST_CASES` sets the number of cases (of all tests together), `MLSTM_PROPTEST_SEED`
//! repeats a run by the seed it printed.

mod common;

use common::call::{self, Scratch, Structs};
use common::case::{Case, Setup};
use common::oracle;
use common::runner;
use common::tensor::{POISON, Role, Tensor};
use mlstm::ffi::*;
use proptest::prelude::*;

/// Elements of the outputs as bytes.
type Bits = Vec<(&'static str, Vec<Vec<u8>>)>;

fn bits(tensors: &[Tensor]) -> Bits {
    let outputs = tensors.iter().filter(|tensor| tensor.role != Role::In);
    outputs.map(|tensor| (tensor.name, tensor.elements())).collect()
}

/// One call with outputs and workspace filled with `byte` before. Checks what may be touched.
fn run_once(setup: &mut Setup, scratch: &mut Scratch, byte: u8) -> Result<Bits, TestCaseError> {
    call::reset(&mut setup.tensors, byte);
    scratch.fill(byte);
    let before: Vec<Tensor> = setup.tensors.clone();
    let outcome = Structs::new(setup, scratch).call();
    prop_assert_eq!((outcome.status, outcome.message.as_str()), (MLSTM_OK, ""));
    prop_assert!(scratch.margins_are_clean(), "wrote beside the workspace");
    for (now, before) in setup.tensors.iter().zip(&before) {
        if now.role == Role::In {
            prop_assert_eq!(now.bytes(), before.bytes(), "wrote to the input {}", now.name);
        } else {
            prop_assert!(now.margins_are_clean(), "wrote beside the output {}", now.name);
        }
    }
    Ok(bits(&setup.tensors))
}

/// Elements that must stay as they were did, the others are what the oracle says.
fn compare(
    setup: &Setup,
    before: &Bits,
    after: &Bits,
    expected: &oracle::Expected,
) -> Result<(), TestCaseError> {
    for ((name, after), (_, before)) in after.iter().zip(before) {
        let tensor = setup.get(name).unwrap();
        let got = tensor.load();
        for (index, want) in expected.values[name].iter().enumerate() {
            let Some(want) = *want else {
                prop_assert_eq!(&after[index], &before[index], "{} [{}] changed", name, index);
                continue;
            };
            let (got, tolerance) = (got[index], expected.tolerance[name][index]);
            prop_assert!(!got.is_nan(), "{} [{}] is NaN, not {}", name, index, want);
            if !expected.ambiguous {
                prop_assert!(
                    oracle::close(got, want, tolerance, tensor.dtype),
                    "{} [{}] is {}, not {} +- {}: {:?}",
                    name,
                    index,
                    got,
                    want,
                    tolerance,
                    setup.problem
                );
            }
        }
    }
    Ok(())
}

fn check(case: &Case) -> Result<(), TestCaseError> {
    let mut setup = Setup::new(case);
    if matches!(case.op, MLSTM_OP_CHUNKWISE_BW | MLSTM_OP_PARALLEL_BW) {
        oracle::fill_saved(&mut setup);
    }
    let (outcome, needs) = call::query(case.op, &setup.problem);
    prop_assert_eq!((outcome.status, outcome.message.as_str()), (MLSTM_OK, ""));
    prop_assert!(needs.workspace_alignment.is_power_of_two());
    prop_assert!(needs.chunk_size >= 1 && needs.num_chunks >= 1);
    let mut scratch = Scratch::new(needs.workspace_size, needs.workspace_alignment);
    let expected = oracle::expected(&setup);

    call::reset(&mut setup.tensors, POISON);
    let before = bits(&setup.tensors);
    let first = run_once(&mut setup, &mut scratch, POISON)?;
    compare(&setup, &before, &first, &expected)?;

    // Other rubbish in outputs and workspace: what depends on it was not written.
    call::reset(&mut setup.tensors, 0x3e);
    let before = bits(&setup.tensors);
    let second = run_once(&mut setup, &mut scratch, 0x3e)?;
    for ((name, first), ((_, second), (_, before))) in first.iter().zip(second.iter().zip(&before))
    {
        for (index, want) in expected.values[name].iter().enumerate() {
            let same = if want.is_some() { &first[index] } else { &before[index] };
            prop_assert_eq!(&second[index], same, "{} [{}] on the second call", name, index);
        }
    }
    Ok(())
}

fn valid(op: mlstm_op) {
    let ops = if op == MLSTM_OP_STEP { 2 } else { 1 };
    runner::run(runner::cases(12_000) / 12 * ops, &Case::any(op), |case| check(&case));
}

#[test]
fn chunkwise_forward() {
    valid(MLSTM_OP_CHUNKWISE_FW);
}

#[test]
fn chunkwise_backward() {
    valid(MLSTM_OP_CHUNKWISE_BW);
}

#[test]
fn parallel_forward() {
    valid(MLSTM_OP_PARALLEL_FW);
}

#[test]
fn parallel_backward() {
    valid(MLSTM_OP_PARALLEL_BW);
}

#[test]
fn step() {
    valid(MLSTM_OP_STEP);
}
