// Vectors for the Hopper backward, and the last step of its gradients of the gates before
// gategrad.cu's:
//   gates_pack_backward   args.packed but w delta                   warp per chunk, head
//   gategrad_boundaries   E_c of all chunks (params.cuh) from what the sweeps leave: E at the
//                         boundaries and the sums q.dq, k.dk in between; E before the first chunk
//                         block per chunk, head (of a group's first), then per row, head
//   copy_states           between 16-bit states C and the sweeps' in float
//                         block per row, head, row of C
// Blocks have 128 threads.
#include "gates_sm90.cuh"
#include "overlap.cuh"

namespace mlstm {
namespace {

__device__ __forceinline__ void pack_backward(const Args& args) {
  start_dependents();
  wait_for_previous();
  __shared__ float shared[kWarps][kBackwardFloats];
  float* packed = shared[threadIdx.x / 32];
  int64_t item;
  int lane;
  if (!warp_item(args.num_chunks * args.nh, &item, &lane)) return;
  int64_t c = item / args.nh;
  int h = static_cast<int>(item % args.nh);
  LanePair pair = lane_pair(args, c, h, lane);
  if (pair.chunk.len == 0) return;
  FastVectors x = fast_vectors(args, pair, c, h, lane);
  const bool normalize = (args.flags & kNormalize) != 0;
  const bool exact = normalize && (args.flags & kDetach) == 0;
  const float scale = static_cast<float>(args.qk_scale), eps = static_cast<float>(args.eps);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int t = 2 * lane + j, column = column_order(t);
    const bool inside = j < pair.count;
    float inv = 1.0f, sign = 0.0f;
    if (inside && normalize) {
      const float n = at<float>(args.n, pair.b, h, pair.chunk.start + t)[0];
      const float floor =
          (args.flags & kExponential) != 0 ? exp2f(-static_cast<float>(kLog2E) * x.m[j]) : 1.0f;
      inv = 1.0f / (fmaxf(fabsf(n), floor) + eps);
      if (exact && fabsf(n) > floor) sign = n < 0.0f ? 1.0f : -1.0f;
    }
    const float row = inside ? x.phi[j] + log2f(scale * inv) : static_cast<float>(kNever);
    const float col = inside ? x.source[j] - x.phi[j] : static_cast<float>(kNever);
    packed[kSignAt / 4 + t] = sign;
    packed[kQueryRowAt / 4 + t] = row;
    packed[kKeyColumnAt / 4 + column] = col;
    packed[kSourceAt / 4 + column] = inside ? fast_input(x, j) : 0.0f;
    packed[kWsiAt / 4 + column] = inside ? exp2f(x.phi[j]) * scale * inv : 0.0f;
    packed[kKeyRowAt / 4 + t] = col;
    packed[kQueryColumnAt / 4 + column] = row;
    packed[kWDeltaAt / 4 + column] = packed[kColumnDeltaAt / 4 + column] = 0.0f;
    packed[kInvAt / 4 + t] = inside ? inv : 0.0f;
    if ((args.flags & kExponential) != 0 && inside) {
      // Unless there is more to it: the sweep for dq.
      static_cast<float*>(args.dm)[token_index(args, pair.b, h, pair.chunk.start + t)] = 0.0f;
    }
  }
  if (lane < 4) {
    const float length = __int_as_float(args.chunks != nullptr ? pair.chunk.len : 64);
    packed[kSweepDecayAt / 4 + lane] = lane == 0 ? exp2f(x.total) : lane == 1 ? length : 0.0f;
  }
  __syncwarp();
  float* out = args.packed + chunk_index(args, c, h) * kBackwardFloats;
  for (int word = lane; word < kBackwardFloats; word += 32) out[word] = packed[word];
}

// E at a boundary, by a warp.
__device__ __forceinline__ float boundary_sum(const Args& args, int64_t first, int row, int h,
                                              int boundary) {
  const float* parts =
      args.boundary_e +
      (boundary_slot(args, first, row, boundary) * args.nh + h) * args.boundary_parts;
  float sum = 0.0f;
  for (int part = threadIdx.x % 32; part < args.boundary_parts; part += 32) sum += parts[part];
  return warp_sum(sum);
}

// Of a chunk, by a warp: the sum of q.dq - k.dk, and of the squares of both.
__device__ __forceinline__ float2 chunk_sums(const Args& args, int64_t c, int h) {
  const Chunk chunk = chunk_at(args, c);
  const int64_t base = token_index(args, batch_of(args, chunk.row), h, chunk.start);
  const int64_t stride = static_cast<int64_t>(args.b) * args.nh * args.s;
  float2 sums = make_float2(0.0f, 0.0f);
  for (int t = threadIdx.x % 32; t < chunk.len; t += 32) {
    float q = 0.0f, k = 0.0f;
    for (int part = 0; part < args.qk_tiles; ++part) {
      q += static_cast<const float*>(args.q_dq)[part * stride + base + t];
      k += static_cast<const float*>(args.k_dk)[part * stride + base + t];
    }
    sums.x += q - k;
    sums.y += q * q + k * k;
  }
  return make_float2(warp_sum(sums.x), warp_sum(sums.y));
}

__device__ __forceinline__ void boundaries(const Args& args) {
  __shared__ float2 shared[kGroupChunks];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t chunks = args.num_chunks * args.nh;
  if (blockIdx.x >= chunks) {
    const int64_t head = blockIdx.x - chunks;
    const int row = static_cast<int>(head / args.nh), h = static_cast<int>(head % args.nh);
    const float e = boundary_sum(args, first_chunk(args, row), row, h, 0);
    if (threadIdx.x == 0) static_cast<float*>(args.e_first)[head] = e;
    return;
  }
  const int64_t c = blockIdx.x / args.nh;
  const int h = static_cast<int>(blockIdx.x % args.nh);
  const Chunk chunk = chunk_at(args, c);
  const int64_t first = first_chunk(args, chunk.row);
  const int place = static_cast<int>(c - first);
  if (chunk.len == 0 || place % kGroupChunks != 0) return;
  const int count =
      min(kGroupChunks, static_cast<int>(first_chunk(args, chunk.row + 1) - first) - place);
  for (int x = warp; x < count; x += kWarps) {
    const float2 sums = chunk_sums(args, c + x, h);
    if (lane == 0) shared[x] = sums;
  }
  const int boundary = place / kGroupChunks;
  const float before = boundary_sum(args, first, chunk.row, h, boundary);
  const float after = boundary_sum(args, first, chunk.row, h, boundary + 1);
  __syncthreads();
  if (threadIdx.x != 0) return;
  // What rounding makes of the difference is spread in proportion to what the chunks may have
  // contributed, as gategrad.cu does within a chunk.
  float all = after, weights = 0.0f;
  for (int x = 0; x < count; ++x) {
    all += shared[x].x;
    weights += shared[x].y;
  }
  // A state that is not finite says nothing about a group that starts with a reset.
  const float rest = before - all;
  const float correction = weights > 0.0f && isfinite(rest) ? rest / weights : 0.0f;
  float e = after;
  for (int x = count - 1; x >= 0; --x) {
    static_cast<float*>(args.e)[chunk_index(args, c + x, h)] = e;
    e += shared[x].x + correction * shared[x].y;
  }
}

struct CopyArgs {
  Tensor from, to;
  int32_t nh, dhqk, dhhv, from_dtype, to_dtype;
};

__device__ __forceinline__ void copy_states(const CopyArgs& args) {
  const int d = static_cast<int>(blockIdx.x % args.dhqk);
  const int64_t head = blockIdx.x / args.dhqk;
  const int64_t row = head / args.nh, h = head % args.nh;
  const int64_t from = row * args.from.stride_b + h * args.from.stride_h + d * args.from.stride_s;
  const int64_t to = row * args.to.stride_b + h * args.to.stride_h + d * args.to.stride_s;
  for (int x = threadIdx.x; x < args.dhhv; x += 128) {
    store_any<float>(args.to.data, to + x, args.to_dtype,
                     load_any<float>(args.from.data, from + x, args.from_dtype));
  }
}

}  // namespace
}  // namespace mlstm

extern "C" __global__ void __launch_bounds__(128)
    gates_pack_backward(const __grid_constant__ mlstm::Args args) {
  mlstm::pack_backward(args);
}
MLSTM_GEOMETRY(gates_pack_backward, mlstm::kWarps, 1, 128, 0)

extern "C" __global__ void __launch_bounds__(128)
    gategrad_boundaries(const __grid_constant__ mlstm::Args args) {
  mlstm::boundaries(args);
}
MLSTM_GEOMETRY(gategrad_boundaries, 1, 1, 128, 0)

extern "C" __global__ void __launch_bounds__(128)
    copy_states(const __grid_constant__ mlstm::CopyArgs args) {
  mlstm::copy_states(args);
}
MLSTM_GEOMETRY(copy_states, 1, 1, 128, 0)
