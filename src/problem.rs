//! `Problem`: what is to be computed, validated once. Sizes, dtypes and options; no pointers.

use crate::error::{Error, Result};
use crate::tensor::DType;

/// Where the tensors live. Numbers follow DLPack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Device {
    /// Host memory.
    Cpu,
    /// CUDA device memory.
    Cuda,
}

/// Which cell is computed (`semantics`: mLSTMexp and mLSTMsig).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Gate {
    /// Exponential input gate with the max stabiliser m.
    Exponential,
    /// Sigmoid input gate; m is identically 0. Normalised: den = max(|N|, 1) + eps.
    Sigmoid {
        /// Whether h is divided by the denominator.
        normalize: bool,
    },
}

impl Gate {
    /// Whether there is a denominator, and so an n state.
    pub const fn has_normalizer(self) -> bool {
        !matches!(self, Self::Sigmoid { normalize: false })
    }

    /// Whether there is a stabiliser m.
    pub const fn has_stabilizer(self) -> bool {
        matches!(self, Self::Exponential)
    }
}

/// The operations of the library.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    /// Linear-time forward over chunks.
    ChunkwiseFw,
    /// Its gradient.
    ChunkwiseBw,
    /// Quadratic-time forward.
    ParallelFw,
    /// Its gradient.
    ParallelBw,
    /// 1 to 16 tokens per row on a pool of states.
    Step,
}

/// Tokens per row a step takes at most.
pub const MAX_STEP_TOKENS: i64 = 16;

/// Default of `eps`.
pub const DEFAULT_EPS: f64 = 1e-6;

/// A validated problem. Build it with [`ProblemSpec::validate`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Problem {
    /// Where the tensors live.
    pub device: Device,
    /// Which of these devices; -1 in a query means a bound over all of them.
    pub device_index: i32,
    /// B: batch size (1 with packed sequences).
    pub b: i64,
    /// NH: number of heads.
    pub nh: i64,
    /// S: tokens per row; with packed sequences, all tokens together.
    pub s: i64,
    /// DHQK: head dim of q and k.
    pub dhqk: i64,
    /// DHHV: head dim of v and h.
    pub dhhv: i64,
    /// Number of packed sequences, `None` if rows are not packed.
    pub num_seqs: Option<i64>,
    /// Slots in the state pool (step only).
    pub num_slots: i64,
    /// s: factor on q, DHQK^-0.5 by default.
    pub qk_scale: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// The cell.
    pub gate: Gate,
    /// Gradient without the denominator's part, as the peers compute it.
    pub detach_denominator: bool,
    /// Whether float32 matrix products may be rounded to TF32 (CUDA only).
    pub allow_tf32: bool,
    /// Whether to leave out engines made for one kind of device.
    pub generic_engine: bool,
    /// The caller's word, for a query, that the rows of all tensors of rank 4 will be aligned to 16
    /// bytes and ahead of each other (CUDA only).
    pub aligned: bool,
    /// dtype of q, k, v, h and their gradients.
    pub dtype: DType,
    /// dtype of i, f and their gradients.
    pub gate_dtype: DType,
    /// dtype of the C states; n and m states are of [`Problem::compute_dtype`].
    pub state_dtype: DType,
    /// Requested chunk length L; `None` lets the library choose.
    pub chunk_size: Option<i64>,
}

impl Problem {
    /// dtype of the arithmetic, of n, m and of the per-token vectors: f64 for f64, else f32.
    pub const fn compute_dtype(&self) -> DType {
        match self.dtype {
            DType::F64 => DType::F64,
            _ => DType::F32,
        }
    }

    /// Rows of the states: packed sequences if any, else the batch.
    pub fn state_rows(&self) -> i64 {
        self.num_seqs.unwrap_or(self.b)
    }
}

