//! Address arithmetic against sets of bytes, written out one by one.

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

fn view(data: usize, dtype: DType, dims: &[(i64, i64)]) -> View {
    let (mut shape, mut strides) = ([-7; 4], [i64::MAX; 4]);
    for (index, &(size, stride)) in dims.iter().enumerate() {
        shape[index] = size;
        strides[index] = stride;
    }
    View::new(data as *mut u8, dtype, dims.len(), shape, strides)
}

/// First byte of every element, in index order.
fn elements(view: &View) -> Vec<i128> {
    let mut addresses = vec![view.data as usize as i128];
    for (&size, &stride) in view.shape().iter().zip(view.strides()) {
        let step = i128::from(stride) * view.dtype.size() as i128;
        addresses = addresses
            .iter()
            .flat_map(|base| (0..size).map(move |index| base + i128::from(index) * step))
            .collect();
    }
    addresses
}

fn bytes(view: &View) -> HashSet<i128> {
    let item = view.dtype.size() as i128;
    elements(view).into_iter().flat_map(|first| first..first + item).collect()
}

fn any_dtype() -> impl Strategy<Value = DType> {
    prop::sample::select(vec![DType::U8, DType::Bf16, DType::F32, DType::F64])
}

/// Small views close enough to meet often; odd addresses and strides included.
fn any_view() -> impl Strategy<Value = View> {
    let dims = prop::collection::vec((0i64..6, -20i64..20), 0..=4);
    (2000usize..2200, any_dtype(), dims).prop_map(|(data, dtype, dims)| view(data, dtype, &dims))
}

/// A slice of a dense buffer, of dimensions in any order: what callers really pass.
fn slice_of_buffer() -> impl Strategy<Value = View> {
    let dims = prop::collection::vec((1i64..5, 0i64..3, 0i64..3), 1..=4);
    (dims, any_dtype(), any::<prop::sample::Index>()).prop_map(|(dims, dtype, turn)| {
        let (mut stride, mut offset, mut out) = (1, 0, Vec::new());
        for &(size, before, after) in dims.iter().rev() {
            offset += before * stride;
            out.push((size, stride));
            stride *= before + size + after;
        }
        let turn = turn.index(out.len());
        out.rotate_left(turn);
        view(4096 + offset as usize * dtype.size(), dtype, &out)
    })
}

fn nests(view: &View) -> bool {
    let mut dims: Vec<(i64, i64)> = view
        .shape()
        .iter()
        .zip(view.strides())
        .filter(|(size, _)| **size > 1)
        .map(|(size, stride)| (stride.abs(), *size))
        .collect();
    dims.sort_unstable();
    let mut reach = 0;
    dims.iter().all(|&(stride, size)| {
        let free = stride > reach;
        reach += stride * (size - 1);
        free
    })
}

#[test]
fn a_view_may_repeat_along_many_huge_dimensions() {
    let element = view(4096, DType::F32, &[(i64::MAX, 0); 4]);
    assert!(element.overlaps_itself());
    assert!(element.overlaps(&view(4096, DType::F32, &[(1, 1)])));
    assert!(!element.overlaps(&view(4100, DType::F32, &[(1, 1)])));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..Default::default() })]

    #[test]
    fn extent_is_the_smallest_range_of_all_bytes(view in any_view()) {
        let bytes = bytes(&view);
        let extent = view.extent();
        if bytes.is_empty() {
            prop_assert_eq!(extent.low, extent.high);
        } else {
            prop_assert_eq!(Some(&extent.low), bytes.iter().min());
            prop_assert_eq!(Some(extent.high - 1), bytes.iter().max().copied());
        }
    }

    #[test]
    fn overlap_is_a_shared_byte(a in any_view(), b in any_view()) {
        let shared = bytes(&a).intersection(&bytes(&b)).next().is_some();
        prop_assert_eq!(a.overlaps(&b), shared, "{:?} {:?}", a, b);
        prop_assert_eq!(b.overlaps(&a), shared);
    }

    #[test]
    fn overlap_is_exact_for_slices_of_one_buffer(a in slice_of_buffer(), b in slice_of_buffer()) {
        let shared = bytes(&a).intersection(&bytes(&b)).next().is_some();
        prop_assert_eq!(a.overlaps(&b), shared, "{:?} {:?}", a, b);
        prop_assert_eq!(b.overlaps(&a), shared);
    }

    #[test]
    fn self_overlap_is_two_elements_on_one_byte(view in any_view()) {
        let clash = elements(&view).len() * view.dtype.size() != bytes(&view).len();
        if clash || view.is_empty() || nests(&view) {
            prop_assert_eq!(view.overlaps_itself(), clash, "{:?}", view);
        }
    }

    #[test]
    fn slices_of_one_buffer_are_writable(view in slice_of_buffer()) {
        prop_assert!(!view.overlaps_itself());
    }

    /// Nothing that a caller can put into a struct makes the arithmetic overflow.
    #[test]
    fn hostile_numbers_only_give_errors(
        data in any::<usize>(),
        dims in prop::collection::vec((hostile_size(), hostile()), 1..=4),
        dtype in any_dtype(),
    ) {
        let view = view(data, dtype, &dims);
        let shape = view.shape().to_vec();
        if view.check("x", dtype, &shape, "any").is_ok() && !view.is_empty() {
            let extent = view.extent();
            prop_assert!(extent.low >= 0 && extent.high <= isize::MAX as i128);
            view.overlaps_itself();
            view.overlaps(&view);
        }
        let strides = view.strides().to_vec();
        let slice = [0u8; 16];
        let inside = view_of_slice(slice.as_ptr().cast_mut(), 16, DType::U8, &shape, &strides);
        let reach: f64 = dims.iter().map(|d| (d.0 as f64 - 1.0) * (d.1 as f64).abs()).sum();
        if !view.is_empty() && reach > 15.0 {
            prop_assert!(inside.is_err());
        }
    }
}

