// From gate pre-activations to the vectors of the Hopper kernels (Args::packed), with the same
// steps as gates.cu:
//   gates_reduce_fast   effect of each chunk on m        warp per chunk, head
//   gates_pack_*        after gates_scan_f32: vectors    warp per chunk, head
//   gates_whole_*       all three in one: a cluster of blocks per row and head holds its chunks
#include "gates_sm90.cuh"
#include "overlap.cuh"

namespace mlstm {
namespace {

__device__ __forceinline__ void store_effects(const Args& args, int64_t c, int h, int lane,
                                              MaxPlusOf<float> upto) {
  if (lane != 31) return;
  double* out = chunk_gates(args, c, h);
  out[0] = upto.decay;
  out[1] = upto.floor;
}

__device__ __forceinline__ void reduce_fast(const Args& args) {
  start_dependents();
  wait_for_previous();
  int64_t item;
  int lane;
  if (!warp_item(args.num_chunks * args.nh, &item, &lane)) return;
  int64_t c = item / args.nh;
  int h = static_cast<int>(item % args.nh);
  store_effects(args, c, h, lane, lane_effects(lane_pair(args, chunk_at(args, c), h, lane), lane));
}

// A chunk's part of Args::packed, and its m: lanes compute neighbouring tokens and so would write
// with gaps between them.
template <typename T>
struct alignas(16) Packed {
  T split[2][64];
  float vector[5][64];
  float m[64];
};

// By all lanes of a warp.
template <typename T>
__device__ __forceinline__ void store_vectors(const Args& args, const LanePair& pair,
                                              const FastVectors& x, int64_t c, int h, int lane,
                                              Packed<T>& packed) {
  bool exponential = (args.flags & kExponential) != 0;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    int t = 2 * lane + j;
    int column = column_order(t);
    bool inside = j < pair.count;
    packed.vector[0][column] = inside ? exp2f(x.phi[j]) : 0.0f;
    float a = inside ? fast_input(x, j) : 0.0f;
    packed.vector[3][column] = a;
    T high = static_cast<T>(a);
    packed.split[0][t] = high;
    packed.split[1][t ^ 8] = static_cast<T>(a - static_cast<float>(high));
    packed.vector[1][t] = inside ? x.phi[j] : 0.0f;
    packed.vector[2][column] = inside ? x.source[j] - x.phi[j] : static_cast<float>(kNever);
    packed.vector[4][t] =
        inside && exponential ? exp2f(-static_cast<float>(kLog2E) * x.m[j]) : 1.0f;
    packed.m[t] = x.m[j];
  }
  __syncwarp();