/// Unvalidated sizes and options: the safe mirror of the C struct `mlstm_problem`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ProblemSpec {
    /// See [`Problem::device`].
    pub device: Device,
    /// See [`Problem::device_index`].
    pub device_index: i32,
    /// See [`Problem::b`].
    pub b: i64,
    /// See [`Problem::nh`].
    pub nh: i64,
    /// See [`Problem::s`].
    pub s: i64,
    /// See [`Problem::dhqk`].
    pub dhqk: i64,
    /// See [`Problem::dhhv`].
    pub dhhv: i64,
    /// Number of packed sequences; 0 for none.
    pub num_seqs: i64,
    /// Slots in the pool; 0 for `b` (step only).
    pub num_slots: i64,
    /// 0 for DHQK^-0.5.
    pub qk_scale: f64,
    /// `None` for 1e-6.
    pub eps: Option<f64>,
    /// See [`Problem::gate`].
    pub gate: Gate,
    /// See [`Problem::detach_denominator`].
    pub detach_denominator: bool,
    /// See [`Problem::allow_tf32`].
    pub allow_tf32: bool,
    /// See [`Problem::generic_engine`].
    pub generic_engine: bool,
    /// See [`Problem::aligned`].
    pub aligned: bool,
    /// See [`Problem::dtype`].
    pub dtype: DType,
    /// `None` for `dtype`.
    pub gate_dtype: Option<DType>,
    /// `None` for f32 (f64 with f64 data).
    pub state_dtype: Option<DType>,
    /// 0 lets the library choose.
    pub chunk_size: i64,
}

impl Default for ProblemSpec {
    /// An empty float32 CPU problem; set at least `b, nh, s, dhqk, dhhv`.
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            device_index: 0,
            b: 0,
            nh: 0,
            s: 0,
            dhqk: 0,
            dhhv: 0,
            num_seqs: 0,
            num_slots: 0,
            qk_scale: 0.0,
            eps: None,
            gate: Gate::Exponential,
            detach_denominator: false,
            allow_tf32: false,
            generic_engine: false,
            aligned: false,
            dtype: DType::F32,
            gate_dtype: None,
            state_dtype: None,
            chunk_size: 0,
        }
    }
}

impl ProblemSpec {
    /// Checks everything that can be checked without pointers.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] or [`Error::Unsupported`], naming the field.
    pub fn validate(&self, op: Op) -> Result<Problem> {
        let sizes = [("b", self.b), ("nh", self.nh), ("s", self.s)];
        for (name, size) in sizes {
            if size < 0 {
                return Err(Error::invalid(format!("problem.{name}"), "a size >= 0", size));
            }
        }
        for (name, size) in [("dhqk", self.dhqk), ("dhhv", self.dhhv)] {
            if size < 1 {
                return Err(Error::invalid(format!("problem.{name}"), "a size >= 1", size));
            }
        }
        self.validate_rows(op)?;
        let state_dtype = self.validate_dtypes()?;
        let eps = self.eps.unwrap_or(DEFAULT_EPS);
        if !(self.is_finite(eps) && eps >= 0.0) {
            return Err(Error::invalid("problem.eps", "a finite number >= 0", eps));
        }
        if !self.is_finite(self.qk_scale) {
            return Err(Error::invalid("problem.qk_scale", "a finite number", self.qk_scale));
        }
        if self.chunk_size < 0 {
            return Err(Error::invalid("problem.chunk_size", "a length >= 0", self.chunk_size));
        }
        let device_ok = match self.device {
            Device::Cpu => (-1..=0).contains(&self.device_index),
            Device::Cuda => self.device_index >= -1,
        };
        if !device_ok {
            return Err(Error::invalid(
                "problem.device_index",
                "0 for the CPU, the device's number for CUDA (-1 in a query only)",
                self.device_index,
            ));
        }
        let problem = Problem {
            device: self.device,
            device_index: self.device_index,
            b: self.b,
            nh: self.nh,
            s: self.s,
            dhqk: self.dhqk,
            dhhv: self.dhhv,
            num_seqs: (self.num_seqs > 0).then_some(self.num_seqs),
            num_slots: if self.num_slots == 0 { self.b } else { self.num_slots },
            qk_scale: if self.qk_scale == 0.0 {
                (self.dhqk as f64).powf(-0.5)
            } else {
                self.qk_scale
            },
            eps,
            gate: self.gate,
            detach_denominator: self.detach_denominator,
            allow_tf32: self.allow_tf32,
            generic_engine: self.generic_engine,
            aligned: self.aligned,
            dtype: self.dtype,
            gate_dtype: self.gate_dtype.unwrap_or(self.dtype),
            state_dtype,
            chunk_size: (self.chunk_size > 0).then_some(self.chunk_size),
        };
        check_volume(&problem)?;
        Ok(problem)
    }

