//! A view of somebody else's memory: pointer, shape, stride and dtype. All arithmetic on extents
//! and overlap lives here, in checked 64-bit integers, so no other module computes an address range.

use std::fmt;
use std::marker::PhantomData;

use crate::error::{Error, Result};

/// Highest rank any argument has: (B, NH, S, D).
pub const MAX_RANK: usize = 4;

/// Element types of tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// IEEE binary64.
    F64,
    /// bfloat16.
    Bf16,
    /// IEEE binary16.
    F16,
    /// Signed 32-bit integer (indices).
    I32,
    /// Signed 64-bit integer (indices).
    I64,
    /// Byte; any non-zero value is true (flags).
    U8,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::Bf16 | Self::F16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::F64 | Self::I64 => 8,
        }
    }

    /// Whether tensors of data (q, k, v, h) may have it.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F64 | Self::Bf16 | Self::F16)
    }

    /// The name used in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F64 => "float64",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
            Self::I32 => "int32",
            Self::I64 => "int64",
            Self::U8 => "uint8",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name())
    }
}

/// A Rust type that tensors are made of.
pub trait Element: Copy + Send + Sync + 'static {
    /// Its [`DType`].
    const DTYPE: DType;
}

macro_rules! element {
    ($($ty:ty => $dtype:ident),* $(,)?) => {
        $(impl Element for $ty { const DTYPE: DType = DType::$dtype; })*
    };
}
element!(f32 => F32, f64 => F64, half::bf16 => Bf16, half::f16 => F16, i32 => I32, i64 => I64, u8 => U8);

/// An untyped strided view. Whoever builds one vouches that every element it reaches is valid
/// memory for as long as it is used: the C boundary by contract, [`Tensor`] and [`TensorMut`] by
/// borrowing a slice.
#[derive(Clone, Copy)]
pub struct View {
    pub(crate) data: *mut u8,
    pub(crate) shape: [i64; MAX_RANK],
    pub(crate) stride: [i64; MAX_RANK],
    pub(crate) dtype: DType,
    pub(crate) rank: usize,
}

// SAFETY-free by design: a View is plain data; dereferencing it is up to the backends.
// The backends move views to worker threads through typed wrappers of their own.

impl fmt::Debug for View {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}{:?} strides {:?}", self.dtype, self.shape(), self.strides())
    }
}

/// Byte range `[low, high)` that a view touches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    low: i128,
    high: i128,
}

impl Extent {
    /// Whether the ranges share a byte, as they must where views overlap.
    pub(crate) const fn meets(&self, other: &Self) -> bool {
        self.low < other.high && other.low < self.high
    }
}

impl View {
    /// Strides that no index walks along are whatever the caller left there: 0 from here on, so
    /// that kernels may compute with them.
    pub(crate) fn new(
        data: *mut u8,
        dtype: DType,
        rank: usize,
        shape: [i64; MAX_RANK],
        stride: [i64; MAX_RANK],
    ) -> Self {
        let mut view = Self { data, shape, stride, dtype, rank };
        for (dim, (size, stride)) in view.shape.iter_mut().zip(&mut view.stride).enumerate() {
            if dim >= rank {
                *size = 0;
            }
            if *size < 2 {
                *stride = 0;
            }
        }
        view
    }

    /// Sizes of the used dimensions.
    pub fn shape(&self) -> &[i64] {
        self.shape.get(..self.rank).unwrap_or(&self.shape)
    }

    /// Strides of the used dimensions, in elements.
    pub fn strides(&self) -> &[i64] {
        self.stride.get(..self.rank).unwrap_or(&self.stride)
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.shape().contains(&0)
    }

    /// Whether every row (along the last dimension) starts at a multiple of 16 bytes.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "CUDA's"))]
    pub(crate) fn has_aligned_rows(&self) -> bool {
        let item = self.dtype.size() as i64;
        let rows = self.strides().iter().take(self.rank.saturating_sub(1));
        (self.data as usize).is_multiple_of(16)
            // Exact even where the product wraps: 2^64 is a multiple of 16.
            && rows.into_iter().all(|stride| stride.wrapping_mul(item) % 16 == 0)
    }

