//! Reads size-tagged structs from callers compiled against older or newer headers.

use std::mem::MaybeUninit;

use super::types::{
    mlstm_bw_args, mlstm_fw_args, mlstm_problem, mlstm_requirements, mlstm_step_args,
};
use crate::error::{Error, Result};

/// No header will ever have a larger struct; a larger `struct_size` is garbage.
const MAX_STRUCT_SIZE: usize = 1 << 16;

/// A C struct that begins with `size_t struct_size` and only grows at its end.
///
/// # Safety
/// The type is `repr(C)`, starts with `struct_size: usize`, has no padding, and every bit pattern
/// is a value of it.
pub(super) unsafe trait Extensible: Copy {
    /// Size in the first release that had it: shorter structs are not ours.
    const FIRST_SIZE: usize;
}

macro_rules! extensible {
    ($($ty:ty => $first_size:literal),* $(,)?) => {$(
        // SAFETY: repr(C), struct_size first, integers, floats and raw pointers without padding
        // (the C tests compile the header with -Wpadded).
        unsafe impl Extensible for $ty { const FIRST_SIZE: usize = $first_size; }
        const _: () = assert!(size_of::<$ty>() >= $first_size);
    )*};
}
#[cfg(target_pointer_width = "64")]
extensible! {
    mlstm_problem => 112,
    mlstm_requirements => 40,
    mlstm_fw_args => 1240,
    mlstm_bw_args => 1960,
    mlstm_step_args => 1320,
}
#[cfg(not(target_pointer_width = "64"))]
compile_error!("mlstm needs a 64-bit target");

fn check_pointer<T>(name: &str, pointer: *const T) -> Result<()> {
    if pointer.is_null() {
        return Err(Error::invalid(name, "a pointer", "null"));
    }
    if !pointer.is_aligned() {
        return Err(Error::invalid(
            name,
            format!("an address that is a multiple of {}", align_of::<T>()),
            format!("{:#x}", pointer as usize),
        ));
    }
    Ok(())
}

/// Checks a caller's `struct_size` against the smallest and largest we take.
fn check_size<T: Extensible>(name: &str, size: usize) -> Result<()> {
    if size < T::FIRST_SIZE || size > MAX_STRUCT_SIZE {
        return Err(Error::invalid(
            format!("{name}.struct_size"),
            format!("sizeof the struct ({} in this library)", size_of::<T>()),
            size,
        ));
    }
    Ok(())
}

/// Copies the caller's struct: a shorter one's missing tail reads as zero; a longer one's unknown
/// tail must be zero, or the caller asks for something this library does not have.
///
/// # Safety
/// `pointer` is null, or points to `struct_size` readable bytes that begin with `struct_size`.
pub(super) unsafe fn read<T: Extensible>(name: &str, pointer: *const T) -> Result<T> {
    check_pointer(name, pointer)?;
    // SAFETY: not null, aligned, and starts with struct_size (caller's contract).
    let size = unsafe { pointer.cast::<usize>().read() };
    check_size::<T>(name, size)?;
    let known = size.min(size_of::<T>());
    // SAFETY: the caller vouches for `size` readable bytes.
    let bytes = unsafe { std::slice::from_raw_parts(pointer.cast::<u8>(), size) };
    let (head, tail) = bytes.split_at(known);
    if let Some(offset) = tail.iter().position(|&byte| byte != 0) {
        return Err(Error::unsupported(
            name,
            format!(
                "a field at byte {} is set that this library (struct of {} bytes) does not know; \
                 install a newer libmlstm or leave the field zero",
                known + offset,
                size_of::<T>()
            ),
        ));
    }
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: `head` fits the value, and `Extensible` says that every bit pattern is one.
    unsafe {
        value.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping(head.as_ptr(), head.len());
        Ok(value.assume_init())
    }
}

