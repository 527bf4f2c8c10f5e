// What the Hopper backward has done to its inputs and outputs:
//   gates_pack_backward   args.packed but delta, and token_bits   warp per chunk, head
//   copy_states           between 16-bit states C and the sweeps' in float
//                         block per row, head, row of C
// Blocks have 128 threads.
#include "gates_sm90.cuh"
#include "overlap.cuh"
#include "ptx_sm90.cuh"

namespace mlstm {
namespace {

__device__ __forceinline__ void pack_backward(const Args& args) {
  start_dependents();
  wait_for_previous();
  __shared__ alignas(16) float shared[kWarps][kBackwardFloats];
  float* packed = shared[threadIdx.x / 32];
  ChunkItem item;
  int lane;
  if (!chunk_item(args, &item, &lane)) return;
  const int64_t c = item.c;
  const int h = item.h;
  const Chunk chunk = fast_chunk_at(args, item.c);
  if (chunk.len == 0) return;
  const bool exponential = (args.flags & kExponential) != 0;
  const bool normalize = (args.flags & kNormalize) != 0;
  const bool exact = normalize && (args.flags & kDetach) == 0;
  const float scale = static_cast<float>(args.qk_scale), eps = static_cast<float>(args.eps);
  const float* n_tokens = at<float>(args.n, batch_of(args, chunk.row), h, chunk.start);
  float n[2] = {};
#pragma unroll
  for (int j = 0; j < 2 && normalize; ++j) {
    n[j] = n_tokens[min(2 * lane + j, chunk.len - 1) * args.n.stride_s];
  }
  const float m = chunk_m(args, c, h);
  const LanePair pair = lane_pair(args, chunk, h, lane);
  const FastVectors x = chunk_vectors(args, pair, m, lane);
  // Of each token's state and of m, two bits.
  unsigned resets = 0, follows = 0;
  float inv[2], sign[2], row[2], col[2], source[2], wsi[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const bool inside = j < pair.count;
    inv[j] = inside ? 1.0f : 0.0f;
    sign[j] = 0.0f;
    if (inside && normalize) {
      const float floor = exponential ? exp2_approx(-static_cast<float>(kLog2E) * x.m[j]) : 1.0f;
      inv[j] = reciprocal_approx(fmaxf(fabsf(n[j]), floor) + eps);
      if (exact && fabsf(n[j]) > floor) sign[j] = n[j] < 0.0f ? 1.0f : -1.0f;
    }
    row[j] = inside ? x.phi[j] + __log2f(scale * inv[j]) : static_cast<float>(kNever);
    col[j] = inside ? x.source[j] - x.phi[j] : static_cast<float>(kNever);
    source[j] = inside ? fast_input(x, j) : 0.0f;
    wsi[j] = inside ? exp2_approx(x.phi[j]) * scale * inv[j] : 0.0f;
    // Below it a decay is 0 in float. With m at -inf nothing has been seen, and it stays so.
    constexpr float kForgets = -150.0f;
    if (inside && x.step[j] < kForgets) resets |= 1u << j;
    if (!inside || x.step[j] == 0.0f || x.m[j] == -INFINITY) follows |= 1u << j;
  }
  const auto put = [&](int vector, int place, const float (&pair)[2]) {
    *reinterpret_cast<float2*>(packed + vector / 4 + place) = make_float2(pair[0], pair[1]);
  };
  constexpr float kZeros[2] = {0.0f, 0.0f};
  const int t = 2 * lane, column = column_order(t);
  put(kInvAt, t, inv);
  put(kSignAt, t, sign);
  put(kQueryRowAt, t, row);
  put(kKeyColumnAt, column, col);
  put(kSourceAt, column, source);
  put(kWsiAt, column, wsi);
  put(kKeyRowAt, t, col);
  put(kQueryColumnAt, column, row);
  put(kWDeltaAt, column, kZeros);
  put(kColumnDeltaAt, column, kZeros);
  if (lane < 4) {
    packed[kSweepDecayAt / 4 + lane] =
        lane == 0 ? exp2f(x.total) : lane == 1 ? sweep_length(args, chunk) : 0.0f;
  }
  const int place = lane % 16 * 2;
  const bool low = lane < 16;
  const uint4 bits = {__reduce_or_sync(kFullWarp, low ? resets << place : 0u),
                      __reduce_or_sync(kFullWarp, low ? 0u : resets << place),
                      __reduce_or_sync(kFullWarp, low ? follows << place : 0u),
                      __reduce_or_sync(kFullWarp, low ? 0u : follows << place)};
  if (lane == 0) *token_bits(args, c, h) = bits;
  __syncwarp();
  auto* out = reinterpret_cast<float4*>(args.packed + chunk_index(args, c, h) * kBackwardFloats);
  // The sweep for dq leaves the rest of whole chunks.
  const int pieces = exact && chunk.len == 64 ? kWDeltaAt / 16 : kBackwardFloats / 4;
  for (int piece = lane; piece < pieces; piece += 32) {
    out[piece] = reinterpret_cast<const float4*>(packed)[piece];
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
    copy_states(const __grid_constant__ mlstm::CopyArgs args) {
  mlstm::copy_states(args);
}
MLSTM_GEOMETRY(copy_states, 1, 1, 128, 0)
