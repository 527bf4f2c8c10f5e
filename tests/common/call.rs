//! A call of the C ABI as the caller's structs say it: they can be bent before it is made.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_void};

use mlstm::ffi::*;

use super::case::Setup;
use super::tensor::{POISON, Role, Tensor};

/// Scratch memory with margins, aligned as asked for.
pub struct Scratch {
    memory: Vec<u8>,
    origin: usize,
    size: usize,
}

const MARGIN: usize = 192;

impl Scratch {
    pub fn new(size: usize, alignment: usize) -> Self {
        let memory = vec![POISON; size + 2 * (MARGIN + alignment)];
        let first = memory.as_ptr() as usize + MARGIN;
        let origin = MARGIN + first.next_multiple_of(alignment) - first;
        Self { memory, origin, size }
    }

    pub fn data(&self) -> *mut c_void {
        self.memory.as_ptr().wrapping_add(self.origin).cast_mut().cast()
    }

    pub fn size(&self) -> usize {
        self.size
    }

    pub fn fill(&mut self, byte: u8) {
        self.memory[self.origin..self.origin + self.size].fill(byte);
    }

    pub fn margins_are_clean(&self) -> bool {
        let (before, rest) = self.memory.split_at(self.origin);
        before.iter().chain(&rest[self.size..]).all(|&byte| byte == POISON)
    }
}

/// The caller's structs.
#[derive(Clone)]
pub struct Structs {
    pub op: mlstm_op,
    pub problem: mlstm_problem,
    pub tensors: BTreeMap<&'static str, mlstm_tensor>,
    pub workspace: *mut c_void,
    pub workspace_size: usize,
}

/// Status and message of a call.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    pub status: mlstm_status,
    pub message: String,
}

pub fn outcome(status: mlstm_status) -> Outcome {
    // SAFETY: never null, and valid until this thread's next call.
    let message = unsafe { CStr::from_ptr(mlstm_last_error()) };
    Outcome { status, message: message.to_string_lossy().into_owned() }
}

pub fn absent() -> mlstm_tensor {
    // SAFETY: all zero is a value of this plain C struct.
    unsafe { std::mem::zeroed() }
}

/// A struct as words, followed by `tail` zero bytes.
pub fn words<T: Copy>(value: &T, tail: usize) -> Vec<u64> {
    let mut words = vec![0u64; (size_of::<T>() + tail).div_ceil(8)];
    // SAFETY: the words are at least as many bytes as the plain C struct.
    unsafe { words.as_mut_ptr().cast::<T>().write(*value) };
    words
}

macro_rules! args {
    ($structs:ident, $problem:ident, $ty:ty: $($name:ident)*) => {{
        // SAFETY: all zero is a value of this plain C struct.
        let mut args: $ty = unsafe { std::mem::zeroed() };
        args.struct_size = size_of::<$ty>();
        args.problem = $problem;
        args.workspace = $structs.workspace;
        args.workspace_size = $structs.workspace_size;
        $(args.$name = $structs.tensors.get(stringify!($name)).copied().unwrap_or(absent());)*
        words(&args, 64)
    }};
}

pub fn query(op: mlstm_op, problem: &mlstm_problem) -> (Outcome, mlstm_requirements) {
    // SAFETY: all zero is a value of this plain C struct.
    let mut out: mlstm_requirements = unsafe { std::mem::zeroed() };
    out.struct_size = size_of::<mlstm_requirements>();
    // SAFETY: both structs carry their sizes.
    let status = unsafe { mlstm_query(op, problem, &mut out) };
    (outcome(status), out)
}

impl Structs {
    pub fn new(setup: &Setup, scratch: &Scratch) -> Self {
        Self {
            op: setup.case.op,
            problem: setup.problem,
            tensors: setup.tensors.iter().map(|t| (t.name, t.descriptor())).collect(),
            workspace: scratch.data(),
            workspace_size: scratch.size(),
        }
    }

    /// The names of all tensors of the operation, present or not.
    pub fn names(&self) -> &'static [&'static str] {
        match self.op {
            MLSTM_OP_CHUNKWISE_FW | MLSTM_OP_PARALLEL_FW => &[
                "q",
                "k",
                "v",
                "i",
                "f",
                "c_initial",
                "n_initial",
                "m_initial",
                "cu_seqlens",
                "h",
                "n",
                "m",
                "c_last",
                "n_last",
                "m_last",
            ],
            MLSTM_OP_CHUNKWISE_BW | MLSTM_OP_PARALLEL_BW => &[
                "q",
                "k",
                "v",
                "i",
                "f",
                "c_initial",
                "n_initial",
                "m_initial",
                "cu_seqlens",
                "h",
                "n",
                "m",
                "dh",
                "dc_last",
                "dn_last",
                "dm_last",
                "dq",
                "dk",
                "dv",
                "di",
                "df",
                "dc_initial",
                "dn_initial",
                "dm_initial",
            ],
            _ => &[
                "q",
                "k",
                "v",
                "i",
                "f",
                "c",
                "n",
                "m",
                "c_dst",
                "n_dst",
                "m_dst",
                "src_slots",
                "dst_slots",
                "has_state",
                "num_tokens",
                "h",
            ],
        }
    }

    /// The args struct of the operation with spare zero words behind it.
    pub fn args(&self, problem: *const mlstm_problem) -> Vec<u64> {
        match self.op {
            MLSTM_OP_CHUNKWISE_FW | MLSTM_OP_PARALLEL_FW => args!(self, problem, mlstm_fw_args:
                q k v i f c_initial n_initial m_initial cu_seqlens h n m c_last n_last m_last),
            MLSTM_OP_CHUNKWISE_BW | MLSTM_OP_PARALLEL_BW => args!(self, problem, mlstm_bw_args:
                q k v i f c_initial n_initial m_initial cu_seqlens h n m dh dc_last dn_last dm_last
                dq dk dv di df dc_initial dn_initial dm_initial),
            _ => args!(self, problem, mlstm_step_args:
                q k v i f c n m c_dst n_dst m_dst src_slots dst_slots has_state num_tokens h),
        }
    }

    /// Calls the operation with whatever is at these addresses.
    ///
    /// # Safety
    /// As for the exported functions.
    pub unsafe fn call_at(&self, args: *const u64) -> Outcome {
        // SAFETY: the caller's contract.
        outcome(unsafe {
            match self.op {
                MLSTM_OP_CHUNKWISE_FW => mlstm_chunkwise_fw(args.cast()),
                MLSTM_OP_CHUNKWISE_BW => mlstm_chunkwise_bw(args.cast()),
                MLSTM_OP_PARALLEL_FW => mlstm_parallel_fw(args.cast()),
                MLSTM_OP_PARALLEL_BW => mlstm_parallel_bw(args.cast()),
                _ => mlstm_step(args.cast()),
            }
        })
    }

    pub fn call(&self) -> Outcome {
        // SAFETY: the structs say what memory there is, or break a rule that is checked first.
        unsafe { self.call_at(self.args(&self.problem).as_ptr()) }
    }
}

/// Poisons what a call writes: outputs with the byte, and in-place pools back to their values.
pub fn reset(tensors: &mut [Tensor], byte: u8) {
    for tensor in tensors {
        match tensor.role {
            Role::In => {}
            Role::Out => tensor.fill(byte),
            Role::InOut => {
                let values = tensor.values.clone();
                tensor.store(values.into_iter().map(Some));
            }
        }
    }
}