    /// Whether a GPU's copy engine can take its rows: aligned ones, ahead of each other and not too
    /// far apart.
    pub fn suits_copy_engine(&self) -> bool {
        let item = self.dtype.size() as i64;
        let steps = self.shape().iter().zip(self.strides());
        self.has_aligned_rows()
            && steps.into_iter().all(|(&size, &stride)| {
                size <= 1 || (stride > 0 && stride.saturating_mul(item) < 1 << 40)
            })
    }

    /// Whether both are the same elements at the same place.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.data == other.data
            && self.dtype == other.dtype
            && self.shape() == other.shape()
            && self.strides() == other.strides()
    }

    /// Saturating: four products of 64-bit numbers can exceed 128 bits, and whatever does is far
    /// outside any address space.
    pub(crate) fn extent(&self) -> Extent {
        let base = self.data as usize as i128;
        if self.is_empty() {
            return Extent { low: base, high: base };
        }
        let (mut low, mut high) = (0i128, 0i128);
        for (&size, &stride) in self.shape().iter().zip(self.strides()) {
            let reach = (i128::from(size) - 1) * i128::from(stride);
            if reach < 0 {
                low = low.saturating_add(reach);
            } else {
                high = high.saturating_add(reach);
            }
        }
        let item = self.dtype.size() as i128;
        Extent {
            low: low.saturating_mul(item).saturating_add(base),
            high: high.saturating_add(1).saturating_mul(item).saturating_add(base),
        }
    }

    /// Dimensions as (byte stride, size), largest stride first; size-1 dimensions dropped and
    /// dimensions that continue one another merged, so that equal memory patterns compare equal.
    /// The element itself is the innermost dimension (stride 1 byte).
    fn pattern(&self) -> Vec<(i128, i128)> {
        let item = self.dtype.size() as i128;
        let mut dims: Vec<(i128, i128)> = self
            .shape()
            .iter()
            .zip(self.strides())
            .filter(|(size, _)| **size > 1)
            .map(|(&size, &stride)| ((i128::from(stride) * item).abs(), i128::from(size)))
            .collect();
        dims.push((1, item));
        dims.sort_unstable_by(|a, b| b.cmp(a));
        let mut merged: Vec<(i128, i128)> = Vec::with_capacity(dims.len());
        for (stride, size) in dims {
            match merged.last_mut() {
                // Saturating: sizes along which nothing moves have no bound.
                Some(outer) if outer.0 == stride * size => {
                    *outer = (stride, outer.1.saturating_mul(size));
                }
                _ => merged.push((stride, size)),
            }
        }
        merged
    }

    /// Whether its elements lie in order without gaps.
    fn is_dense(&self) -> bool {
        let mut step = 1i64;
        self.shape().iter().zip(self.strides()).rev().all(|(&size, &stride)| {
            let next = size <= 1 || stride == step;
            step = step.saturating_mul(size);
            next
        })
    }

    /// Whether two different indices may reach the same byte. Exact for strides that nest, each
    /// longer than all that lies within; others, which no allocation has, count as overlapping.
    fn overlaps_itself(&self) -> bool {
        // Most tensors are dense, which is soon seen.
        if self.is_empty() || self.is_dense() {
            return false;
        }
        let pattern = self.pattern();
        pattern.iter().enumerate().any(|(level, &(stride, _))| {
            let inner: i128 =
                pattern.iter().skip(level + 1).map(|(stride, size)| stride * (size - 1)).sum();
            stride <= inner
        })
    }

    /// Whether the two views share a byte. Exact for slices of one buffer; where an exact answer
    /// would take long, views whose byte ranges meet count as overlapping.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        if self.is_empty() || other.is_empty() {
            return false;
        }
        let (a, b) = (self.extent(), other.extent());
        if !a.meets(&b) {
            return false;
        }
        // One lattice for both: a dimension that one of them lacks has size 1 there.
        let ours = self.pattern().into_iter().map(|(stride, size)| (stride, size, 1));
        let theirs = other.pattern().into_iter().map(|(stride, size)| (stride, 1, size));
        let mut dims: Vec<_> = ours.chain(theirs).filter(|dim| dim.0 != 0).collect();
        dims.sort_unstable_by(|x, y| y.cmp(x));
        dims.dedup_by(|next, kept| {
            let same = next.0 == kept.0;
            if same {
                kept.1 += next.1 - 1;
                kept.2 += next.2 - 1;
            }
            same
        });
        meets(b.low - a.low, &dims, &mut 1024)
    }

    /// Checks rank, shape, dtype, alignment, that the view lies within the address space, and that
    /// it is not null. `shape_names` labels the dimensions in messages, e.g. `b, nh, s, dhqk`.
    pub(crate) fn check(
        &self,
        name: &str,
        dtype: DType,
        shape: &[i64],
        shape_names: impl fmt::Display,
    ) -> Result<()> {
        if self.rank != shape.len() {
            return Err(Error::invalid(
                format!("{name}.rank"),
                format!("{} ({shape_names})", shape.len()),
                self.rank,
            ));
        }
        if self.dtype != dtype {
            return Err(Error::invalid(format!("{name}.dtype"), dtype.name(), self.dtype));
        }
        if self.shape() != shape {
            return Err(Error::invalid(
                format!("{name}.shape"),
                format!("{shape:?} ({shape_names})"),
                format!("{:?}", self.shape()),
            ));
        }
        self.check_memory(name)
    }

    fn check_memory(&self, name: &str) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        if self.data.is_null() {
            return Err(Error::invalid(format!("{name}.data"), "a pointer", "null"));
        }
        let item = self.dtype.size();
        if !(self.data as usize).is_multiple_of(item) {
            return Err(Error::invalid(
                format!("{name}.data"),
                format!("an address that is a multiple of {item} ({})", self.dtype),
                format!("{:#x}", self.data as usize),
            ));
        }
        let extent = self.extent();
        if extent.low < 0 || extent.high > isize::MAX as i128 {
            return Err(Error::invalid(
                format!("{name}.stride"),
                "strides that stay within the address space",
                format!("{:?} for shape {:?}", self.strides(), self.shape()),
            ));
        }
        Ok(())
    }

    /// The last dimension must be dense: kernels read rows with vector loads.
    pub(crate) fn check_feature_stride(&self, name: &str) -> Result<()> {
        let (Some(&size), Some(&stride)) = (self.shape().last(), self.strides().last()) else {
            return Ok(());
        };
        if size > 1 && stride != 1 && !self.is_empty() {
            return Err(Error::invalid(
                format!("{name}.stride[{}]", self.rank - 1),
                "1 (the feature dimension is dense)",
                stride,
            ));
        }
        Ok(())
    }

    /// An output's elements must be distinct, or threads would race on them.
    pub(crate) fn check_writable(&self, name: &str) -> Result<()> {
        if self.overlaps_itself() {
            return Err(Error::invalid(
                format!("{name}.stride"),
                "strides that give every element its own memory (an output)",
                format!("{:?} for shape {:?}", self.strides(), self.shape()),
            ));
        }
        Ok(())
    }
}

