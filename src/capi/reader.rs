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
