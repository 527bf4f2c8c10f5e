// From gate pre-activations to the vectors of the Hopper kernels (Args::packed), with the same
// steps as gates.cu:
//   gates_reduce_fast   effect of each chunk on m        warp per chunk, head
//   gates_pack_*        after gates_scan_f32: vectors    warp per chunk, head
//   gates_whole_*       all three in one: a cluster of blocks per row and head holds its chunks
#include "gates_sm90.cuh"
#include "overlap.cuh"

namespace mlstm {
namespace {

__device__ __forceinline__ void reduce_fast(const Args& args) {
  start_dependents();
  wait_for_previous();
  ChunkItem item;
  int lane;
  if (!chunk_item(args, &item, &lane)) return;
  const Chunk chunk = fast_chunk_at(args, item.c);
  if (chunk.len == 0) return;
  const MaxPlusOf<float> upto = lane_effects(lane_pair(args, chunk, item.h, lane), lane);
  if (lane != 31) return;
  double* out = chunk_gates(args, item.c, item.h);
  out[0] = upto.decay;
  out[1] = upto.floor;
}

// By all lanes of a warp; `m_out` is where the chunk's first token has its m.
template <typename T>
__device__ __forceinline__ void store_vectors(const Args& args, const LanePair& pair,
                                              const FastVectors& x, int64_t c, int h, int lane,
                                              float* m_out) {
  float* out = args.packed + chunk_index(args, c, h) * kPackedFloats;
  put_vectors(*reinterpret_cast<Packed<T>*>(out), pair, x, (args.flags & kExponential) != 0, lane);
  if (lane == 0) {
    out[kPackedDecay] = exp2_approx(x.total);
    out[kPackedDecay + 1] = sweep_length(args, pair.chunk);
  }
  if (args.write_m != 0) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (j < pair.count) m_out[(2 * lane + j) * args.m.stride_s] = x.m[j];
    }
  }
}
static_assert(kPackedFloats % 4 == 0, "records start where a Packed may");

template <typename T>
__device__ __forceinline__ void pack_vectors(const Args& args) {
  start_dependents();
  wait_for_previous();
  ChunkItem item;
  int lane;
  if (!chunk_item(args, &item, &lane)) return;
  const Chunk chunk = fast_chunk_at(args, item.c);
  if (chunk.len == 0) return;
  const float m = chunk_m(args, item.c, item.h);
  const LanePair pair = lane_pair(args, chunk, item.h, lane);
  float* m_out = at<float>(args.m, batch_of(args, chunk.row), item.h, chunk.start);
  store_vectors<T>(args, pair, chunk_vectors(args, pair, m, lane), item.c, item.h, lane, m_out);
}

