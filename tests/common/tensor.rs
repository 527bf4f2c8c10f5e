//! A tensor in memory of its own, strided at will, with poisoned gaps and margins.

use half::{bf16, f16};
use mlstm::ffi::*;

use super::noise::Noise;

/// Bytes on both sides that nobody may touch.
const MARGIN: usize = 128;

/// All bits set: NaN in every float dtype, -1 in the integers.
pub const POISON: u8 = 0xff;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    In,
    Out,
    /// A pool that a step updates in place.
    InOut,
}

#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: &'static str,
    pub role: Role,
    pub dtype: mlstm_dtype,
    pub shape: Vec<i64>,
    pub stride: Vec<i64>,
    /// Logical values, row-major, as the dtype holds them; for inputs.
    pub values: Vec<f64>,
    memory: Vec<u64>,
    /// Byte of element [0, ..., 0] in `memory`.
    origin: usize,
}

pub fn item(dtype: mlstm_dtype) -> usize {
    match dtype {
        MLSTM_F64 | MLSTM_I64 => 8,
        MLSTM_F32 | MLSTM_I32 => 4,
        MLSTM_BF16 | MLSTM_F16 => 2,
        _ => 1,
    }
}

/// The value as the dtype holds it.
pub fn rounded(dtype: mlstm_dtype, x: f64) -> f64 {
    match dtype {
        MLSTM_F32 => f64::from(x as f32),
        MLSTM_BF16 => bf16::from_f64(x).to_f64(),
        MLSTM_F16 => f16::from_f64(x).to_f64(),
        _ => x,
    }
}

/// Strides of a shape: dense in an order of the dimensions, with padding, turned around, or (inputs)
/// repeated, as `choice` says; 0 means dense and row-major. The last dimension of tensors with a
/// feature dimension stays dense. Returns the strides and the offset of the first element.
fn layout(shape: &[i64], feature: bool, repeat: bool, choice: u64) -> (Vec<i64>, i64) {
    let mut noise = Noise(choice);
    let plain = choice == 0;
    let free = shape.len() - usize::from(feature);
    let mut order: Vec<usize> = (0..shape.len()).collect();
    if !plain && free > 1 && noise.once_in(2) {
        order.swap(noise.below(free), free - 1);
    }
    let (mut stride, mut step, mut origin) = (vec![0; shape.len()], 1i64, 0);
    for &dim in order.iter().rev() {
        stride[dim] = step;
        let padding = if !plain && noise.once_in(4) { 1 + noise.below(5) as i64 } else { 0 };
        step *= shape[dim].max(1) + padding;
        if plain || (feature && dim == free) {
            continue;
        }
        match noise.below(8) {
            0 => {
                origin += stride[dim] * (shape[dim] - 1).max(0);
                stride[dim] = -stride[dim];
            }
            1 if repeat => stride[dim] = 0,
            // No index reaches along it, so any number will do.
            2 if shape[dim] == 1 => stride[dim] = i64::MIN + noise.below(9) as i64,
            _ => {}
        }
    }
    if feature && shape[free] == 1 && !plain && noise.once_in(2) {
        stride[free] = -7;
    }
    (stride, origin)
}

impl Tensor {
    pub fn new(
        name: &'static str,
        role: Role,
        dtype: mlstm_dtype,
        shape: &[i64],
        [feature, repeat]: [bool; 2],
        choice: u64,
    ) -> Self {
        let (stride, first) = layout(shape, feature, repeat, choice);
        let count: i64 = shape.iter().product();
        let reach = |dim: (&i64, &i64)| {
            // Strides of single-element dimensions may be absurd.
            if *dim.0 > 1 { dim.1.abs() * (dim.0 - 1) } else { 0 }
        };
        let span: i64 =
            if count == 0 { 0 } else { 1 + shape.iter().zip(&stride).map(reach).sum::<i64>() };
        // Not aligned to more than the element, if not by chance.
        let shift = Noise(choice).below(5) * usize::from(choice != 0);
        let bytes = MARGIN * 2 + (span as usize + shift) * item(dtype);
        let memory = vec![u64::from_ne_bytes([POISON; 8]); bytes.div_ceil(8)];
        let first = if count == 0 { 0 } else { first as usize };
        let origin = MARGIN + (shift + first) * item(dtype);
        let (shape, values) = (shape.to_vec(), vec![]);
        Self { name, role, dtype, shape, stride, values, memory, origin }
    }

    pub fn len(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }

