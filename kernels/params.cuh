// What the host passes to the chunkwise kernels, and the exact meaning of every buffer.
// src/cuda/params.rs mirrors these structs field by field (repr(C)); keep both in step.
//
// Notation: B batch, NH heads, S tokens, DHQK, DHHV head dims, L chunk length, R state rows (B, or
// the number of packed sequences). `Acc` is float, or double for float64 data.
//
// Chunks. A chunk is up to L consecutive tokens of one sequence; chunk c has index c in
// [0, num_chunks) over all rows, in order. `chunk_at` gives its row of the states, batch row,
// first token and length; with packed sequences num_chunks is an upper bound and surplus chunks
// have length 0 (exit at once). A sequence has chunks [first_chunk(row), first_chunk(row + 1)),
// none if it is empty.
//
// Indices (all in 64 bits):
//   token vectors   [token_index(b, h, t)]   = (b * NH + h) * S + t
//   chunk scalars   [chunk_index(c, h)]      = c * NH + h
//   chunk states    [slot(c, row) * NH + h]  with slot = c + row, so that each sequence has one
//                   slot more than chunks: slot c holds the state before chunk c, the slot after
//                   the last chunk's holds the state after the sequence
//
// Token vectors, in the frame of each token's own stabiliser m, all exponents in log2 units:
//   step_t   = (logf_t + m_{t-1} - m_t) * log2(e)  <= 0   decay of the state at token t
//   source_t = (i_t - m_t) * log2(e)               <= 0   gain of k_t v_t^T
//   (sigmoid gate: m = 0, step = logsigmoid(f), source = logsigmoid(i))
//   Phi_x    = sum of step over the chunk's tokens up to and including x
//   row[x]   = Phi_x                as {hi, lo}
//   col[y]   = source_y - Phi_y     as {hi, lo}
//   D_xy     = exp2((row[x].hi + col[y].hi) + (row[x].lo + col[y].lo)) for y <= x, else 0
//              (mask by select: for y > x the exponent may overflow)
//   w[x]     = exp2(Phi_x)                        weight of the state before the chunk in token x
//   a[y]     = exp2(Phi_last - Phi_y + source_y)  weight of token y in the state after the chunk
//   g        = exp2(Phi_last), per chunk          decay of the state over the chunk
//   floor[t] = exp(-m_t) (exponential; inf for m = -inf), 1 (sigmoid)
// Resets (f = -inf) and ignored tokens (i = -inf) have their exponent clamped to kNever, small
// enough for an exact 0 and large enough for sums to stay finite. A factor w, g or a of exactly 0
// must forget what it multiplies, NaN included: select, do not multiply.
//
// Forward:
//   C_{c+1} = g C_c + sum_y a_y k_y v_y^T            n_{c+1} = g n_c + sum_y a_y k_y
//   num_x   = s (w_x q_x C_c + sum_y D_xy (q_x.k_y) v_y)
//   N_x     = s (w_x q_x.n_c + sum_y D_xy (q_x.k_y))
//   h_x     = num_x * inv_x,  inv_x = 1 / (max(|N_x|, floor_x) + eps), 1 without a normaliser
//             (floor = inf gives inv = 0 and h = 0)
// Backward, with inv from the saved N, rho_x = dh_x.h_x:
//   delta_x = -s [|N_x| > floor_x] sign(N_x) rho_x inv_x   (0 if detached or not normalised)
//   dm_x    = -rho_x eps inv_x                             (0 if detached or sigmoid)
//   G_xy    = D_xy (s inv_x (dh_x.v_y) + delta_x)
//   dC_c    = g dC_{c+1} + sum_x w_x s inv_x q_x dh_x^T    dn_c = g dn_{c+1} + sum_x w_x delta_x q_x
//   dq_x    = w_x (s inv_x C_c dh_x + delta_x n_c) + sum_y G_xy k_y
//   dk_y    = a_y (dC_{c+1} v_y + dn_{c+1}) + sum_x G_xy q_x
//   dv_y    = a_y dC_{c+1}^T k_y + sum_x D_xy s inv_x (q_x.k_y) dh_x
//   E_c     = <dC_{c+1}, C_{c+1}> + <dn_{c+1}, n_{c+1}>
#pragma once

