//! Structs of any size and content. All pointers that such a struct could name are cleared, except
//! the problem's, so every call must end in the reader or in validation.
#![no_main]

use std::ffi::c_void;

use libfuzzer_sys::fuzz_target;
use mlstm::ffi::*;

/// Reads at most this many bytes behind the struct's beginning, whatever size it claims.
const ROOM: usize = 1 << 16;

/// The bytes as an aligned struct with room for all that the reader may look at.
fn words(bytes: &[u8]) -> Vec<u64> {
    let mut words = vec![0u64; ROOM / 8];
    for (word, chunk) in words.iter_mut().zip(bytes.chunks(8)) {
        let mut whole = [0; 8];
        whole[..chunk.len()].copy_from_slice(chunk);
        *word = u64::from_le_bytes(whole);
    }
    words
}

fuzz_target!(|input: (u8, u16, Vec<u8>, Vec<u8>)| {
    let (op, skip, args, problem) = input;
    let problem = words(&problem);
    let mut args = words(&args);
    // Every tensor absent: whatever passes the reader misses q.
    let first_tensor = size_of::<usize>() * 5 / 8;
    let known = size_of::<mlstm_bw_args>().div_ceil(8);
    args[first_tensor..known].fill(0);
    args[1] = problem.as_ptr() as u64;
    let before = problem.clone();
    let pointer: *const c_void = args.as_ptr().cast();
    // Misaligned pointers must be refused before they are read.
    let pointer = pointer.wrapping_byte_add(usize::from(skip % 8));
    // SAFETY: both structs have as many readable bytes as the reader accepts.
    let status = unsafe {
        match op % 6 {
            0 => mlstm_chunkwise_fw(pointer.cast()),
            1 => mlstm_chunkwise_bw(pointer.cast()),
            2 => mlstm_parallel_fw(pointer.cast()),
            3 => mlstm_parallel_bw(pointer.cast()),
            4 => mlstm_step(pointer.cast()),
            _ => {
                let mut out = words(&[]);
                out[0] = u64::from(skip);
                mlstm_query(i32::from(op) % 7, problem.as_ptr().cast(), out.as_mut_ptr().cast());
                assert!(out[size_of::<mlstm_requirements>() / 8..].iter().all(|&word| word == 0));
                MLSTM_INVALID_ARGUMENT
            }
        }
    };
    assert!(status != MLSTM_OK && status != MLSTM_INTERNAL_ERROR);
    assert_eq!(problem, before);
});
