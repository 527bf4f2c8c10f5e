//! A valid small problem with some of its fields bent: an error must leave the memory as it was.
//! Bent addresses and strides may only reach memory that is not there if they must be refused, so
//! tensors either stay within an arena or are bent in ways that no memory could satisfy.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use mlstm::ffi::*;

#[derive(Arbitrary, Debug)]
struct Bend {
    tensor: u8,
    member: u8,
    value: i64,
}

#[derive(Arbitrary, Debug)]
struct Input {
    op: u8,
    sizes: [u8; 5],
    dtypes: [u8; 3],
    flags: u8,
    gate: i8,
    optional: u32,
    packed: bool,
    chunk_size: i32,
    problem_bends: Vec<(u8, i64)>,
    bends: Vec<Bend>,
}

/// Bytes per tensor, enough for any of the sizes below at 8 bytes an element.
const PART: usize = 3 * 3 * 5 * 5 * 8 * 2;
const PARTS: usize = 25;

struct Arena {
    memory: Vec<u64>,
}

impl Arena {
    fn part(&self, index: usize) -> *mut u8 {
        self.memory.as_ptr().cast_mut().cast::<u8>().wrapping_add(index * PART)
    }
}

fn absent() -> mlstm_tensor {
    // SAFETY: all zero is a value of this plain C struct.
    unsafe { std::mem::zeroed() }
}

fn dense(data: *mut u8, dtype: i32, shape: &[i64]) -> mlstm_tensor {
    let mut tensor = absent();
    tensor.data = data.cast();
    tensor.dtype = dtype;
    tensor.rank = shape.len() as i32;
    let mut step = 1;
    for (dim, &size) in shape.iter().enumerate().rev() {
        tensor.shape[dim] = size;
        tensor.stride[dim] = step;
        step *= size.max(1);
    }
    tensor
}

/// Whether every byte that the tensor reaches is in its part of the arena, or no memory could be.
fn harmless(tensor: &mlstm_tensor, arena: &Arena) -> bool {
    let rank = tensor.rank.clamp(0, 4) as usize;
    let (mut low, mut high) = (0i128, 0i128);
    for (&size, &stride) in tensor.shape[..rank].iter().zip(&tensor.stride[..rank]) {
        // Refused, or without elements, or of another shape than the problem's small one.
        if size <= 0 || size > 64 {
            return true;
        }
        let reach = i128::from(size - 1) * i128::from(stride);
        low += reach.min(0);
        high += reach.max(0);
    }
    let (base, start) = (tensor.data as usize as i128, arena.part(0) as usize as i128);
    let end = start + (PART * PARTS) as i128;
    let inside = base + low * 8 >= start && base + (high + 1) * 8 <= end;
    inside || tensor.data.is_null() || base + high > i128::from(i64::MAX) || base + low < 0
}

fn dtype(choice: u8) -> i32 {
    i32::from(choice % 9)
}

fn bend_problem(problem: &mut mlstm_problem, member: u8, value: i64) {
    // Sizes stay small enough that the tensors' shapes decide.
    match member % 13 {
        0 => problem.b = value,
        1 => problem.nh = value,
        2 => problem.s = value,
        3 => problem.dhqk = value,
        4 => problem.dhhv = value,
        5 => problem.num_seqs = value,
        6 => problem.num_slots = value,
        7 => problem.qk_scale = f64::from_bits(value as u64),
        8 => problem.eps = f64::from_bits(value as u64),
        9 => problem.flags = value as u32,
        10 => problem.device = value as i32,
        11 => problem.device_index = value as i32,
        _ => problem.gate = value as i32,
    }
}

fn bend(tensor: &mut mlstm_tensor, bend: &Bend, arena: &Arena) {
    let before = *tensor;
    match bend.member % 12 {
        member @ 0..4 => tensor.shape[usize::from(member)] = bend.value,
        member @ 4..8 => tensor.stride[usize::from(member - 4)] = bend.value,
        8 => tensor.dtype = bend.value as i32,
        9 => tensor.rank = bend.value as i32,
        10 => tensor.data = std::ptr::null_mut(),
        _ => tensor.data = tensor.data.wrapping_byte_offset(bend.value as isize % 4096),
    }
    if !harmless(tensor, arena) {
        *tensor = before;
    }
}

macro_rules! call {
    ($ty:ty, $function:ident, $tensors:ident, $problem:ident, $workspace:ident, $size:ident:
     $($name:ident)*) => {{
        // SAFETY: all zero is a value of this plain C struct.
        let mut args: $ty = unsafe { std::mem::zeroed() };
        args.struct_size = size_of::<$ty>();
        args.problem = $problem;
        args.workspace = $workspace.as_mut_ptr().cast();
        args.workspace_size = $size;
        let names = [$(stringify!($name)),*];
        let mut index = 0;
        $(args.$name = $tensors(index, stringify!($name)); index += 1;)*
        assert_eq!(index, names.len());
        // SAFETY: tensors lie in the arena or cannot be anywhere.
        unsafe { $function(&args) }
    }};
}

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u8; 64]);