  float* out = args.packed + chunk_index(args, c, h) * kPackedFloats;
#pragma unroll
  for (int piece = 0; piece < kPackedDecay / 4; piece += 32) {
    reinterpret_cast<float4*>(out)[piece + lane] =
        reinterpret_cast<const float4*>(&packed)[piece + lane];
  }
  if (args.write_m != 0) {
    float* m_out = at<float>(args.m, pair.b, h, pair.chunk.start);
#pragma unroll
    for (int t = lane; t < 64; t += 32) {
      if (t < pair.chunk.len) m_out[t * args.m.stride_s] = packed.m[t];
    }
  }
  if (lane == 0) {
    out[kPackedDecay] = exp2f(x.total);
    out[kPackedDecay + 1] = sweep_length(args, pair.chunk);
  }
}
static_assert(kPackedDecay % 128 == 0 && kPackedFloats % 4 == 0, "stored by 16 bytes per lane");

template <typename T>
__device__ __forceinline__ void pack_vectors(const Args& args) {
  start_dependents();
  wait_for_previous();
  __shared__ Packed<T> shared[kWarps];
  int64_t item;
  int lane;
  if (!warp_item(args.num_chunks * args.nh, &item, &lane)) return;
  int64_t c = item / args.nh;
  int h = static_cast<int>(item % args.nh);
  const Chunk chunk = chunk_at(args, c);
  if (chunk.len == 0) return;
  const float m = chunk_m(args, c, h);
  const LanePair pair = lane_pair(args, chunk, h, lane);
  store_vectors(args, pair, chunk_vectors(args, pair, m, lane), c, h, lane,
                shared[threadIdx.x / 32]);
}

// Orders all that the cluster's threads did before it, to global memory too, before what they do
// after it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

constexpr int kWholeWarps = 8;
constexpr int kWholePerWarp = 2;  // chunks, which stay in registers
constexpr int kWholeChunks = kWholeWarps * kWholePerWarp;

// The same as chunk_at, by the place in the row.
__device__ __forceinline__ Chunk chunk_of_row(const Args& args, int row, int64_t place) {
  const Span tokens = row_tokens(args, row);
  const int64_t start = tokens.start + place * 64;
  return {start, row, static_cast<int32_t>(min(tokens.end - start, static_cast<int64_t>(64)))};
}

// For the exponential gate. A row has at most kBlocks * kWholeChunks chunks.
template <typename T, int kBlocks>
__device__ __forceinline__ void whole(const Args& args) {
  start_dependents();
  wait_for_previous();
  __shared__ Packed<T> shared[kWholeWarps];
  __shared__ float chunk_m[kWholeChunks];  // before each chunk
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(kFullWarp, threadIdx.x / 32, 0);
  const int rank = blockIdx.x % kBlocks;
  const int item = blockIdx.x / kBlocks;
  const int h = item % args.nh;
  const int row = item / args.nh;
  const int64_t begin = first_chunk(args, row);
  const int count = static_cast<int>(first_chunk(args, row + 1) - begin);
  const int first = rank * kWholeChunks;

  LanePair pairs[kWholePerWarp];
  MaxPlusOf<float> effects[kWholePerWarp];
#pragma unroll
  for (int j = 0; j < kWholePerWarp; ++j) {
    const int place = first + j * kWholeWarps + warp;
    if (place < count) pairs[j] = load_pair(args, chunk_of_row(args, row, place), h, lane);
  }
#pragma unroll
  for (int j = 0; j < kWholePerWarp; ++j) {
    const int place = first + j * kWholeWarps + warp;
    if (place >= count) continue;
    take_logarithms(pairs[j]);
    effects[j] = lane_effects(pairs[j], lane);
    store_effects(args, begin + place, h, lane, effects[j]);
  }
  cluster_sync();
  if (warp == 0) {
    const double m = scan_row<float, 4>(args, row, h, lane, [&](int64_t c, double before) {
      const unsigned own = static_cast<int>(c - begin) - first;
      if (own < kWholeChunks) chunk_m[own] = static_cast<float>(before);
    });
    if (rank == 0 && lane == 0) store_last_m<float>(args, row, h, m);
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kWholePerWarp; ++j) {
    const int own = j * kWholeWarps + warp;
    const int place = first + own;
    if (place >= count) continue;
    const float m = lane_m(effects[j], chunk_m[own], lane);
    __syncwarp();
    store_vectors(args, pairs[j], fast_vectors(pairs[j], m, true, lane), begin + place, h, lane,
                  shared[warp]);
  }
}

}  // namespace
}  // namespace mlstm

using mlstm::Args;

extern "C" __global__ void __launch_bounds__(128)
    gates_reduce_fast(const __grid_constant__ Args args) {
  mlstm::reduce_fast(args);
}
MLSTM_GEOMETRY(gates_reduce_fast, mlstm::kWarps, 1, 128, 0)

#define MLSTM_GATES_PACK(T, SUFFIX)                            \
  extern "C" __global__ void __launch_bounds__(128)            \
      gates_pack_##SUFFIX(const __grid_constant__ Args args) { \
    mlstm::pack_vectors<T>(args);                              \
  }                                                            \
  MLSTM_GEOMETRY(gates_pack_##SUFFIX, mlstm::kWarps, 1, 128, 0)
MLSTM_GATES_PACK(__nv_bfloat16, bf16)
MLSTM_GATES_PACK(__half, f16)

// Rows: chunks of a cluster.
#define MLSTM_GATES_WHOLE(T, SUFFIX, BLOCKS)                                       \
  extern "C" __global__ void __cluster_dims__(BLOCKS) __launch_bounds__(256, 4)    \
      gates_whole_##SUFFIX##_x##BLOCKS(const __grid_constant__ Args args) {        \
    mlstm::whole<T, BLOCKS>(args);                                                 \
  }                                                                                \
  MLSTM_GEOMETRY(gates_whole_##SUFFIX##_x##BLOCKS, BLOCKS* mlstm::kWholeChunks, 1, \
                 32 * mlstm::kWholeWarps, 0)
#define MLSTM_GATES_WHOLES(T, SUFFIX) \
  MLSTM_GATES_WHOLE(T, SUFFIX, 1)     \
  MLSTM_GATES_WHOLE(T, SUFFIX, 2)     \
  MLSTM_GATES_WHOLE(T, SUFFIX, 4)     \
  MLSTM_GATES_WHOLE(T, SUFFIX, 8)
MLSTM_GATES_WHOLES(__nv_bfloat16, bf16)
MLSTM_GATES_WHOLES(__half, f16)
