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

// A chunk's part of Args::packed, and its m: lanes compute neighbouring tokens and so would write
// with gaps between them.
template <typename T>
struct alignas(16) Packed {
  T split[2][64];
  float vector[5][64];
  float m[64];
};

// Two neighbouring entries.
__device__ __forceinline__ void put_pair(float* to, float first, float second) {
  *reinterpret_cast<float2*>(to) = make_float2(first, second);
}
template <typename T>
__device__ __forceinline__ void put_pair(T* to, float first, float second) {
  *reinterpret_cast<uint32_t*>(to) = pack<T>(first, second);
}

// By all lanes of a warp; `m_out` is where the chunk's first token has its m.
template <typename T>
__device__ __forceinline__ void store_vectors(const Args& args, const LanePair& pair,
                                              const FastVectors& x, int64_t c, int h, int lane,
                                              float* m_out, Packed<T>& packed) {
  const bool exponential = (args.flags & kExponential) != 0;
  float w[2], a[2], phi[2], col[2], floor[2], low[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const bool inside = j < pair.count;
    w[j] = inside ? exp2_approx(x.phi[j]) : 0.0f;
    a[j] = inside ? fast_input(x, j) : 0.0f;
    low[j] = a[j] - to_acc(from_acc<T>(a[j]));
    phi[j] = inside ? x.phi[j] : 0.0f;
    col[j] = inside ? x.source[j] - x.phi[j] : static_cast<float>(kNever);
    floor[j] =
        inside && exponential ? exp2_approx(-static_cast<float>(kLog2E) * x.m[j]) : 1.0f;
  }
  const int t = 2 * lane, column = column_order(t);
  put_pair(packed.split[0] + t, a[0], a[1]);
  put_pair(packed.split[1] + (t ^ 8), low[0], low[1]);
  put_pair(packed.vector[0] + column, w[0], w[1]);
  put_pair(packed.vector[1] + t, phi[0], phi[1]);
  put_pair(packed.vector[2] + column, col[0], col[1]);
  put_pair(packed.vector[3] + column, a[0], a[1]);
  put_pair(packed.vector[4] + t, floor[0], floor[1]);
  if (args.write_m != 0) put_pair(packed.m + t, x.m[0], x.m[1]);
  __syncwarp();

  float* out = args.packed + chunk_index(args, c, h) * kPackedFloats;
#pragma unroll
  for (int piece = 0; piece < kPackedDecay / 4; piece += 32) {
    reinterpret_cast<float4*>(out)[piece + lane] =
        reinterpret_cast<const float4*>(&packed)[piece + lane];
  }
  if (args.write_m != 0) {
#pragma unroll
    for (int y = lane; y < 64; y += 32) {
      if (y < pair.chunk.len) m_out[y * args.m.stride_s] = packed.m[y];
    }
  }
  if (lane == 0) {
    out[kPackedDecay] = exp2_approx(x.total);
    out[kPackedDecay + 1] = sweep_length(args, pair.chunk);
  }
}
static_assert(kPackedDecay % 128 == 0 && kPackedFloats % 4 == 0, "stored by 16 bytes per lane");

template <typename T>
__device__ __forceinline__ void pack_vectors(const Args& args) {
  start_dependents();
  wait_for_previous();
  __shared__ Packed<T> shared[kWarps];
  ChunkItem item;
  int lane;
  if (!chunk_item(args, &item, &lane)) return;
  const Chunk chunk = fast_chunk_at(args, item.c);
  if (chunk.len == 0) return;
  const float m = chunk_m(args, item.c, item.h);
  const LanePair pair = lane_pair(args, chunk, item.h, lane);
  float* m_out = at<float>(args.m, batch_of(args, chunk.row), item.h, chunk.start);
  store_vectors(args, pair, chunk_vectors(args, pair, m, lane), item.c, item.h, lane, m_out,
                shared[threadIdx.x / 32]);
}

