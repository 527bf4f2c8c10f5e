//! proptest with a seed of its own per run, printed so that the run can be repeated.

use std::hash::{BuildHasher, Hasher};

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};

use super::noise::Noise;

/// Number of cases of all property tests together.
pub fn cases(default: u32) -> u32 {
    let wanted = std::env::var("MLSTM_PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    wanted.unwrap_or(default)
}

pub fn run<S: Strategy>(
    cases: u32,
    strategy: &S,
    test: impl Fn(S::Value) -> Result<(), TestCaseError>,
) {
    let seed = std::env::var("MLSTM_PROPTEST_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| std::hash::RandomState::new().build_hasher().finish());
    eprintln!("{cases} cases, MLSTM_PROPTEST_SEED={seed}");
    let mut noise = Noise(seed);
    let bytes: Vec<u8> = (0..4).flat_map(|_| noise.bits().to_ne_bytes()).collect();
    let config = Config { cases: cases.max(1), failure_persistence: None, ..Config::default() };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    if let Err(error) = TestRunner::new_with_rng(config, rng).run(strategy, test) {
        panic!("{error}");
    }
}