    /// Finite in the arithmetic's own precision: 1e300 is infinite in float32.
    fn is_finite(&self, number: f64) -> bool {
        match self.dtype {
            DType::F64 => number.is_finite(),
            _ => (number as f32).is_finite(),
        }
    }

    fn validate_rows(&self, op: Op) -> Result<()> {
        if self.num_seqs < 0 {
            return Err(Error::invalid("problem.num_seqs", "a count >= 0", self.num_seqs));
        }
        if self.num_slots < 0 {
            return Err(Error::invalid("problem.num_slots", "a count >= 0", self.num_slots));
        }
        if op == Op::Step {
            if !(1..=MAX_STEP_TOKENS).contains(&self.s) {
                return Err(Error::invalid(
                    "problem.s",
                    format!("1 to {MAX_STEP_TOKENS} tokens in a step"),
                    self.s,
                ));
            }
            if self.num_seqs != 0 {
                return Err(Error::invalid(
                    "problem.num_seqs",
                    "0 in a step (use slots)",
                    self.num_seqs,
                ));
            }
        } else {
            if self.num_seqs > 0 && self.b != 1 {
                return Err(Error::invalid(
                    "problem.b",
                    "1 with packed sequences (num_seqs > 0)",
                    self.b,
                ));
            }
            if self.num_slots != 0 {
                return Err(Error::invalid(
                    "problem.num_slots",
                    "0 outside a step",
                    self.num_slots,
                ));
            }
        }
        Ok(())
    }

    fn validate_dtypes(&self) -> Result<DType> {
        if !self.dtype.is_float() {
            return Err(Error::invalid(
                "problem.dtype",
                "float32, float64, bfloat16 or float16",
                self.dtype,
            ));
        }
        let gate_dtype = self.gate_dtype.unwrap_or(self.dtype);
        if gate_dtype != self.dtype && gate_dtype != DType::F32 {
            return Err(Error::invalid(
                "problem.gate_dtype",
                format!("float32 or the data's {}", self.dtype),
                gate_dtype,
            ));
        }
        let default = if self.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let state_dtype = self.state_dtype.unwrap_or(default);
        let state_ok = match self.dtype {
            DType::F64 => state_dtype == DType::F64,
            _ => matches!(state_dtype, DType::F32 | DType::Bf16 | DType::F16),
        };
        if !state_ok {
            return Err(Error::invalid(
                "problem.state_dtype",
                match self.dtype {
                    DType::F64 => "float64 (with float64 data)",
                    _ => "float32, bfloat16 or float16",
                },
                state_dtype,
            ));
        }
        Ok(state_dtype)
    }
}

/// No tensor of the problem may exceed the address space; later products then cannot overflow.
fn check_volume(problem: &Problem) -> Result<()> {
    let bytes = |sizes: &[i64]| -> Option<i64> {
        sizes.iter().try_fold(8i64, |product, &size| product.checked_mul(size.max(1)))
    };
    let p = problem;
    let widest = p.dhqk.max(p.dhhv);
    let state_rows = p.state_rows().max(p.num_slots);
    // Packed sequences each end in a chunk of their own.
    let chunks = p.s.checked_add(p.num_seqs.unwrap_or(0));
    let fits = bytes(&[p.b, p.nh, p.s, widest]).is_some()
        && bytes(&[state_rows, p.nh, p.dhqk, p.dhhv]).is_some()
        && chunks.is_some_and(|rows| bytes(&[p.b, p.nh, rows, widest, 16]).is_some());
    if fits {
        return Ok(());
    }
    Err(Error::invalid(
        "problem",
        "sizes whose tensors fit the address space",
        format!(
            "b {}, nh {}, s {}, dhqk {}, dhhv {}, num_seqs {}, num_slots {}",
            p.b,
            p.nh,
            p.s,
            p.dhqk,
            p.dhhv,
            p.num_seqs.unwrap_or(0),
            p.num_slots
        ),
    ))
}