/// Whether two boxes on one lattice, `delta` bytes apart, share a point. `dims` holds (stride,
/// size of the first, size of the second), largest stride first. True also when `budget` runs out.
fn meets(delta: i128, dims: &[(i128, i128, i128)], budget: &mut u32) -> bool {
    let Some((&(stride, first, second), inner)) = dims.split_first() else {
        return delta == 0;
    };
    // Index differences reachable in this dimension, and the slack the inner ones can make up.
    let (low, high) = (-(second - 1), first - 1);
    let slack_up: i128 = inner.iter().map(|(s, a, _)| s * (a - 1)).sum();
    let slack_down: i128 = inner.iter().map(|(s, _, b)| s * (b - 1)).sum();
    let from = (delta - slack_up).div_euclid(stride).max(low);
    let to = (delta + slack_down).div_euclid(stride).min(high);
    (from..=to).any(|digit| {
        *budget = budget.saturating_sub(1);
        *budget == 0 || meets(delta - digit * stride, inner, budget)
    })
}

/// Row-major strides of a shape.
pub(crate) fn contiguous_strides(shape: &[i64]) -> [i64; MAX_RANK] {
    let mut stride = [0; MAX_RANK];
    let mut step = 1i64;
    for (slot, &size) in stride.iter_mut().take(shape.len()).zip(shape).rev() {
        *slot = step;
        step = step.saturating_mul(size.max(1));
    }
    stride
}