constexpr int kWholePerWarp = 2;  // chunks, which stay in registers

// For the exponential gate and rows of at most kChunks chunks. Each block learns the effects on m of all,
// and scans them.
template <typename T, int kChunks, int kBlocks>
__device__ __forceinline__ void whole(const Args& args, unsigned char* smem) {
  start_dependents();
  cluster_arrive<kBlocks>();
  wait_for_previous();
  constexpr int kWholeChunks = kChunks / kBlocks;
  constexpr int kWholeWarps = kWholeChunks / kWholePerWarp;
  auto* shared = reinterpret_cast<Packed<T>*>(smem);
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
  LanePair pairs[kWholePerWarp];
  MaxPlusOf<float> effects[kWholePerWarp];
  HeadGates gates = head_gates(args, b, h, tokens.start + (first + warp) * 64);
#pragma unroll
  for (int j = 0; j < kWholePerWarp; ++j) {
    const int64_t start = tokens.start + (first + own(j)) * 64;
    const Chunk chunk = {start, row, static_cast<int32_t>(min(tokens.end - start, int64_t{64}))};
    if (first + own(j) < count) pairs[j] = load_pair(args, chunk, gates, lane);
    gates.i.first += kWholeWarps * 64 * gates.i.step;
    gates.f.first += kWholeWarps * 64 * gates.f.step;
  }
#pragma unroll
  for (int j = 0; j < kWholePerWarp; ++j) {
    if (first + own(j) >= count) continue;
    take_logarithms(pairs[j]);
    effects[j] = lane_effects(pairs[j], lane);
  }
  // All blocks have started.
  cluster_wait<kBlocks>();
#pragma unroll
  for (int j = 0; j < kWholePerWarp; ++j) {
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
  for (int j = 0; j < kWholePerWarp; ++j) {
    if (first + own(j) >= count) continue;
    const float m = lane_m(effects[j], chunk_m[own(j)], lane);
    __syncwarp();
    store_vectors(args, pairs[j], fast_vectors(pairs[j], m, true, lane), begin + first + own(j), h,
                  lane, m_out + own(j) * 64 * args.m.stride_s, shared[warp]);
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

// Rows: chunks of a cluster; columns: its blocks. Clusters take longer to launch than large blocks.
#define MLSTM_GATES_WHOLE(T, SUFFIX, CHUNKS, BLOCKS)                                        \
  extern "C" __global__ void __cluster_dims__(BLOCKS)                                       \
      __launch_bounds__(32 * CHUNKS / BLOCKS / mlstm::kWholePerWarp)                        \
          gates_whole_##SUFFIX##_##CHUNKS(const __grid_constant__ Args args) {              \
    extern __shared__ unsigned char smem[];                                                 \
    mlstm::whole<T, CHUNKS, BLOCKS>(args, smem);                                            \
  }                                                                                         \
  MLSTM_GEOMETRY(gates_whole_##SUFFIX##_##CHUNKS, CHUNKS, BLOCKS,                           \
                 32 * CHUNKS / BLOCKS / mlstm::kWholePerWarp,                               \
                 CHUNKS / BLOCKS / mlstm::kWholePerWarp * static_cast<int>(sizeof(mlstm::Packed<T>)))
#define MLSTM_GATES_WHOLES(T, SUFFIX)  \
  MLSTM_GATES_WHOLE(T, SUFFIX, 16, 1)  \
  MLSTM_GATES_WHOLE(T, SUFFIX, 32, 1)  \
  MLSTM_GATES_WHOLE(T, SUFFIX, 64, 1)  \
  MLSTM_GATES_WHOLE(T, SUFFIX, 128, 2) \
  MLSTM_GATES_WHOLE(T, SUFFIX, 256, 4)
MLSTM_GATES_WHOLES(__nv_bfloat16, bf16)
MLSTM_GATES_WHOLES(__half, f16)
