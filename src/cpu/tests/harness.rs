//! Random tensors, poisoned outputs and error measures for the tests.

use std::cell::Cell as StdCell;

use crate::cpu::reference::{self, Cell, Forward, Sequence};
use crate::tensor::{DType, View};
use crate::workspace::Workspace;

/// A small random generator; its seed is printed, and so shown when a test fails.
pub(super) struct Random {
    state: StdCell<u64>,
}

impl Random {
    /// Seeded by the clock, or by `MLSTM_TEST_SEED` to repeat a failure.
    pub(super) fn new() -> Self {
        let seed = std::env::var("MLSTM_TEST_SEED").ok().and_then(|text| text.parse().ok());
        let seed = seed.unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.map_or(1, |elapsed| elapsed.as_nanos() as u64)
        });
        println!("MLSTM_TEST_SEED={seed}");
        Self { state: StdCell::new(seed) }
    }

    pub(super) fn seeded(seed: u64) -> Self {
        Self { state: StdCell::new(seed) }
    }

    pub(super) fn bits(&self) -> u64 {
        // SplitMix64.
        let state = self.state.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.state.set(state);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn uniform(&self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(super) fn normal(&self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    pub(super) fn below(&self, bound: usize) -> usize {
        (self.bits() % bound as u64) as usize
    }

    pub(super) fn pick<T: Clone>(&self, choices: &[T]) -> T {
        choices[self.below(choices.len())].clone()
    }
}

/// A tensor with memory of its own, `gap` unused elements between its rows.
#[derive(Clone)]
pub(super) struct Buffer {
    memory: Vec<u64>,
    pub shape: Vec<i64>,
    stride: Vec<i64>,
    dtype: DType,
}

impl Buffer {
    /// All bytes 0xff: NaN in every floating-point type. `order` lists the dimensions from
    /// outermost to innermost.
    pub(super) fn poisoned(shape: &[i64], order: &[usize], gap: i64, dtype: DType) -> Self {
        let mut stride = vec![0; shape.len()];
        let mut step = 1;
        for (depth, &dim) in order.iter().rev().enumerate() {
            stride[dim] = step;
            step *= shape[dim].max(1);
            if depth == 0 {
                step += gap;
            }
        }
        let bytes = step as usize * dtype.size() + 8;
        Self { memory: vec![u64::MAX; bytes / 8 + 1], shape: shape.to_vec(), stride, dtype }
    }

    /// Row-major and dense.
    pub(super) fn dense(shape: &[i64], dtype: DType) -> Self {
        Self::poisoned(shape, &(0..shape.len()).collect::<Vec<_>>(), 0, dtype)
    }

    /// Gives a dimension stride 0.
    pub(super) fn expand(&mut self, dim: usize) {
        self.stride[dim] = 0;
    }

    pub(super) fn view(&self) -> View {
        let mut view = View {
            data: self.memory.as_ptr().cast_mut().cast(),
            shape: [0; 4],
            stride: [0; 4],
            dtype: self.dtype,
            rank: self.shape.len(),
        };
        for dim in 0..self.shape.len() {
            view.shape[dim] = self.shape[dim];
            view.stride[dim] = self.stride[dim];
        }
        view
    }

    fn offset(&self, index: &[usize]) -> usize {
        index.iter().zip(&self.stride).map(|(&i, &s)| i * s as usize).sum()
    }

    pub(super) fn get(&self, index: &[usize]) -> f64 {
        let p = self.memory.as_ptr();
        let at = self.offset(index);
        // SAFETY: within the memory by construction of the strides.
        unsafe {
            match self.dtype {
                DType::F32 => f64::from(*p.cast::<f32>().add(at)),
                DType::F64 => *p.cast::<f64>().add(at),
                DType::Bf16 => (*p.cast::<half::bf16>().add(at)).to_f64(),
                DType::F16 => (*p.cast::<half::f16>().add(at)).to_f64(),
                DType::I32 => f64::from(*p.cast::<i32>().add(at)),
                DType::I64 => *p.cast::<i64>().add(at) as f64,
                DType::U8 => f64::from(*p.cast::<u8>().add(at)),
            }
        }
    }

    pub(super) fn set(&mut self, index: &[usize], x: f64) {
        let at = self.offset(index);
        let p = self.memory.as_mut_ptr();
        // SAFETY: as `get`.
        unsafe {
            match self.dtype {
                DType::F32 => *p.cast::<f32>().add(at) = x as f32,
                DType::F64 => *p.cast::<f64>().add(at) = x,
                DType::Bf16 => *p.cast::<half::bf16>().add(at) = half::bf16::from_f64(x),
                DType::F16 => *p.cast::<half::f16>().add(at) = half::f16::from_f64(x),
                DType::I32 => *p.cast::<i32>().add(at) = x as i32,
                DType::I64 => *p.cast::<i64>().add(at) = x as i64,
                DType::U8 => *p.cast::<u8>().add(at) = x as u8,
            }
        }
    }

    /// Every index, row-major.
    pub(super) fn indices(&self) -> Vec<Vec<usize>> {
        let mut all = vec![vec![]];
        for &size in &self.shape {
            all = all
                .into_iter()
                .flat_map(|index: Vec<usize>| {
                    (0..size as usize).map(move |i| {
                        let mut index = index.clone();
                        index.push(i);
                        index
                    })
                })
                .collect();
        }
        all
    }

    pub(super) fn fill(mut self, mut value: impl FnMut() -> f64) -> Self {
        for index in self.indices() {
            self.set(&index, value());
        }
        self
    }

    /// `count` rows of the last dimension from `index` (without the last) on, advancing `dim`.
    pub(super) fn rows(&self, index: &[usize], dim: usize, count: usize) -> Vec<f64> {
        let cols = *self.shape.last().unwrap() as usize;
        let mut out = Vec::with_capacity(count * cols);
        let mut at = index.to_vec();
        for row in 0..count {
            at[dim] = index[dim] + row;
            for col in 0..cols {
                let mut full = at.clone();
                full.push(col);
                out.push(self.get(&full));
            }
        }
        out
    }

    pub(super) fn bytes(&self) -> &[u64] {
        &self.memory
    }
}

/// Scratch filled with NaN.
pub(super) struct Poisoned(Vec<u64>);

impl Poisoned {
    pub(super) fn new(bytes: usize) -> Self {
        Self(vec![u64::MAX; bytes / 8 + 16])
    }

    pub(super) fn workspace(&mut self, bytes: usize) -> Workspace {
        let start = self.0.as_mut_ptr().cast::<u8>();
        let shift = start.align_offset(64);
        Workspace { data: start.wrapping_add(shift), len: bytes }
    }
}

/// Frobenius norm of the difference over that of what is expected, gathered over parts.
#[derive(Default, Clone, Copy, Debug)]
pub(super) struct Error {
    difference: f64,
    norm: f64,
}

impl Error {
    pub(super) fn add(&mut self, got: f64, expected: f64) {
        // Two infinities, or a value that is expected not to be finite, count as they are.
        if got == expected {
            self.norm += if expected.is_finite() { expected * expected } else { 0.0 };
            return;
        }
        self.difference += (got - expected) * (got - expected);
        self.norm += expected * expected;
    }

    pub(super) fn extend(&mut self, got: &[f64], expected: &[f64]) {
        assert_eq!(got.len(), expected.len());
        for (&got, &expected) in got.iter().zip(expected) {
            assert!(!expected.is_nan(), "the oracle is NaN where the kernel says {got}");
            self.add(got, expected);
        }
    }

    /// Adds to the norm of what is expected alone.
    pub(super) fn expect(&mut self, expected: &[f64]) {
        self.norm += expected.iter().map(|x| x * x).sum::<f64>();
    }

    /// Relative to at least `size`, for quantities that may be nearly zero as a whole.
    pub(super) fn relative(&self, size: f64) -> f64 {
        if self.difference == 0.0 {
            return 0.0;
        }
        self.difference.sqrt() / self.size().max(size)
    }

    /// Norm of what is expected.
    pub(super) fn size(&self) -> f64 {
        self.norm.sqrt()
    }
}

/// The same with absolute values for all factors of sums: what these would be if nothing cancelled.
pub(super) fn magnitudes(sequence: &Sequence) -> Sequence {
    let positive = |x: &[f64]| x.iter().map(|x| x.abs()).collect();
    let mut terms = sequence.clone();
    terms.q = positive(&sequence.q);
    terms.k = positive(&sequence.k);
    terms.v = positive(&sequence.v);
    terms.initial.c = positive(&sequence.initial.c);
    terms.initial.n = positive(&sequence.initial.n);
    terms
}

/// The terms of each h: those of its numerator, and h times those of its denominator. Rounding errors are
/// relative to them, whatever is left of their sums.
pub(super) fn terms_of_h(cell: &Cell, sequence: &Sequence, forward: &Forward) -> Vec<f64> {
    let terms = reference::forward(cell, &magnitudes(sequence));
    let each = |(at, (h, numerator)): (usize, (&f64, &f64))| {
        let (n, m) = (at / sequence.dhhv, forward.m[at / sequence.dhhv]);
        let [own, all] = [&forward, &&terms].map(|it| reference::denominator(cell, it.n[n], m));
        let denominator = if cell.gate.has_normalizer() { h.abs() * terms.n[n] } else { 0.0 };
        if own.is_finite() { (numerator * all + denominator) / own } else { 0.0 }
    };
    forward.h.iter().zip(&terms.h).enumerate().map(each).collect()
}