fn view_of_slice(
    data: *mut u8,
    len: usize,
    dtype: DType,
    shape: &[i64],
    stride: &[i64],
) -> Result<View> {
    if shape.len() > MAX_RANK || shape.len() != stride.len() {
        return Err(Error::invalid(
            "tensor",
            format!("at most {MAX_RANK} dimensions, one stride each"),
            format!("shape {shape:?}, strides {stride:?}"),
        ));
    }
    if shape.iter().any(|&size| size < 0) {
        return Err(Error::invalid("tensor.shape", "sizes >= 0", format!("{shape:?}")));
    }
    let padded = |numbers: &[i64]| {
        let mut all = [0; MAX_RANK];
        all.iter_mut().zip(numbers).for_each(|(slot, &number)| *slot = number);
        all
    };
    let view = View::new(data, dtype, shape.len(), padded(shape), padded(stride));
    let (extent, base) = (view.extent(), data as usize as i128);
    let end = base + (len * dtype.size()) as i128;
    if !view.is_empty() && (extent.low < base || extent.high > end) {
        return Err(Error::invalid(
            "tensor",
            format!("shape and strides within the slice's {len} elements"),
            format!("shape {shape:?}, strides {stride:?}"),
        ));
    }
    Ok(view)
}

/// A borrowed input tensor of the Rust API.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    pub(crate) view: View,
    lifetime: PhantomData<&'a [u8]>,
}

impl<'a> Tensor<'a> {
    /// A dense, row-major tensor over a slice of exactly the shape's size or longer.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the slice is too short.
    pub fn new<T: Element>(data: &'a [T], shape: &[i64]) -> Result<Self> {
        Self::with_strides(
            data,
            shape,
            contiguous_strides(shape).get(..shape.len()).unwrap_or_default(),
        )
    }

    /// A strided tensor (strides in elements) starting at the slice's first element.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if an element lies outside the slice.
    pub fn with_strides<T: Element>(data: &'a [T], shape: &[i64], stride: &[i64]) -> Result<Self> {
        let view = view_of_slice(data.as_ptr() as *mut u8, data.len(), T::DTYPE, shape, stride)?;
        Ok(Self { view, lifetime: PhantomData })
    }
}

/// A borrowed output tensor of the Rust API.
#[derive(Debug)]
pub struct TensorMut<'a> {
    pub(crate) view: View,
    lifetime: PhantomData<&'a mut [u8]>,
}

impl<'a> TensorMut<'a> {
    /// A dense, row-major tensor over a slice of exactly the shape's size or longer.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the slice is too short.
    pub fn new<T: Element>(data: &'a mut [T], shape: &[i64]) -> Result<Self> {
        Self::with_strides(
            data,
            shape,
            contiguous_strides(shape).get(..shape.len()).unwrap_or_default(),
        )
    }

    /// A strided tensor (strides in elements) starting at the slice's first element.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if an element lies outside the slice.
    pub fn with_strides<T: Element>(
        data: &'a mut [T],
        shape: &[i64],
        stride: &[i64],
    ) -> Result<Self> {
        let view =
            view_of_slice(data.as_mut_ptr().cast::<u8>(), data.len(), T::DTYPE, shape, stride)?;
        Ok(Self { view, lifetime: PhantomData })
    }
}

#[cfg(test)]
mod tests;