fn hostile() -> impl Strategy<Value = i64> {
    prop_oneof![
        prop::sample::select(vec![i64::MIN, i64::MIN + 1, -1, 0, 1, 2, 1 << 62, i64::MAX]),
        any::<i64>(),
        -4i64..4,
    ]
}

fn hostile_size() -> impl Strategy<Value = i64> {
    hostile().prop_map(|size| size.checked_abs().unwrap_or(i64::MAX))
}

#[test]
fn interleaved_columns_of_one_buffer_are_apart() {
    // i and f gates side by side in the last dimension of (S, 2).
    let i = view(4096, DType::F32, &[(1, 100), (1, 100), (50, 2)]);
    let f = view(4100, DType::F32, &[(1, 100), (1, 100), (50, 2)]);
    assert!(!i.overlaps(&f));
    assert!(i.overlaps(&i));
    // A broadcast scalar in the gap between two rows.
    let rows = view(4096, DType::F32, &[(3, 10), (8, 1)]);
    let scalar = view(4096 + 36, DType::F32, &[(5, 0), (3, 0)]);
    assert!(!rows.overlaps(&scalar) && !scalar.overlaps(&rows));
    assert!(rows.overlaps(&view(4096 + 40, DType::F32, &[(5, 0), (3, 0)])));
}

#[test]
fn the_search_for_a_shared_byte_is_bounded() {
    // Strides without a common structure: an exact answer would take 4^40 steps.
    let dims = [(1 << 20, 1013), (1 << 20, 1009), (1 << 20, 997), (1 << 20, 991)];
    let other = [(1 << 20, 983), (1 << 20, 977), (1 << 20, 971), (1 << 20, 967)];
    assert!(view(1 << 40, DType::F64, &dims).overlaps(&view(1 << 40 | 1, DType::F64, &other)));
}

#[test]
fn checks_name_the_member() {
    let good = view(4096, DType::F32, &[(2, 8), (3, 1)]);
    let fails = |change: &dyn Fn(&mut View), member: &str| {
        let mut view = good;
        change(&mut view);
        let error = view.check("q", DType::F32, &[2, 3], "b, nh").unwrap_err().to_string();
        assert!(error.starts_with(&format!("q.{member}: expected ")), "{error}");
        assert!(error.contains(", got "), "{error}");
    };
    good.check("q", DType::F32, &[2, 3], "b, nh").unwrap();
    fails(&|v| v.rank = 3, "rank");
    fails(&|v| v.dtype = DType::F64, "dtype");
    fails(&|v| v.shape[1] = 4, "shape");
    fails(&|v| v.data = std::ptr::null_mut(), "data");
    fails(&|v| v.data = 4098 as *mut u8, "data");
    fails(&|v| v.stride[0] = i64::MAX, "stride");
    fails(&|v| v.stride[0] = i64::MIN, "stride");
    fails(&|v| v.stride[0] = -4096, "stride");
    fails(&|v| v.data = (usize::MAX - 3) as *mut u8, "stride");
}

#[test]
fn empty_tensors_need_no_memory() {
    let mut empty = view(0, DType::F32, &[(0, i64::MAX), (i64::MAX, i64::MIN)]);
    empty.check("q", DType::F32, &[0, i64::MAX], "b, nh").unwrap();
    empty.check_writable("q").unwrap();
    empty.check_feature_stride("q").unwrap();
    empty.data = 3 as *mut u8;
    empty.check("q", DType::F32, &[0, i64::MAX], "b, nh").unwrap();
    assert!(!empty.overlaps(&empty));
}

#[test]
fn slices_bound_the_safe_tensors() {
    let data = [0f32; 12];
    Tensor::new(&data, &[3, 4]).unwrap();
    Tensor::new(&data, &[2, 2]).unwrap();
    Tensor::new(&data, &[0, i64::MAX]).unwrap();
    Tensor::with_strides(&data, &[5, 3], &[0, 4]).unwrap();
    for (shape, stride) in [
        (&[3, 5][..], &[5, 1][..]),
        (&[2, 2], &[11, 1]),
        (&[2], &[-1]),
        (&[-1, 4], &[4, 1]),
        (&[1, 1, 1, 1, 1], &[1, 1, 1, 1, 1]),
        (&[2, 2], &[1]),
        (&[i64::MAX; 4], &[i64::MAX; 4]),
        (&[i64::MAX; 4], &[i64::MIN; 4]),
    ] {
        assert!(Tensor::with_strides(&data, shape, stride).is_err(), "{shape:?} {stride:?}");
    }
    assert!(Tensor::new(&data, &[i64::MAX, i64::MAX]).is_err());
    assert!(Tensor::new(&data, &[1; 5]).is_err());
    assert!(TensorMut::new(&mut [0f32; 3], &[2, 2]).is_err());
}