fuzz_target!(|input: Input| {
    let arena = Arena { memory: vec![0; PART * PARTS / 8] };
    let [b, nh, s, dhqk, dhhv] = input.sizes;
    // SAFETY: all zero is a value of this plain C struct.
    let mut problem: mlstm_problem = unsafe { std::mem::zeroed() };
    problem.struct_size = size_of::<mlstm_problem>();
    (problem.b, problem.nh, problem.s) = ((b % 4).into(), (nh % 4).into(), (s % 6).into());
    (problem.dhqk, problem.dhhv) = ((dhqk % 5 + 1).into(), (dhhv % 5 + 1).into());
    if input.packed {
        (problem.b, problem.num_seqs) = (1, 1);
    }
    (problem.device, problem.dtype) = (MLSTM_DEVICE_CPU, dtype(input.dtypes[0]));
    problem.gate_dtype = dtype(input.dtypes[1]);
    problem.state_dtype = dtype(input.dtypes[2]);
    problem.flags = u32::from(input.flags);
    problem.gate = i32::from(input.gate % 2);
    problem.chunk_size = input.chunk_size;
    let small = problem;
    for &(member, value) in &input.problem_bends {
        bend_problem(&mut problem, member, value);
    }

    let op = i32::from(input.op % 5 + 1);
    let compute = if small.dtype == MLSTM_F64 { MLSTM_F64 } else { MLSTM_F32 };
    let or = |dtype: i32, default: i32| if dtype == 0 { default } else { dtype };
    let (gates, states) = (or(small.gate_dtype, small.dtype), or(small.state_dtype, compute));
    let tensor = |index: usize, name: &str| {
        let p = &small;
        let rows = if p.num_seqs > 0 { p.num_seqs } else { p.b };
        let per_token = !matches!(op, MLSTM_OP_STEP);
        let at = arena.part(index);
        let full = match name {
            "q" | "k" | "dq" | "dk" => dense(at, p.dtype, &[p.b, p.nh, p.s, p.dhqk]),
            "v" | "h" | "dv" | "dh" => dense(at, p.dtype, &[p.b, p.nh, p.s, p.dhhv]),
            "i" | "f" | "di" | "df" => dense(at, gates, &[p.b, p.nh, p.s]),
            "n" | "m" if per_token => dense(at, compute, &[p.b, p.nh, p.s]),
            "cu_seqlens" => dense(at, MLSTM_I32, &[rows + 1]),
            "src_slots" | "dst_slots" | "num_tokens" => dense(at, MLSTM_I64, &[p.b]),
            "has_state" => dense(at, MLSTM_U8, &[p.b]),
            _ if name.contains('c') => dense(at, states, &[rows, p.nh, p.dhqk, p.dhhv]),
            _ if name.contains("n_") || name == "n" => dense(at, compute, &[rows, p.nh, p.dhqk]),
            _ => dense(at, compute, &[rows, p.nh]),
        };
        let needed = matches!(name, "q" | "k" | "v" | "i" | "f" | "h" | "dh" | "c" | "n");
        let given = needed || name.starts_with('d') && name.len() == 2;
        let mut tensor = if given || input.optional >> index & 1 == 1 { full } else { absent() };
        for change in input.bends.iter().filter(|bend| usize::from(bend.tensor) == index) {
            bend(&mut tensor, change, &arena);
        }
        tensor
    };

    // SAFETY: all zero is a value of this plain C struct.
    let mut needs: mlstm_requirements = unsafe { std::mem::zeroed() };
    needs.struct_size = size_of::<mlstm_requirements>();
    // SAFETY: both structs carry their sizes.
    let status = unsafe { mlstm_query(op, &problem, &mut needs) };
    assert_ne!(status, MLSTM_INTERNAL_ERROR);
    // A problem of any size may be queried; only small ones are run with the workspace they need.
    let size = needs.workspace_size.min(1 << 22);
    let mut workspace = vec![Line([0; 64]); size.div_ceil(64)];
    let problem: *const mlstm_problem = &problem;

    let status = match op {
        MLSTM_OP_CHUNKWISE_FW => call!(mlstm_fw_args, mlstm_chunkwise_fw, tensor, problem,
            workspace, size: q k v i f c_initial n_initial m_initial cu_seqlens h n m
            c_last n_last m_last),
        MLSTM_OP_PARALLEL_FW => call!(mlstm_fw_args, mlstm_parallel_fw, tensor, problem,
            workspace, size: q k v i f c_initial n_initial m_initial cu_seqlens h n m
            c_last n_last m_last),
        MLSTM_OP_CHUNKWISE_BW => call!(mlstm_bw_args, mlstm_chunkwise_bw, tensor, problem,
            workspace, size: q k v i f c_initial n_initial m_initial cu_seqlens h n m dh
            dc_last dn_last dm_last dq dk dv di df dc_initial dn_initial dm_initial),
        MLSTM_OP_PARALLEL_BW => call!(mlstm_bw_args, mlstm_parallel_bw, tensor, problem,
            workspace, size: q k v i f c_initial n_initial m_initial cu_seqlens h n m dh
            dc_last dn_last dm_last dq dk dv di df dc_initial dn_initial dm_initial),
        _ => call!(mlstm_step_args, mlstm_step, tensor, problem,
            workspace, size: q k v i f c n m c_dst n_dst m_dst src_slots dst_slots has_state
            num_tokens h),
    };
    assert_ne!(status, MLSTM_INTERNAL_ERROR);
    if status != MLSTM_OK {
        assert!(arena.memory.iter().all(|&word| word == 0), "an error wrote something");
    }
});
