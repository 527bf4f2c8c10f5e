/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * mlstm: mLSTM (xLSTM) kernels behind one stable C ABI.
 * Generated from src/capi by cbindgen; do not edit.
 *
 * Notation: B batch, NH heads, S tokens, DHQK head dim of q and k, DHHV head dim of v and h,
 * L chunk length, NC number of chunks. Per token, with s = qk_scale:
 *
 *   logf = logsigmoid(f)      m = max(logf + m', i)
 *   C = exp(logf + m' - m) C' + exp(i - m) k v^T
 *   n = exp(logf + m' - m) n' + exp(i - m) k          N = s q^T n
 *   h = s q^T C / (max(|N|, exp(-m)) + eps)
 *
 * With the sigmoid gate m is 0, exp(i) becomes sigmoid(i), and the denominator is
 * max(|N|, 1) + eps, or 1 with MLSTM_FLAG_NO_NORMALIZE.
 *
 * Conventions
 * - Every struct starts with struct_size: set it to sizeof the struct, and zero the rest before
 *   filling it in. Zero always means the default, and an all-zero tensor is an absent one.
 * - Every call returns a status. When it is not MLSTM_OK nothing was written or enqueued, and
 *   mlstm_last_error() names the argument, what was expected and what came.
 * - The library keeps no pointer after a call on the CPU returns. It has no handles, no setters and
 *   no global state; any number of threads may call at once. Outputs must not overlap anything.
 * - The same call twice gives the same bits, at any number of threads.
 * - On the CPU a call uses MLSTM_NUM_THREADS threads (else RAYON_NUM_THREADS, else
 *   OMP_NUM_THREADS, else all cores), read once, and the best of scalar, AVX2, AVX-512 and NEON
 *   code; MLSTM_CPU_LEVEL=scalar|avx2|avx512|neon lowers the latter.
 * - On CUDA all tensors and the workspace are memory of the problem's device, and a call only
 *   enqueues kernels on its stream: it allocates nothing, waits for nothing, and leaves the current
 *   context as it was. After mlstm_preload calls can be captured into CUDA graphs. Workspace sizes
 *   are the same for every device, and mlstm_query needs none. Compute capability 8.0 or newer.
 * - What index tensors hold on a GPU is not checked: offsets are forced into order and range, slots
 *   outside the pool count as padding.
 */


#ifndef MLSTM_H
#define MLSTM_H

#include <stddef.h>
#include <stdint.h>

/**
 * Version of the header, major.
 */
#define MLSTM_VERSION_MAJOR 0

/**
 * Version of the header, minor.
 */
#define MLSTM_VERSION_MINOR 1

/**
 * Version of the header, patch.
 */
#define MLSTM_VERSION_PATCH 0

/**
 * With the sigmoid gate: h = s q^T C, without a denominator.
 */
#define MLSTM_FLAG_NO_NORMALIZE 1

/**
 * Gradient without the denominator's part, as NX-AI's `mlstm_kernels` computes it; right only
 * where a scale-invariant norm follows. The default is the exact gradient.
 */
#define MLSTM_FLAG_DETACH_DENOMINATOR 2

/**
 * eps is really 0 (a zero in the field means its default, 1e-6).
 */
#define MLSTM_FLAG_NO_EPS 4

/**
 * Float32 matrix products may be rounded to TF32: relative errors near 5e-4, larger in gradients of
 * tokens whose denominator is close to its floor. Ignored where there is nothing to gain: other
 * dtypes, the CPU, a step. The default keeps errors within 1e-5.
 */
#define MLSTM_FLAG_ALLOW_TF32 8

/**
 * Take the portable engine even where one for the device at hand fits the problem, to compare
 * them; `mlstm_query` wants the same flag.
 */
#define MLSTM_FLAG_GENERIC_ENGINE 16

/**
 * For `mlstm_query`: the rows of q, k, v, h and their gradients will start at multiples of 16 bytes
 * and have strides above 0. A call on tensors that do not keep it may need more workspace than the
 * query said: it then fails with `MLSTM_WORKSPACE_TOO_SMALL` and can be repeated with what a query
 * without the flag says.
 */
#define MLSTM_FLAG_ALIGNED 32

/**
 * Result of a call; `MLSTM_OK` is 0. `mlstm_last_error` has the message.
 */
typedef int32_t mlstm_status;

/**
 * An operation, for `mlstm_query`.
 */
typedef int32_t mlstm_op;

/**
 * The cell's input gate.
 */
typedef int32_t mlstm_gate;

/**
 * Where the tensors live; numbers follow DLPack.
 */
typedef int32_t mlstm_device;

/**
 * Element type of a tensor. 0 where a default is allowed.
 */
typedef int32_t mlstm_dtype;

/**
 * What is to be computed. Zero always means the default.
 */
typedef struct mlstm_problem {
  /**
   * sizeof(mlstm_problem) of the caller's header.
   */
  size_t struct_size;
  /**
   * B: batch size; 1 with packed sequences.
   */
  int64_t b;
  /**
   * NH: number of heads.
   */
  int64_t nh;
  /**
   * S: tokens per row, any number >= 0; with packed sequences all tokens together; in a step 1
   * to 16.
   */
  int64_t s;
  /**
   * DHQK: head dim of q and k.
   */
  int64_t dhqk;
  /**
   * DHHV: head dim of v and h.
   */
  int64_t dhhv;
  /**
   * Number of sequences packed along S (with `cu_seqlens`); 0 for none.
   */
  int64_t num_seqs;
  /**
   * Slots in the state pool of a step; 0 for `b`.
   */
  int64_t num_slots;
  /**
   * s: factor on q; 0 for DHQK^-0.5. Finite, also as a float32 (but with F64 data); so is eps.
   */
  double qk_scale;
  /**
   * Added to the denominator; 0 for 1e-6 (see `MLSTM_FLAG_NO_EPS`).
   */
  double eps;
  /**
   * Or of `MLSTM_FLAG_*`.
   */
  uint32_t flags;
  /**
   * `MLSTM_GATE_EXP` or `MLSTM_GATE_SIGMOID`.
   */
  mlstm_gate gate;
  /**
   * `MLSTM_DEVICE_CPU` or `MLSTM_DEVICE_CUDA`; required.
   */
  mlstm_device device;
  /**
   * Number of the CUDA device; -1 in `mlstm_query` for a bound over all devices.
   */
  int32_t device_index;
  /**
   * dtype of q, k, v, h and their gradients: F32, F64, BF16 or F16; required.
   */
  mlstm_dtype dtype;
  /**
   * dtype of i, f and their gradients: F32 or the data's; 0 for the data's.
   */
  mlstm_dtype gate_dtype;
  /**
   * dtype of C states and their gradients: F32, BF16 or F16 (F64 with F64 data); 0 for F32
   * (F64). n and m states, and the per-token n and m, are always F32 (F64 with F64 data).
   */
  mlstm_dtype state_dtype;
  /**
   * L: tokens per chunk of the chunkwise form, a hint; 0 lets the library choose. Any value
   * gives the same numbers up to rounding.
   */
  int32_t chunk_size;
} mlstm_problem;

/**
 * What a call needs; filled by `mlstm_query`. Members that an older library does not know stay as
 * the caller set them.
 */
typedef struct mlstm_requirements {
  /**
   * sizeof(mlstm_requirements) of the caller's header; set it before the call.
   */
  size_t struct_size;
  /**
   * Bytes of workspace, possibly 0.
   */
  size_t workspace_size;
  /**
   * Alignment of the workspace in bytes.
   */
  size_t workspace_alignment;
  /**
   * L that will be used.
   */
  int64_t chunk_size;
  /**
   * NC: number of chunks (an upper bound with packed sequences).
   */
  int64_t num_chunks;
} mlstm_requirements;

/**
 * A strided tensor in the caller's memory. All-zero means absent. The last dimension of q, k, v,
 * h, C and n states (and of their gradients) must have stride 1; other strides are free, also 0
 * or negative for inputs. Unused entries of `shape` and `stride` are ignored.
 */
typedef struct mlstm_tensor {
  /**
   * The first element; aligned to the element's size.
   */
  void *data;
  /**
   * Sizes of the `rank` dimensions.
   */
  int64_t shape[4];
  /**
   * Strides of the `rank` dimensions, in elements.
   */
  int64_t stride[4];
  /**
   * `MLSTM_F32` ... `MLSTM_U8`.
   */
  mlstm_dtype dtype;
  /**
   * Number of dimensions, at most 4.
   */
  int32_t rank;
} mlstm_tensor;

/**
 * Arguments of `mlstm_chunkwise_fw` and `mlstm_parallel_fw`. R is B, or `num_seqs` when packed.
 */
typedef struct mlstm_fw_args {
  /**
   * sizeof(mlstm_fw_args) of the caller's header.
   */
  size_t struct_size;
  /**
   * What to compute.
   */
  const struct mlstm_problem *problem;
  /**
   * The CUDA stream (cudaStream_t); ignored on the CPU.
   */
  void *stream;
  /**
   * Scratch memory on the device, sized and aligned as `mlstm_query` says; contents undefined
   * before and after. NULL if the size is 0.
   */
  void *workspace;
  /**
   * Bytes at `workspace`.
   */
  size_t workspace_size;
  /**
   * In: queries (B, NH, S, DHQK).
   */
  struct mlstm_tensor q;
  /**
   * In: keys (B, NH, S, DHQK).
   */
  struct mlstm_tensor k;
  /**
   * In: values (B, NH, S, DHHV).
   */
  struct mlstm_tensor v;
  /**
   * In: input gate pre-activations (B, NH, S); -inf ignores the token.
   */
  struct mlstm_tensor i;
  /**
   * In: forget gate pre-activations (B, NH, S); -inf resets the state.
   */
  struct mlstm_tensor f;
  /**
   * In, optional: C before the first token (R, NH, DHQK, DHHV). c, n (and m with the
   * exponential gate) come all together or not at all; absent means zero.
   */
  struct mlstm_tensor c_initial;
  /**
   * In, optional: n before the first token (R, NH, DHQK).
   */
  struct mlstm_tensor n_initial;
  /**
   * In, optional: m before the first token (R, NH).
   */
  struct mlstm_tensor m_initial;
  /**
   * In, optional: packed sequences, (num_seqs + 1) int32 or int64 offsets into S on the device,
   * from 0, not decreasing, to S. Sequences may be empty. Contents are checked on the CPU only.
   */
  struct mlstm_tensor cu_seqlens;
  /**
   * Out: h (B, NH, S, DHHV).
   */
  struct mlstm_tensor h;
  /**
   * Out, optional: N = s q^T n per token, signed (B, NH, S); the backward reads it.
   */
  struct mlstm_tensor n;
  /**
   * Out, optional: m per token (B, NH, S); the backward reads it. Absent with the sigmoid gate.
   */
  struct mlstm_tensor m;
  /**
   * Out, optional: C after the last token (R, NH, DHQK, DHHV). All of c, n (and m) or none.
   */
  struct mlstm_tensor c_last;
  /**
   * Out, optional: n after the last token (R, NH, DHQK).
   */
  struct mlstm_tensor n_last;
  /**
   * Out, optional: m after the last token (R, NH). Absent with the sigmoid gate.
   */
  struct mlstm_tensor m_last;
} mlstm_fw_args;

/**
 * Arguments of `mlstm_chunkwise_bw` and `mlstm_parallel_bw`. Gradients have shape and dtype of
 * what they are the gradient of.
 */
typedef struct mlstm_bw_args {
  /**
   * sizeof(mlstm_bw_args) of the caller's header.
   */
  size_t struct_size;
  /**
   * As in the forward.
   */
  const struct mlstm_problem *problem;
  /**
   * As in the forward.
   */
  void *stream;
  /**
   * As in the forward; the backward's own size.
   */
  void *workspace;
  /**
   * Bytes at `workspace`.
   */
  size_t workspace_size;
  /**
   * In: as in the forward.
   */
  struct mlstm_tensor q;
  /**
   * In: as in the forward.
   */
  struct mlstm_tensor k;
  /**
   * In: as in the forward.
   */
  struct mlstm_tensor v;
  /**
   * In: as in the forward.
   */
  struct mlstm_tensor i;
  /**
   * In: as in the forward.
   */
  struct mlstm_tensor f;
  /**
   * In, optional: as in the forward.
   */
  struct mlstm_tensor c_initial;
  /**
   * In, optional: as in the forward.
   */
  struct mlstm_tensor n_initial;
  /**
   * In, optional: as in the forward.
   */
  struct mlstm_tensor m_initial;
  /**
   * In, optional: as in the forward.
   */
  struct mlstm_tensor cu_seqlens;
  /**
   * In: the forward's h; not needed with `MLSTM_FLAG_NO_NORMALIZE`.
   */
  struct mlstm_tensor h;
  /**
   * In: the forward's n; not needed with `MLSTM_FLAG_NO_NORMALIZE`.
   */
  struct mlstm_tensor n;
  /**
   * In: the forward's m. Absent with the sigmoid gate.
   */
  struct mlstm_tensor m;
  /**
   * In: gradient of h.
   */
  struct mlstm_tensor dh;
  /**
   * In, optional: gradient of c_last; absent means zero.
   */
  struct mlstm_tensor dc_last;
  /**
   * In, optional: gradient of n_last; absent means zero.
   */
  struct mlstm_tensor dn_last;
  /**
   * In, optional: gradient of m_last. Present: c_last, n_last and m_last count as three separate
   * outputs and the gradient is literally theirs. Absent: the last state counts as the frame-
   * invariant C e^m, n e^m, which is what a state handed on to another call is (there the two
   * agree, since dm_initial then cancels the difference).
   */
  struct mlstm_tensor dm_last;
  /**
   * Out: gradient of q.
   */
  struct mlstm_tensor dq;
  /**
   * Out: gradient of k.
   */
  struct mlstm_tensor dk;
  /**
   * Out: gradient of v.
   */
  struct mlstm_tensor dv;
  /**
   * Out: gradient of i.
   */
  struct mlstm_tensor di;
  /**
   * Out: gradient of f.
   */
  struct mlstm_tensor df;
  /**
   * Out, optional, only with c_initial: its gradient. All of dc, dn (and dm) or none.
   */
  struct mlstm_tensor dc_initial;
  /**
   * Out, optional: gradient of n_initial.
   */
  struct mlstm_tensor dn_initial;
  /**
   * Out, optional: gradient of m_initial. Absent with the sigmoid gate.
   */
  struct mlstm_tensor dm_initial;
} mlstm_bw_args;

/**
 * Arguments of `mlstm_step`: S = 1 to 16 tokens per row on a pool of states.
 */
typedef struct mlstm_step_args {
  /**
   * sizeof(mlstm_step_args) of the caller's header.
   */
  size_t struct_size;
  /**
   * As in the forward.
   */
  const struct mlstm_problem *problem;
  /**
   * As in the forward.
   */
  void *stream;
  /**
   * As in the forward.
   */
  void *workspace;
  /**
   * Bytes at `workspace`.
   */
  size_t workspace_size;
  /**
   * In: queries (B, NH, S, DHQK).
   */
  struct mlstm_tensor q;
  /**
   * In: keys (B, NH, S, DHQK).
   */
  struct mlstm_tensor k;
  /**
   * In: values (B, NH, S, DHHV).
   */
  struct mlstm_tensor v;
  /**
   * In: input gate pre-activations (B, NH, S).
   */
  struct mlstm_tensor i;
  /**
   * In: forget gate pre-activations (B, NH, S).
   */
  struct mlstm_tensor f;
  /**
   * In, and out without `c_dst`: pool of C (num_slots, NH, DHQK, DHHV).
   */
  struct mlstm_tensor c;
  /**
   * In, and out without `n_dst`: pool of n (num_slots, NH, DHQK).
   */
  struct mlstm_tensor n;
  /**
   * In, and out without `m_dst`: pool of m (num_slots, NH). Absent with the sigmoid gate.
   */
  struct mlstm_tensor m;
  /**
   * Out, optional: another pool for the new C, of the same shape. All of c, n (and m) or none.
   */
  struct mlstm_tensor c_dst;
  /**
   * Out, optional: another pool for the new n.
   */
  struct mlstm_tensor n_dst;
  /**
   * Out, optional: another pool for the new m.
   */
  struct mlstm_tensor m_dst;
  /**
   * In, optional (B), int32 or int64: the slot each row reads. -1 marks a padding row: nothing
   * is read or written for it. Absent: row b uses slot b.
   */
  struct mlstm_tensor src_slots;
  /**
   * In, optional (B), int32 or int64: the slot each row writes, no two rows the same; -1 stores
   * no state (h is still written). Absent: `src_slots`. A row must not write a slot that another
   * row reads from the same pool. Contents are checked on the CPU only.
   */
  struct mlstm_tensor dst_slots;
  /**
   * In, optional (B), uint8 or int32: 0 starts the row from a zero state without reading its
   * slot. Absent: all rows have a state.
   */
  struct mlstm_tensor has_state;
  /**
   * In, optional (B), int32 or int64: tokens of the row that count, 0 to S; the others change
   * no state and their h is not written. Absent: S.
   */
  struct mlstm_tensor num_tokens;
  /**
   * Out: h (B, NH, S, DHHV).
   */
  struct mlstm_tensor h;
} mlstm_step_args;

/**
 * The call did (on a GPU: enqueued) its work.
 */
#define MLSTM_OK 0

/**
 * An argument breaks the contract. Nothing was written.
 */
#define MLSTM_INVALID_ARGUMENT 1

/**
 * Valid, but this build has no kernel for it: fall back. Nothing was written.
 */
#define MLSTM_UNSUPPORTED 2

/**
 * The workspace is smaller than `mlstm_query` says. Nothing was written.
 */
#define MLSTM_WORKSPACE_TOO_SMALL 3

/**
 * The device or its driver is missing or failed.
 */
#define MLSTM_DEVICE_ERROR 4

/**
 * A bug in the library.
 */
#define MLSTM_INTERNAL_ERROR 5

/**
 * The documented default of the field.
 */
#define MLSTM_DTYPE_DEFAULT 0

/**
 * IEEE binary32.
 */
#define MLSTM_F32 1

/**
 * IEEE binary64.
 */
#define MLSTM_F64 2

/**
 * bfloat16.
 */
#define MLSTM_BF16 3

/**
 * IEEE binary16.
 */
#define MLSTM_F16 4

/**
 * Signed 32-bit integer.
 */
#define MLSTM_I32 5

/**
 * Signed 64-bit integer.
 */
#define MLSTM_I64 6

/**
 * Byte; any non-zero value is true.
 */
#define MLSTM_U8 7

/**
 * Host memory.
 */
#define MLSTM_DEVICE_CPU 1

/**
 * CUDA device memory.
 */
#define MLSTM_DEVICE_CUDA 2

/**
 * Exponential input gate with the max stabiliser m (mLSTMexp).
 */
#define MLSTM_GATE_EXP 0

/**
 * Sigmoid input gate (mLSTMsig); no m anywhere.
 */
#define MLSTM_GATE_SIGMOID 1

/**
 * `mlstm_chunkwise_fw`.
 */
#define MLSTM_OP_CHUNKWISE_FW 1

/**
 * `mlstm_chunkwise_bw`.
 */
#define MLSTM_OP_CHUNKWISE_BW 2

/**
 * `mlstm_parallel_fw`.
 */
#define MLSTM_OP_PARALLEL_FW 3

/**
 * `mlstm_parallel_bw`.
 */
#define MLSTM_OP_PARALLEL_BW 4

/**
 * `mlstm_step`.
 */
#define MLSTM_OP_STEP 5

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Version of the library: major << 16 | minor << 8 | patch.
 */
uint32_t mlstm_version(void);

/**
 * The name of a status, e.g. "MLSTM_OK"; never NULL, static memory.
 */
const char *mlstm_status_name(mlstm_status status);

/**
 * What went wrong in this thread's last call that returned a status, naming the argument, what
 * was expected and what came; "" after a success. Valid until the thread's next such call or end.
 */
const char *mlstm_last_error(void);

/**
 * Workspace and chunking that `op` needs for this problem.
 *
 * # Safety
 * `problem` and `out` are NULL or point to their structs, `struct_size` set.
 */
mlstm_status mlstm_query(mlstm_op op,
                         const struct mlstm_problem *problem,
                         struct mlstm_requirements *out);

/**
 * Does ahead of time what the first call on a device would do: starts the CPU's worker threads,
 * loads a GPU's kernels. Needed only before CUDA graph capture.
 */
mlstm_status mlstm_preload(mlstm_device device, int32_t device_index);

/**
 * Forward over a sequence in chunks: time linear in S.
 *
 * # Safety
 * `args` is NULL or points to its struct, `struct_size` set; tensors are valid memory.
 */
mlstm_status mlstm_chunkwise_fw(const struct mlstm_fw_args *args);

/**
 * The exact gradient of `mlstm_chunkwise_fw`.
 *
 * # Safety
 * As for `mlstm_chunkwise_fw`.
 */
mlstm_status mlstm_chunkwise_bw(const struct mlstm_bw_args *args);

/**
 * Forward with all pairs of tokens: time quadratic in S, like attention.
 *
 * # Safety
 * As for `mlstm_chunkwise_fw`.
 */
mlstm_status mlstm_parallel_fw(const struct mlstm_fw_args *args);

/**
 * The exact gradient of `mlstm_parallel_fw`.
 *
 * # Safety
 * As for `mlstm_chunkwise_fw`.
 */
mlstm_status mlstm_parallel_bw(const struct mlstm_bw_args *args);

/**
 * Generation: 1 to 16 tokens per row on a pool of states.
 *
 * # Safety
 * As for `mlstm_chunkwise_fw`.
 */
mlstm_status mlstm_step(const struct mlstm_step_args *args);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* MLSTM_H */
