//! Tensor maps: tensors as a GPU's copy engine sees them.

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::{Hash, Hasher};

use cudarc::driver::sys;

use super::driver::check;
use super::params::TensorMap;
use crate::error::{Error, Result};
use crate::tensor::{DType, View};

/// A tensor (B, NH, S, D) of 16-bit elements as (64, S, D / 64, NH, B), of which boxes of 64 tokens
/// and `slabs` times 64 columns are copied; what lies beyond the tensor is zero. The view must suit
/// the copy engine.
pub(super) fn tensor_map(view: &View, slabs: i64) -> Result<TensorMap> {
    let [b, nh, s, d] = view.shape;
    // A stride that no index walks along still has to be one.
    let bytes = |stride: i64| if stride == 0 { 16 } else { 2 * stride };
    let [stride_b, stride_h, stride_s, _] = view.stride;
    map_of(Tiling {
        dtype: map_dtype(view.dtype)?,
        data: view.data,
        rank: 5,
        sizes: [64, s, d / 64, nh, b],
        strides: [bytes(stride_s), 128, bytes(stride_h), bytes(stride_b)],
        boxes: [64, 64, slabs, 1, 1],
        swizzle: sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
    })
}

/// `rows` rows of `bytes` bytes (at most 2048) that start every `pitch` bytes, to copy one at a time;
/// all are multiples of 16.
pub(super) fn rows_map(data: *mut u8, rows: i64, pitch: usize, bytes: usize) -> Result<TensorMap> {
    let (pitch, bytes) = (pitch as i64, bytes as i64);
    map_of(Tiling {
        dtype: sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT64,
        data,
        rank: 2,
        sizes: [bytes / 8, rows, 0, 0, 0],
        strides: [pitch, 0, 0, 0],
        boxes: [bytes / 8, 1, 0, 0, 0],
        swizzle: sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
    })
}

/// The copy engine's name of a type.
fn map_dtype(dtype: DType) -> Result<sys::CUtensorMapDataType> {
    match dtype {
        DType::Bf16 => Ok(sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16),
        DType::F16 => Ok(sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16),
        _ => Err(Error::Internal(format!("{dtype} has no tensor maps"))),
    }
}

/// All that a map depends on. Dimensions from `rank` on are 0.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Tiling {
    dtype: sys::CUtensorMapDataType,
    data: *mut u8,
    rank: u32,
    sizes: [i64; 5],
    /// In bytes, of all dimensions but the first.
    strides: [i64; 4],
    boxes: [i64; 5],
    swizzle: sys::CUtensorMapSwizzle,
}

impl Hash for Tiling {
    /// Few tilings share an address, so that to hash the rest would only take time.
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.data.hash(state);
    }
}

/// Most maps that a thread keeps, 320 bytes each: those of some 30 forwards and backwards.
const MOST_MAPS: usize = 896;

thread_local! {
    /// A caller's tensors come back at the same addresses, and the driver takes up to 1.8 us to
    /// encode one map, of which a forward has 5 and a backward more than 20.
    static KEPT: RefCell<HashMap<Tiling, TensorMap>> = RefCell::default();
}

fn map_of(tiling: Tiling) -> Result<TensorMap> {
    KEPT.try_with(|kept| kept_or(&mut kept.borrow_mut(), tiling, encode))
        // A thread that is being torn down keeps nothing any more.
        .unwrap_or_else(|_| encode(&tiling))
}

fn kept_or(
    kept: &mut HashMap<Tiling, TensorMap>,
    tiling: Tiling,
    encode: impl FnOnce(&Tiling) -> Result<TensorMap>,
) -> Result<TensorMap> {
    if let Some(map) = kept.get(&tiling) {
        return Ok(*map);
    }
    let map = encode(&tiling)?;
    if kept.len() == MOST_MAPS {
        kept.clear();
    }
    kept.insert(tiling, map);
    Ok(map)
}

fn encode(tiling: &Tiling) -> Result<TensorMap> {
    use sys::{
        CUtensorMapFloatOOBfill as Fill, CUtensorMapInterleave as Interleave,
        CUtensorMapL2promotion as Promotion,
    };
    let sizes = tiling.sizes.map(i64::cast_unsigned);
    let strides = tiling.strides.map(i64::cast_unsigned);
    let boxes = tiling.boxes.map(|size| size as u32);
    let mut map = std::mem::MaybeUninit::<TensorMap>::zeroed();
    // SAFETY: all arrays are as long as the rank or longer; the map is plain data, aligned by its
    // type.
    unsafe {
        check(
            "cuTensorMapEncodeTiled",
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                tiling.dtype,
                tiling.rank,
                tiling.data.cast(),
                sizes.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                [1; 5].as_ptr(),
                Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                tiling.swizzle,
                Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                Fill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            ),
        )?;
        Ok(map.assume_init())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TILING: Tiling = Tiling {
        dtype: sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        data: 4096 as *mut u8,
        rank: 5,
        sizes: [64, 100, 2, 3, 4],
        strides: [256, 128, 25600, 76800],
        boxes: [64, 64, 1, 1, 1],
        swizzle: sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
    };

    fn numbered(number: u64) -> impl FnOnce(&Tiling) -> Result<TensorMap> {
        move |_| Ok(TensorMap { opaque: [number; 16] })
    }

    /// What `kept` gives for a tiling, where a fresh map would be `number`.
    fn number(kept: &mut HashMap<Tiling, TensorMap>, tiling: Tiling, number: u64) -> u64 {
        kept_or(kept, tiling, numbered(number)).unwrap().opaque[0]
    }

    #[test]
    fn a_map_is_kept_for_its_own_tiling_alone() {
        let mut tilings = vec![
            TILING,
            Tiling { dtype: sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16, ..TILING },
            Tiling { data: 8192 as *mut u8, ..TILING },
            Tiling { rank: 2, ..TILING },
            Tiling { swizzle: sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE, ..TILING },
        ];
        for dim in 0..5 {
            let mut other = TILING;
            other.sizes[dim] += 1;
            tilings.push(other);
            let mut other = TILING;
            other.boxes[dim] += 1;
            tilings.push(other);
            if dim < 4 {
                let mut other = TILING;
                other.strides[dim] += 16;
                tilings.push(other);
            }
        }
        let mut kept = HashMap::new();
        for round in [0, 100] {
            for (index, &tiling) in (0..).zip(&tilings) {
                assert_eq!(number(&mut kept, tiling, round + index), index);
            }
        }
    }

    #[test]
    fn errors_are_not_kept_and_old_maps_make_room() {
        let mut kept = HashMap::new();
        assert!(kept_or(&mut kept, TILING, |_| Err(Error::Internal(String::new()))).is_err());
        for index in 0..3 * MOST_MAPS {
            let tiling = Tiling { data: (index * 16) as *mut u8, ..TILING };
            assert_eq!(number(&mut kept, tiling, index as u64), index as u64);
            assert!(kept.len() <= MOST_MAPS);
        }
    }
}