#include <cstdint>

namespace mlstm {

// exp2 of it is exactly 0 in float and in double; 2^20 of them still sum without loss of meaning.
constexpr double kNever = -16384.0;

constexpr int kMaxChunk = 128;

// The Hopper kernels take chunks of 64 tokens and their vectors in one piece per chunk and head,
// `packed`: a as the sum of two numbers of the data's type, two rows of 64, the second with its
// 16-byte pieces swapped in pairs (wgmma_sm90.cuh); in float w, row, col, a and floor, hi alone of
// row and col (with kNear for kNever it has digits enough for 16-bit data); g and the length, which with
// a lie where the backward has them. Beyond the chunk's end w = a = 0, row = 0, col = kNever,
// floor = 1. w, a and col stand in the order of columns (column_order).
constexpr int kPackedVectors = 64;                     // where the vectors start, in floats
constexpr int kPackedDecay = kPackedVectors + 5 * 64;  // where g is
constexpr int kPackedFloats = kPackedDecay + 4;
constexpr double kNear = -256.0;

// Their backward's, also one piece per chunk and head, in floats, of which each sweep copies a part:
// inv; the sign of delta / rho (0 where delta is 0); row + log2(s inv); col, in the order of columns; a
// and w s inv, in the order of columns; g and, as an integer, the length of a chunk that the next
// sequence's tokens follow, else 64; col; row + log2(s inv), in the order of columns; w delta, in the
// order of columns; delta, in the order of columns. Beyond the chunk's end all are 0 but col and row,
// which are kNever. Byte offsets:
constexpr int kInvAt = 0;
constexpr int kSignAt = 256;
constexpr int kQueryRowAt = 512;
constexpr int kKeyColumnAt = 768;
constexpr int kSourceAt = 1024;
constexpr int kWsiAt = 1280;
constexpr int kSweepDecayAt = 1536;
constexpr int kSweepLengthAt = 1540;
constexpr int kKeyRowAt = 1552;
constexpr int kQueryColumnAt = 1808;
constexpr int kWDeltaAt = 2064;
constexpr int kColumnDeltaAt = 2320;
constexpr int kBackwardFloats = (kColumnDeltaAt + 256) / 4;

// Chunks of the Hopper backward between two of its boundaries, counted from a sequence's start;
// boundary 0 is before the first chunk, the last after the last one.
constexpr int kGroupChunks = 16;

constexpr int kMaxStepTokens = 16;

// Bytes of shared memory that a block can have on every device served: compute capability 8.6 and
// 8.9 have no more.
constexpr int kSharedEverywhere = 99 * 1024;

// dtype numbers of the C ABI's data types as used on the device.
enum DType : int32_t { kF32 = 0, kF64 = 1, kBf16 = 2, kF16 = 3 };

enum Flags : int32_t {
  kExponential = 1,  // exponential input gate with stabiliser m (else sigmoid)
  kNormalize = 2,    // h is divided by the denominator
  kDetach = 4,       // the gradient leaves out the denominator's part
};

// (B, NH, S, D) of the data's type with dense D; strides in elements. Gate-like tensors
// (i, f, n, m: no D) and states use the same struct: b = state row, h = head, s = DHQK row of C.
struct Tensor {
  void* data;  // null if absent
  int64_t stride_b;
  int64_t stride_h;
  int64_t stride_s;
};

struct Chunk {
  int64_t start;  // first token, within batch row b
  int32_t row;    // state row: packed sequence, or batch row
  int32_t len;    // tokens; 0 = no such chunk
};

template <typename Acc>
struct Pair {
  Acc hi;
  Acc lo;
};

// One struct for all kernels of a forward or a backward; members that a call lacks are null.
struct Args {
  // Sizes.
  int64_t s;
  int64_t num_chunks;  // upper bound, over all rows
  int32_t b;
  int32_t nh;
  int32_t rows;  // R
  int32_t dhqk;
  int32_t dhhv;
  int32_t chunk_len;       // L, 64 or 128 (kMaxChunk)
  int32_t chunks_per_row;  // ceil(S / L); unused with packed sequences
  int32_t flags;
  int32_t gate_dtype;   // of i, f, di, df
  int32_t state_dtype;  // of c_initial, c_last, dc_last, dc_initial; n and m states are Acc
  int32_t vector_ok;    // all (B, NH, S, D) tensors allow 16-byte accesses on every row start
  int32_t qk_tiles;     // partials of q_dq and k_dk per token
  int32_t e_tiles;      // partials of e per chunk and head
  int32_t write_m;      // m is an output (forward)
  double qk_scale;
  double eps;

