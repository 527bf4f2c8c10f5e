//! mLSTM (xLSTM) kernels behind one stable C ABI, with a safe Rust API over the same core.
//!
//! The same calls run on every device: SIMD and threads on the CPU, CUDA kernels on NVIDIA GPUs
//! (through the C ABI; the safe API borrows host memory).
//!
//! # Glossary
//! One notation everywhere (Rust, C, Python): B batch, NH heads, S sequence length, DHQK head dim
//! of q and k, DHHV head dim of v and h, L chunk length, NC number of chunks. Per token q, k, v,
//! the input and forget gate pre-activations i and f, and the output h. The state is the matrix C,
//! the normaliser n and the stabiliser m:
//!
//! ```text
//! logf_t = logsigmoid(f_t)
//! m_t    = max(logf_t + m_{t-1}, i_t)
//! C_t    = exp(logf_t + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) k_t v_t^T
//! n_t    = exp(logf_t + m_{t-1} - m_t) n_{t-1} + exp(i_t - m_t) k_t
//! N_t    = s q_t^T n_t
//! h_t    = s q_t^T C_t / (max(|N_t|, exp(-m_t)) + eps)
//! ```
//!
//! With the sigmoid input gate m is 0, `exp(i)` becomes `sigmoid(i)`, and the denominator is
//! `max(|N|, 1) + eps`, or absent when not normalised.
//!
//! # Where things live
//! Imports point down: `capi` (the exported functions) -> [`api`] (validate, decide, run) ->
//! [`ops`] (checks across tensors), [`dispatch`] (which kernel), `cpu` and `cuda` (the kernels;
//! those of `cuda` are in `kernels/`). `unsafe` is found in `capi` and the backends only.

pub mod api;
mod capi;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[doc(hidden)]
pub use cpu::reference;
pub mod dispatch;
pub mod error;
pub mod ops;
pub mod problem;
pub mod tensor;
pub mod workspace;

/// The C ABI as C sees it, for this crate's own tests; Rust programs use the functions below.
#[doc(hidden)]
pub mod ffi {
    pub use crate::capi::exports::*;
    pub use crate::capi::types::*;
}

pub use api::{
    Gradients, Inputs, Outputs, Requirements, Saved, Scratch, Slots, State, StateMut, chunkwise_bw,
    chunkwise_fw, parallel_bw, parallel_fw, preload, query, step,
};
pub use error::{Error, Result};
pub use problem::{Device, Gate, Op, ProblemSpec};
pub use tensor::{DType, Tensor, TensorMut};
