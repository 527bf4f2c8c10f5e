// What segments of long sequences add to the states. C, n (of the forward too) and dC are sweeps of
// backward_sm90.cuh; dn needs no products:
//   segments_dn_*   dn of a segment, 64 columns   block per row, head, slab of DHQK, segment but the
//                                                 first; 512 threads
#include "backward_sweep_sm90.cuh"
#include "gatemath.cuh"

namespace mlstm {
namespace {

constexpr int kDnWarps = 16;

// How many of some chunks, from the first on, leave anything of what is after the last of them: in float
// the product of their g is not zero yet. By a warp.
__device__ __forceinline__ int remembered(const Args& args, int64_t first, int head, int count,
                                          int lane) {
  constexpr int kAtOnce = 8;
  constexpr float kNothing = -150.0f;  // logarithm of what is zero
  float before = 0.0f;
  for (int base = 0; base < count; base += 32 * kAtOnce) {
    float g[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t c = first + min(base + j * 32 + lane, count - 1);
      g[j] = args.packed[chunk_index(args, c, head) * kBackwardFloats + kSweepDecayAt / 4];
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const float sum = before + inclusive_sum(log2f(g[j]), lane);
      const unsigned gone = __ballot_sync(kFullWarp, sum < kNothing);
      if (gone != 0) return min(base + j * 32 + __ffs(gone), count);
      before = __shfl_sync(kFullWarp, sum, 31);
    }
  }
  return count;
}

// dn before the segment with none after it: sum_c (product of g before c) sum_x (w delta q)_x. A warp
// takes some chunks in a row, a thread 8 columns of every fourth token.
template <typename T>
__device__ __forceinline__ void segment_dn(const Args& args) {
  wait_for_previous();
  start_dependents();
  __shared__ float parts[kDnWarps][64];
  __shared__ float decays[kDnWarps];
  const uint32_t slabs = args.dhqk / 64;
  uint32_t id = blockIdx.x;
  const int slab = id % slabs;
  id /= slabs;
  const int segment = id % (args.segments - 1) + 1;
  id /= args.segments - 1;
  const int head = id % args.nh, row = id / args.nh;
  const int64_t begin = first_chunk(args, row);
  const int total = static_cast<int>(first_chunk(args, row + 1) - begin);
  const int per = chunks_per_segment(args, total);
  const int from = min(segment * per, total), all_chunks = min(per, total - from);
  if (all_chunks == 0) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, piece = lane % 8;
  const int count = remembered(args, begin + from, head, all_chunks, lane);
  float sum[8] = {};
  float decay = 1.0f;
  for (int x = count * warp / kDnWarps; x < count * (warp + 1) / kDnWarps; ++x) {
    const int64_t c = begin + from + x;
    const Chunk chunk = chunk_at(args, c);
    const float* vectors = args.packed + chunk_index(args, c, head) * kBackwardFloats;
    const T* q = at<T>(args.q, batch_of(args, row), head, chunk.start) + slab * 64 + piece * 8;
    // All loads at once.
    uint4 values[16];
    float weights[16];
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const int t = min(j * 4 + lane / 8, chunk.len - 1);
      values[j] = *reinterpret_cast<const uint4*>(q + t * args.q.stride_s);
    }
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      weights[j] = vectors[kWDeltaAt / 4 + column_order(j * 4 + lane / 8)];
    }
    const float g = vectors[kSweepDecayAt / 4];
    float added[8] = {};
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float weight = weights[j];
      const uint32_t words[4] = {values[j].x, values[j].y, values[j].z, values[j].w};
#pragma unroll
      for (int z = 0; z < 4; ++z) {
        float first, second;
        unpack<T>(words[z], first, second);
        added[2 * z] += weight * first;
        added[2 * z + 1] += weight * second;
      }
    }
#pragma unroll
    for (int z = 0; z < 8; ++z) sum[z] += decay == 0.0f ? 0.0f : decay * added[z];
    decay *= g;
  }
#pragma unroll
  for (int z = 0; z < 8; ++z) {
    sum[z] += __shfl_xor_sync(0xffffffffu, sum[z], 8);
    sum[z] += __shfl_xor_sync(0xffffffffu, sum[z], 16);
    if (lane < 8) parts[warp][piece * 8 + z] = sum[z];
  }
  if (lane == 0) decays[warp] = decay;
  __syncthreads();
  if (threadIdx.x >= 64) return;
  float all = 0.0f, before = 1.0f;
#pragma unroll
  for (int w = 0; w < kDnWarps; ++w) {
    all += before == 0.0f ? 0.0f : before * parts[w][threadIdx.x];
    before *= decays[w];
  }
  const int64_t place = (static_cast<int64_t>(args.rows + row) * args.nh + head) *
                            (args.segments - 1) + segment - 1;
  args.segment_n[place * args.dhqk + slab * 64 + threadIdx.x] = all;
}

}  // namespace
}  // namespace mlstm

MLSTM_SWEEPS(segments_c_bf16, mlstm::bf16, mlstm::Sweep::kC)
MLSTM_SWEEPS(segments_c_f16, mlstm::f16, mlstm::Sweep::kC)
MLSTM_SWEEPS(segments_dc_bf16, mlstm::bf16, mlstm::Sweep::kDc)
MLSTM_SWEEPS(segments_dc_f16, mlstm::f16, mlstm::Sweep::kDc)

#define MLSTM_SEGMENT_DN(NAME, T)                             \
  extern "C" __global__ void __launch_bounds__(512, 1)        \
      NAME(const __grid_constant__ mlstm::BackwardArgs args) { \
    mlstm::segment_dn<T>(args.args);                          \
  }                                                           \
  MLSTM_GEOMETRY(NAME, 64, 1, 512, 0)
MLSTM_SEGMENT_DN(segments_dn_bf16, mlstm::bf16)
MLSTM_SEGMENT_DN(segments_dn_f16, mlstm::f16)