/// Writes a result into the caller's struct, as much of it as the caller knows.
///
/// # Safety
/// As for [`read`], and writable.
pub(super) unsafe fn write<T: Extensible>(name: &str, pointer: *mut T, value: T) -> Result<()> {
    check_pointer(name, pointer)?;
    // SAFETY: not null, aligned, and starts with struct_size (caller's contract).
    let size = unsafe { pointer.cast::<usize>().read() };
    check_size::<T>(name, size)?;
    let known = size.min(size_of::<T>());
    // SAFETY: both sides have `known` bytes; struct_size stays the caller's.
    unsafe {
        pointer.cast::<u8>().add(size_of::<usize>()).copy_from_nonoverlapping(
            (&raw const value).cast::<u8>().add(size_of::<usize>()),
            known - size_of::<usize>(),
        );
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failing test panics")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: usize = size_of::<mlstm_requirements>();

    /// A caller's struct of any size, aligned, with its size in front.
    fn memory(size: usize, fill: u8) -> Vec<u64> {
        let mut words = vec![u64::from_ne_bytes([fill; 8]); size.div_ceil(8).max(1)];
        words[0] = size as u64;
        words
    }

    fn read_requirements(words: &[u64]) -> Result<mlstm_requirements> {
        // SAFETY: `words` holds as many bytes as its first word says, or the size is refused.
        unsafe { read("out", words.as_ptr().cast::<mlstm_requirements>()) }
    }

    #[test]
    fn a_struct_of_our_size_is_copied() {
        let got = read_requirements(&memory(SIZE, 3)).unwrap();
        assert_eq!(got.struct_size, SIZE);
        assert_eq!(got.num_chunks, i64::from_ne_bytes([3; 8]));
    }

    #[test]
    fn a_longer_struct_may_only_say_zero_in_its_tail() {
        let mut words = memory(SIZE + 24, 0);
        words[1] = 7;
        assert_eq!(read_requirements(&words).unwrap().workspace_size, 7);
        words[SIZE / 8 + 2] = 1 << 56;
        let error = read_requirements(&words).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }));
        assert!(error.to_string().contains(&format!("byte {}", SIZE + 23)), "{error}");
    }

    #[test]
    fn sizes_that_no_header_had_are_refused() {
        for size in [0, 1, 8, SIZE - 1, MAX_STRUCT_SIZE + 1, usize::MAX / 2, usize::MAX] {
            let mut words = memory(SIZE, 0);
            words[0] = size as u64;
            let error = read_requirements(&words).unwrap_err().to_string();
            assert!(error.starts_with("out.struct_size: expected "), "{error}");
            // SAFETY: as in `read_requirements`.
            let error = unsafe {
                let value = MaybeUninit::<mlstm_requirements>::zeroed().assume_init();
                write("out", words.as_mut_ptr().cast::<mlstm_requirements>(), value)
            };
            assert!(error.is_err());
        }
    }

    #[test]
    fn pointers_are_checked_before_use() {
        for address in [0usize, 1, 4, 12, usize::MAX] {
            // SAFETY: null or misaligned, so never read.
            let error = unsafe { read("args", address as *const mlstm_problem) }.unwrap_err();
            assert!(error.to_string().starts_with("args: expected "), "{error}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        /// Every field up to the smaller of the two sizes arrives, the rest reads as zero, and
        /// nothing beyond is written.
        #[test]
        fn both_sides_agree_on_the_common_part(size in SIZE..400, fill in any::<u8>()) {
            let mut words = memory(size.next_multiple_of(8), fill);
            let outcome = read_requirements(&words);
            prop_assert_eq!(outcome.is_ok(), size <= SIZE || fill == 0);
            let value = mlstm_requirements {
                struct_size: SIZE,
                workspace_size: 1,
                workspace_alignment: 2,
                chunk_size: 3,
                num_chunks: 4,
            };
            let before = words.clone();
            // SAFETY: as in `read_requirements`.
            unsafe { write("out", words.as_mut_ptr().cast(), value) }.unwrap();
            prop_assert_eq!(&words[..5], &[before[0], 1, 2, 3, 4]);
            prop_assert_eq!(&words[5..], &before[5..]);
        }
    }
}