    pub fn address(&self) -> *mut u8 {
        self.memory.as_ptr().cast_mut().cast::<u8>().wrapping_add(self.origin)
    }

    pub fn bytes(&self) -> &[u64] {
        &self.memory
    }

    pub fn descriptor(&self) -> mlstm_tensor {
        let (mut shape, mut stride) = ([-1; 4], [i64::MAX; 4]);
        shape[..self.shape.len()].copy_from_slice(&self.shape);
        stride[..self.stride.len()].copy_from_slice(&self.stride);
        let rank = self.shape.len() as i32;
        mlstm_tensor { data: self.address().cast(), shape, stride, dtype: self.dtype, rank }
    }

    /// Byte offsets in `memory` of all elements, row-major.
    fn places(&self) -> Vec<usize> {
        if self.len() == 0 {
            return vec![];
        }
        let mut places = vec![self.origin as i64];
        for (&size, &stride) in self.shape.iter().zip(&self.stride) {
            let step = if size > 1 { stride * item(self.dtype) as i64 } else { 0 };
            places = places
                .iter()
                .flat_map(|at| (0..size).map(move |index| at + index * step))
                .collect();
        }
        places.into_iter().map(|place| place as usize).collect()
    }

    fn raw(&self) -> Vec<u8> {
        self.memory.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    fn set_raw(&mut self, raw: &[u8]) {
        for (word, bytes) in self.memory.iter_mut().zip(raw.chunks_exact(8)) {
            *word = u64::from_ne_bytes(bytes.try_into().unwrap());
        }
    }

    pub fn load(&self) -> Vec<f64> {
        let raw = self.raw();
        let bytes = |at: usize| &raw[at..at + item(self.dtype)];
        let get = |at| match self.dtype {
            MLSTM_F32 => f64::from(f32::from_ne_bytes(bytes(at).try_into().unwrap())),
            MLSTM_F64 => f64::from_ne_bytes(bytes(at).try_into().unwrap()),
            MLSTM_BF16 => bf16::from_ne_bytes(bytes(at).try_into().unwrap()).to_f64(),
            MLSTM_F16 => f16::from_ne_bytes(bytes(at).try_into().unwrap()).to_f64(),
            MLSTM_I32 => f64::from(i32::from_ne_bytes(bytes(at).try_into().unwrap())),
            MLSTM_I64 => i64::from_ne_bytes(bytes(at).try_into().unwrap()) as f64,
            _ => f64::from(raw[at]),
        };
        self.places().into_iter().map(get).collect()
    }

    /// Writes values (`None`: leaves poison) and remembers what the memory then says, which
    /// differs by rounding and where elements share memory.
    pub fn store(&mut self, values: impl IntoIterator<Item = Option<f64>>) {
        let mut raw = self.raw();
        for (at, x) in self.places().into_iter().zip(values) {
            let Some(x) = x else { continue };
            let bytes: &[u8] = match self.dtype {
                MLSTM_F32 => &(x as f32).to_ne_bytes(),
                MLSTM_F64 => &x.to_ne_bytes(),
                MLSTM_BF16 => &bf16::from_f64(x).to_ne_bytes(),
                MLSTM_F16 => &f16::from_f64(x).to_ne_bytes(),
                MLSTM_I32 => &(x as i32).to_ne_bytes(),
                MLSTM_I64 => &(x as i64).to_ne_bytes(),
                _ => &[x as u8],
            };
            raw[at..at + bytes.len()].copy_from_slice(bytes);
        }
        self.set_raw(&raw);
        self.values = self.load();
    }

    /// Sets the bytes of all elements; margins and gaps stay poisoned.
    pub fn fill(&mut self, byte: u8) {
        let mut raw = self.raw();
        for at in self.places() {
            raw[at..at + item(self.dtype)].fill(byte);
        }
        self.set_raw(&raw);
    }

    /// The bytes of one element.
    pub fn element(&self, index: usize) -> Vec<u8> {
        let at = self.places()[index];
        self.raw()[at..at + item(self.dtype)].to_vec()
    }

    /// The bytes of all elements.
    pub fn elements(&self) -> Vec<Vec<u8>> {
        let raw = self.raw();
        self.places().into_iter().map(|at| raw[at..at + item(self.dtype)].to_vec()).collect()
    }

    /// Whether all bytes but those of elements are poison still.
    pub fn margins_are_clean(&self) -> bool {
        let mut raw = self.raw();
        for at in self.places() {
            raw[at..at + item(self.dtype)].fill(POISON);
        }
        raw.iter().all(|&byte| byte == POISON)
    }
}