  // Inputs. f64: Acc = double, otherwise float.
  Tensor q, k, v, i, f;
  Tensor c_initial, n_initial, m_initial;
  // Outputs of the forward; n (= N) and m are inputs of the backward.
  Tensor h, n, m;
  Tensor c_last, n_last, m_last;
  // Backward.
  Tensor dh, dc_last, dn_last, dm_last;
  Tensor dq, dk, dv, di, df;
  Tensor dc_initial, dn_initial, dm_initial;
  // Packed sequences: offsets as given, null without them.
  const void* cu_seqlens;
  int64_t cu_seqlens_stride;
  int64_t cu_seqlens_wide;  // int64 offsets

  // Workspace.
  const Chunk* chunks;         // [num_chunks], packed sequences only
  const int64_t* first_chunk;  // [R + 1], packed sequences only
  int64_t* seq_starts;         // [R + 1], packed sequences only: first token, then the end
  double* chunk_gates;         // [NH][num_chunks][4]: scratch of the gate kernels
  void* row;                   // Pair<Acc>, token vector
  void* col;                   // Pair<Acc>, token vector
  void* w;                     // Acc, token vector
  void* a;                     // Acc, token vector
  void* floor;                 // Acc, token vector
  void* g;                     // Acc, chunk scalar
  void* c_states;              // [slots][NH][DHQK_p][DHHV_p]: the data's type; _p: rounded up to 64
  void* n_states;              // [slots][NH][DHQK_p] Acc
  // Backward only.
  void* dc_states;  // like c_states; slot(c + 1, row) holds dC after chunk c, slot(first) dC_0
  void* dn_states;  // [slots][NH][DHQK_p] Acc
  void* inv;        // Acc, token vector
  void* delta;      // Acc, token vector, times s
  void* dm;         // Acc, token vector
  void* q_dq;       // [qk_tiles] token vectors of Acc: partial sums of q.dq, unrounded
  void* k_dk;       // [qk_tiles] token vectors of Acc
  void* e;          // [chunk_index][e_tiles] Acc: partial sums of E_c
  void* e_first;    // [R * NH][e_tiles] Acc: partial sums of <dC_0, C_0> + <dn_0, n_0>

