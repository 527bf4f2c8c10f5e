// From gate pre-activations to the per-token vectors of params.cuh, in a few kernels:
//   chunk_table     packed sequences only: offsets on the device -> chunks    1 block of 1024
//   gates_reduce_*  effect of each chunk on m                                 warp per chunk, head
//   gates_scan_*    m at each chunk's start, m_last                           warp per row, head
//   gates_emit_*    m, exponents, weights                                     warp per chunk, head
// Blocks have 128 threads unless said otherwise. The sigmoid gate (m = 0) needs the last one only.
// gates_sm90.cu has those for the Hopper kernels.
#include "gatemath.cuh"
#include "overlap.cuh"

namespace mlstm {
namespace {

template <typename Acc>
__device__ __forceinline__ Pair<Acc> split(double x) {
  Acc hi = static_cast<Acc>(x);
  return {hi, static_cast<Acc>(x - static_cast<double>(hi))};
}

// Vectors of one chunk on their way to memory: lanes compute neighbouring tokens and so would write
// with gaps between them.
template <typename Acc>
struct Staged {
  Pair<Acc> row[kMaxChunk];
  Pair<Acc> col[kMaxChunk];
  Acc w[kMaxChunk];
  Acc a[kMaxChunk];
  Acc floor[kMaxChunk];
  Acc m[kMaxChunk];
};

template <typename Acc>
__device__ __forceinline__ void emit(const Args& args) {
  start_dependents();
  wait_for_previous();
  __shared__ Staged<Acc> shared[kWarps];
  Staged<Acc>& staged = shared[threadIdx.x / 32];
  int64_t item;
  int lane;
  if (!warp_item(args.num_chunks * args.nh, &item, &lane)) return;
  int64_t c = item / args.nh;
  int h = static_cast<int>(item % args.nh);
  LaneTokens tokens = lane_tokens<Acc>(args, c, h, lane);
  if (tokens.chunk.len == 0) return;
  bool exponential = (args.flags & kExponential) != 0;
  double m = exponential ? lane_m(tokens, chunk_gates(args, c, h)[2], lane) : 0.0;

  TokenGates gates[kPerLane];
  double mine = 0.0;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    if (j < tokens.count) {
      gates[j] = token_gates<Acc>(tokens.i[j], tokens.logf[j], m, exponential);
      m = gates[j].m;
      mine += gates[j].step * kLog2E;
    }
  }
  // Sum of the steps before this lane's tokens, and over the chunk.
  double sum = inclusive_sum(mine, lane);
  double total = __shfl_sync(kFullWarp, sum, 31);
  double phi = __shfl_up_sync(kFullWarp, sum, 1);
  if (lane == 0) phi = 0.0;

  int first = static_cast<int>(tokens.first - tokens.chunk.start);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    if (j >= tokens.count) continue;
    phi += gates[j].step * kLog2E;
    double source = gates[j].source * kLog2E;
    staged.row[first + j] = split<Acc>(phi);
    staged.col[first + j] = split<Acc>(source - phi);
    staged.w[first + j] = power_of_2<Acc>(phi);
    // Rounding may leave the difference of equal sums a little above 0.
    staged.a[first + j] = power_of_2<Acc>(fmin(total - phi, 0.0) + source);
    staged.floor[first + j] =
        exponential ? power_of_2<Acc>(-gates[j].m * kLog2E) : static_cast<Acc>(1);
    staged.m[first + j] = static_cast<Acc>(gates[j].m);
  }
  __syncwarp();