// For the exponential gate and rows of at most kChunks chunks, of which a warp keeps kPerWarp in registers.
// Each block learns the effects on m of all, and scans them.
template <typename T, int kChunks, int kBlocks, int kPerWarp>
__device__ __forceinline__ void whole(const Args& args) {
  start_dependents();
  cluster_arrive<kBlocks>();
  wait_for_previous();
  constexpr int kWholeChunks = kChunks / kBlocks;
  constexpr int kWholeWarps = kWholeChunks / kPerWarp;
  __shared__ float2 all_effects[kChunks];
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
  const Span tokens = row_tokens(args, row);
  const int b = batch_of(args, row);

  // A warp has the chunks first + own.
  const auto own = [&](int j) { return j * kWholeWarps + warp; };
  LanePair pairs[kPerWarp];
  MaxPlusOf<float> effects[kPerWarp];
  HeadGates gates = head_gates(args, b, h, tokens.start + (first + warp) * 64);
#pragma unroll
  for (int j = 0; j < kPerWarp; ++j) {
    const int64_t start = tokens.start + (first + own(j)) * 64;
    const Chunk chunk = {start, row, static_cast<int32_t>(min(tokens.end - start, int64_t{64}))};
    if (first + own(j) < count) pairs[j] = load_pair(args, chunk, gates, lane);
    gates.i.first += kWholeWarps * 64 * gates.i.step;
    gates.f.first += kWholeWarps * 64 * gates.f.step;
  }
#pragma unroll
  for (int j = 0; j < kPerWarp; ++j) {
    if (first + own(j) >= count) continue;
    take_logarithms(pairs[j]);
    effects[j] = lane_effects(pairs[j], lane);
  }
  // All blocks have started.
  cluster_wait<kBlocks>();
#pragma unroll
  for (int j = 0; j < kPerWarp; ++j) {
    if (first + own(j) >= count) continue;
    const float decay = __shfl_sync(kFullWarp, effects[j].decay, 31);
    const float floor = __shfl_sync(kFullWarp, effects[j].floor, 31);
    if (lane < kBlocks) store_cluster(shared_address(all_effects + first + own(j)), lane, decay, floor);
  }
  cluster_arrive<kBlocks>();
  cluster_wait<kBlocks>();
  if (warp == 0) {
    constexpr int kPerLane = div_up(kChunks, 32);
    MaxPlus chunks[kPerLane];
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int place = lane * kPerLane + j;
      const float2 effect = place < count ? all_effects[place] : make_float2(0.0f, -INFINITY);
      chunks[j] = {effect.x, effect.y};
    }
    const double initial = initial_m(args, row, h, kF32);
    const double m = scan_chunks(chunks, initial, lane, [&](int j, double before) {
      const unsigned place = lane * kPerLane + j - first;
      if (place < kWholeChunks) chunk_m[place] = static_cast<float>(before);
    });
    if (rank == 0 && lane == 0) store_last_m<float>(args, row, h, m);
  }
  __syncthreads();
  float* m_out = at<float>(args.m, b, h, tokens.start + first * 64);
#pragma unroll
  for (int j = 0; j < kPerWarp; ++j) {
    if (first + own(j) >= count) continue;
    const float m = lane_m(effects[j], chunk_m[own(j)], lane);
    store_vectors<T>(args, pairs[j], fast_vectors(pairs[j], m, true, lane), begin + first + own(j), h,
                     lane, m_out + own(j) * 64 * args.m.stride_s);
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

// Rows: chunks of a cluster; columns: its blocks. Clusters take longer to launch than large blocks, and of
// blocks of 1024 threads a multiprocessor runs one at a time: of many rows, those take fewer.
#define MLSTM_GATES_WHOLE(NAME, T, CHUNKS, BLOCKS, PER_WARP)                               \
  extern "C" __global__ void __cluster_dims__(BLOCKS)                                      \
      __launch_bounds__(32 * CHUNKS / BLOCKS / PER_WARP)                                   \
          NAME(const __grid_constant__ Args args) {                                        \
    mlstm::whole<T, CHUNKS, BLOCKS, PER_WARP>(args);                                       \
  }                                                                                        \
  MLSTM_GEOMETRY(NAME, CHUNKS, BLOCKS, 32 * CHUNKS / BLOCKS / PER_WARP, 0)
#define MLSTM_GATES_WHOLES(T, SUFFIX)                             \
  MLSTM_GATES_WHOLE(gates_whole_##SUFFIX##_16, T, 16, 1, 2)       \
  MLSTM_GATES_WHOLE(gates_whole_##SUFFIX##_32, T, 32, 1, 2)       \
  MLSTM_GATES_WHOLE(gates_whole_##SUFFIX##_64, T, 64, 1, 2)       \
  MLSTM_GATES_WHOLE(gates_whole_##SUFFIX##_128, T, 128, 2, 2)     \
  MLSTM_GATES_WHOLE(gates_whole_##SUFFIX##_256, T, 256, 4, 2)     \
  MLSTM_GATES_WHOLE(gates_many_##SUFFIX##_128, T, 128, 1, 4)
MLSTM_GATES_WHOLES(__nv_bfloat16, bf16)
MLSTM_GATES_WHOLES(__half, f16)