  // Hopper kernels only. A sequence's chunks are cut in `segments` parts that run side by side; what
  // each but the last adds to the state, from zero and in the frame of its end, and for the backward
  // what each but the first adds to dC: [2: C, dC][R][NH][segments - 1] of
  float* packed;         // [chunk_index][kPackedFloats], the backward's [chunk_index][kBackwardFloats]
  float* segment_c;      // C
  float* segment_n;      // n
  float* segment_g;      // product of g
  // Hopper backward only.
  void* scores;       // for split states (backward_sm90.cuh): G as [chunk_index][64 queries][64 keys]
  float* rho;         // [chunk_index][rho_parts][64]: parts of dh.h, for dq of its columns of DHHV
  void* boundary_c;   // [boundary_slot][NH] of C as bf16, padded and in the order of registers
  float* boundary_n;  // [boundary_slot][NH] of n, padded
  float* boundary_e;  // [boundary_slot][NH][boundary_parts]: parts of <dC, C> + <dn, n>
  float* state_copies;  // of 16-bit states: [3: c_initial, dc_last, dc_initial][R][NH][DHQK][DHHV]
  float* part_sums;     // [2: dq, dk][chunk_index][DHQK / 64] of 64 x 64, in the order of registers
  int32_t segments;     // at least 1
  int32_t group_chunks;  // chunks that no segment cuts apart: 1, the backward's kGroupChunks
  int32_t boundary_parts;
  int32_t rho_parts;
  int32_t segment_columns;
  // Launches of the sweep for other parts of DHHV (backward_sm90.cuh), that were or will be.
  int32_t parts_before;
  int32_t parts_after;
};

static_assert(sizeof(Args) == 1232, "src/cuda/params.rs has the same size");

// How a kernel wants to be launched, next to it in its module, where the host reads it: rows and
// columns of a block's tile, threads, bytes of dynamic shared memory.
#define MLSTM_GEOMETRY(name, rows, cols, threads, shared) \
  extern "C" {                                            \
  __device__ int32_t name##_geometry[4] = {rows, cols, threads, shared}; \
  }

#ifdef __CUDACC__

__device__ __forceinline__ Chunk chunk_at(const Args& args, int64_t c) {
  if (args.chunks != nullptr) return args.chunks[c];
  Chunk chunk;
  chunk.row = static_cast<int32_t>(c / args.chunks_per_row);
  chunk.start = (c - static_cast<int64_t>(chunk.row) * args.chunks_per_row) * args.chunk_len;
  int64_t left = args.s - chunk.start;
  chunk.len = static_cast<int32_t>(left < args.chunk_len ? left : args.chunk_len);
  return chunk;
}

__device__ __forceinline__ int64_t first_chunk(const Args& args, int row) {
  return args.first_chunk != nullptr ? args.first_chunk[row]
                                     : static_cast<int64_t>(row) * args.chunks_per_row;
}

// Batch row of a state row: packed sequences all lie in batch row 0.
__device__ __forceinline__ int batch_of(const Args& args, int row) {
  return args.chunks != nullptr ? 0 : row;
}

__device__ __forceinline__ int64_t token_index(const Args& args, int b, int h, int64_t t) {
  return (static_cast<int64_t>(b) * args.nh + h) * args.s + t;
}

__device__ __forceinline__ int64_t chunk_index(const Args& args, int64_t c, int h) {
  return c * args.nh + h;
}

// Chunks in each segment of a sequence.
__device__ __forceinline__ int chunks_per_segment(const Args& args, int chunks) {
  const int groups = (chunks + args.group_chunks - 1) / args.group_chunks;
  return max(1, (groups + args.segments - 1) / args.segments) * args.group_chunks;
}

// Of a boundary of a row whose first chunk is given; a row has one more than groups.
__device__ __forceinline__ int64_t boundary_slot(const Args& args, int64_t first, int row,
                                                 int boundary) {
  return first / kGroupChunks + 2 * static_cast<int64_t>(row) + boundary;
}

// Index of a chunk state: times DHQK_p * DHHV_p (c_states) or DHQK_p (n_states).
__device__ __forceinline__ int64_t slot_index(const Args& args, int64_t c, int row, int h) {
  return (c + row) * args.nh + h;
}

// Where token t of a chunk stands in vectors by the order of columns: the columns of a thread in a
// product (2 t and 2 t + 1 of each 8) are next to each other.
__device__ __forceinline__ int column_order(int t) {
  return (t >> 1 & 3) * 16 + (t >> 3) * 2 + (t & 1);
}

template <typename T>
__device__ __forceinline__ T* at(const Tensor& t, int64_t b, int64_t h, int64_t s) {
  return static_cast<T*>(t.data) + b * t.stride_b + h * t.stride_h + s * t.stride_s;
}

#endif  // __CUDACC__

}  // namespace mlstm