  int64_t base = token_index(args, tokens.b, h, tokens.chunk.start);
  int64_t base_m = tokens.b * args.m.stride_b + h * args.m.stride_h +
                   tokens.chunk.start * args.m.stride_s;
  for (int t = lane; t < tokens.chunk.len; t += 32) {
    static_cast<Pair<Acc>*>(args.row)[base + t] = staged.row[t];
    static_cast<Pair<Acc>*>(args.col)[base + t] = staged.col[t];
    static_cast<Acc*>(args.w)[base + t] = staged.w[t];
    static_cast<Acc*>(args.a)[base + t] = staged.a[t];
    static_cast<Acc*>(args.floor)[base + t] = staged.floor[t];
    if (args.write_m != 0) {
      static_cast<Acc*>(args.m.data)[base_m + t * args.m.stride_s] = staged.m[t];
    }
  }
  if (lane == 0) static_cast<Acc*>(args.g)[chunk_index(args, c, h)] = power_of_2<Acc>(total);
}

template <typename Acc>
__device__ __forceinline__ void reduce(const Args& args) {
  start_dependents();
  wait_for_previous();
  int64_t item;
  int lane;
  if (!warp_item(args.num_chunks * args.nh, &item, &lane)) return;
  int64_t c = item / args.nh;
  int h = static_cast<int>(item % args.nh);
  MaxPlus mine = inclusive_scan(effect(lane_tokens<Acc>(args, c, h, lane)), lane);
  if (lane == 31) {
    double* out = chunk_gates(args, c, h);
    out[0] = mine.decay;
    out[1] = mine.floor;
  }
}

template <typename Acc>
__device__ __forceinline__ void scan(const Args& args) {
  start_dependents();
  wait_for_previous();
  int64_t item;
  int lane;
  if (!warp_item(static_cast<int64_t>(args.rows) * args.nh, &item, &lane)) return;
  int row = static_cast<int>(item / args.nh);
  int h = static_cast<int>(item % args.nh);
  constexpr int kChunks = 8;
  int64_t end = first_chunk(args, row + 1);
  const auto load = [&](MaxPlus(&chunks)[kChunks], int64_t first) {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      chunks[j] = no_tokens();
      if (first + j >= end) continue;
      const double* gates = chunk_gates(args, first + j, h);
      chunks[j] = {__ldcg(gates), __ldcg(gates + 1)};
    }
  };
  int64_t first = first_chunk(args, row) + lane * kChunks;
  double m = initial_m(args, row, h, acc_dtype<Acc>());
  MaxPlus next[kChunks];
  load(next, first);
  for (; first - lane * kChunks < end; first += 32 * kChunks) {
    // The next ones are on their way meanwhile.
    MaxPlus chunks[kChunks];
#pragma unroll
    for (int j = 0; j < kChunks; ++j) chunks[j] = next[j];
    load(next, first + 32 * kChunks);
    m = scan_chunks(chunks, m, lane, [&](int j, double before) {
      if (first + j < end) chunk_gates(args, first + j, h)[2] = before;
    });
  }
  if (lane == 0) store_last_m<Acc>(args, row, h, m);
}

// Offset j, forced into order and into [0, S]: bad contents must not lead outside the tensors.
__device__ __forceinline__ int64_t offset_at(const Args& args, int64_t j) {
  j *= args.cu_seqlens_stride;
  int64_t x = args.cu_seqlens_wide != 0 ? static_cast<const int64_t*>(args.cu_seqlens)[j]
                                        : static_cast<const int32_t*>(args.cu_seqlens)[j];
  return min(max(x, static_cast<int64_t>(0)), args.s);
}

__device__ __forceinline__ int64_t chunks_of(const Args& args, int64_t tokens) {
  return (tokens + args.chunk_len - 1) / args.chunk_len;
}

struct Max {
  __device__ int64_t operator()(int64_t x, int64_t y) const { return max(x, y); }
};
struct Sum {
  __device__ int64_t operator()(int64_t x, int64_t y) const { return x + y; }
};

