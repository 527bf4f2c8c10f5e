//! Random problems, the memory they live in, and what the oracle says about them. Shared by the
//! tests of the C ABI and of the Rust API.

#![allow(dead_code, reason = "each test program uses a part of it")]

pub mod breakage;
pub mod call;
pub mod case;
pub mod noise;
pub mod oracle;
pub mod runner;
pub mod tensor;