// Inclusive scan over a block of at most 1024: by warps, then over the warps' results.
template <typename Combine>
__device__ __forceinline__ int64_t block_scan(int64_t x, Combine combine, int64_t* shared) {
  int lane = threadIdx.x % 32;
  int warp = threadIdx.x / 32;
  for (int delta = 1; delta < 32; delta *= 2) {
    int64_t before = __shfl_up_sync(kFullWarp, x, delta);
    if (lane >= delta) x = combine(before, x);
  }
  if (lane == 31) shared[warp] = x;
  __syncthreads();
  for (int other = 0; other < warp; ++other) x = combine(shared[other], x);
  __syncthreads();
  return x;
}

__device__ void table(const Args& args) {
  start_dependents();
  __shared__ int64_t shared[32];
  __shared__ int64_t carry[2];  // largest offset and number of chunks so far
  Chunk* chunks = const_cast<Chunk*>(args.chunks);
  int64_t* first = const_cast<int64_t*>(args.first_chunk);
  int64_t* starts = args.seq_starts;
  if (threadIdx.x == 0) {
    carry[0] = starts[0] = offset_at(args, 0);
    carry[1] = first[0] = 0;
  }
  __syncthreads();
  for (int64_t base = 0; base < args.rows; base += blockDim.x) {
    int64_t row = base + threadIdx.x;
    bool real = row < args.rows;
    int64_t end = block_scan(real ? offset_at(args, row + 1) : 0, Max(), shared);
    end = max(end, carry[0]);
    if (real) starts[row + 1] = end;
    __syncthreads();
    int64_t count = real ? chunks_of(args, end - starts[row]) : 0;
    int64_t upto = block_scan(count, Sum(), shared) + carry[1];
    if (real) first[row + 1] = upto;
    __syncthreads();
    if (threadIdx.x == blockDim.x - 1) {
      carry[0] = end;
      carry[1] = upto;
    }
    __syncthreads();
  }
  for (int64_t c = threadIdx.x; c < args.num_chunks; c += blockDim.x) {
    Chunk chunk = {0, 0, 0};
    if (c < first[args.rows]) {
      // The last row whose first chunk is at or before c.
      int64_t low = 0;
      int64_t high = args.rows - 1;
      while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (first[middle] <= c) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      chunk.row = static_cast<int32_t>(low);
      chunk.start = starts[low] + (c - first[low]) * args.chunk_len;
      int64_t left = starts[low + 1] - chunk.start;
      chunk.len = static_cast<int32_t>(min(left, static_cast<int64_t>(args.chunk_len)));
    }
    chunks[c] = chunk;
  }
}

}  // namespace
}  // namespace mlstm

using mlstm::Args;

extern "C" __global__ void __launch_bounds__(1024) chunk_table(const __grid_constant__ Args args) {
  mlstm::table(args);
}
MLSTM_GEOMETRY(chunk_table, 1, 1, 1024, 0)

#define MLSTM_GATES(ACC, SUFFIX)                                                                 \
  extern "C" __global__ void __launch_bounds__(128)                                              \
      gates_reduce_##SUFFIX(const __grid_constant__ Args args) {                                 \
    mlstm::reduce<ACC>(args);                                                                    \
  }                                                                                              \
  MLSTM_GEOMETRY(gates_reduce_##SUFFIX, mlstm::kWarps, 1, 128, 0)                                \
  extern "C" __global__ void __launch_bounds__(128)                                              \
      gates_scan_##SUFFIX(const __grid_constant__ Args args) {                                   \
    mlstm::scan<ACC>(args);                                                                      \
  }                                                                                              \
  MLSTM_GEOMETRY(gates_scan_##SUFFIX, mlstm::kWarps, 1, 128, 0)                                  \
  extern "C" __global__ void __launch_bounds__(128, 4)                                           \
      gates_emit_##SUFFIX(const __grid_constant__ Args args) {                                   \
    mlstm::emit<ACC>(args);                                                                      \
  }                                                                                              \
  MLSTM_GEOMETRY(gates_emit_##SUFFIX, mlstm::kWarps, 1, 128, 0)
MLSTM_GATES(float, f32)
MLSTM_GATES(double, f64)
