// Gradients of the gates for the Hopper backward: gategrad.cu's sums, but over groups of chunks, at
// whose ends the sweeps leave E (params.cuh).
//   gategrad_path        for each group, what dm does to `through_m` from the row's end to the
//                        group's; needed where there are groups and a gradient of m
//                        block per row, head
//   gategrad_emit_fast   di, df, dm_initial   block per group, head
// Blocks have 256 threads.
#include "gates_sm90.cuh"
#include "overlap.cuh"
#include "ptx_sm90.cuh"

namespace mlstm {
namespace {

constexpr int kGroupTokens = 64 * kGroupChunks;
constexpr int kGroupWarps = 8;
constexpr int kWarpTokens = kGroupTokens / kGroupWarps;
constexpr int kPieces = kWarpTokens / 32;  // tokens of a lane
static_assert(kWarpTokens == 128 && kPieces == 4, "two chunks, and float4 for a lane's tokens");

// A row's chunks and groups of them.
struct Row {
  int row;
  int64_t first;  // chunk
  int chunks, groups;
};

__device__ __forceinline__ Row row_of(const Args& args, int row) {
  const int64_t first = first_chunk(args, row);
  const int chunks = static_cast<int>(first_chunk(args, row + 1) - first);
  return {row, first, chunks, div_up(chunks, kGroupChunks)};
}

// Whether h depends on m.
__device__ __forceinline__ bool has_dm(const Args& args) {
  return (args.flags & kExponential) != 0 && (args.flags & kNormalize) != 0 &&
         (args.flags & kDetach) == 0 && args.eps != 0.0;
}

// By a warp: of a group, of which only the tokens before the first one that follows the input gate
// reach what is before the group.
__device__ __forceinline__ Path group_path(const Args& args, const Row& row, int h, int group,
                                           int lane) {
  const int64_t c = row.first + group * kGroupChunks + lane;
  uint2 follows = {~0u, ~0u};
  if (lane < min(kGroupChunks, row.chunks - group * kGroupChunks)) {
    follows = __ldcg(reinterpret_cast<const uint2*>(token_bits(args, c, h)) + 1);
  }
  const unsigned stops = __ballot_sync(kFullWarp, (follows.x & follows.y) != ~0u);
  const Span tokens = row_tokens(args, row.row);
  const int64_t start = tokens.start + static_cast<int64_t>(group) * kGroupTokens;
  int end = static_cast<int>(min(tokens.end - start, static_cast<int64_t>(kGroupTokens)));
  if (stops != 0) {
    const int stop = follows.x != ~0u ? __ffs(~follows.x) - 1 : __ffs(~follows.y) + 31;
    const int chunk = __ffs(stops) - 1;
    end = chunk * 64 + __shfl_sync(kFullWarp, stop, chunk);
  }
  float sum = 0.0f;
  if (has_dm(args)) {
    const float* dm = static_cast<const float*>(args.dm) +
                      token_index(args, batch_of(args, row.row), h, start);
#pragma unroll 8
    for (int t = lane; t < end; t += 32) sum += __ldcg(dm + t);
  }
  return {stops == 0, warp_sum(static_cast<double>(sum))};
}

// Reads nothing of the kernel before it, which waited for the one that left dm, and may run beside it.
__device__ __forceinline__ void path(const Args& args) {
  start_dependents();
  __shared__ Path paths[32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Row row = row_of(args, static_cast<int>(blockIdx.x / args.nh));
  const int h = static_cast<int>(blockIdx.x % args.nh);
  Path later = {true, 0.0};
  for (int end = row.groups; end > 0; end -= 32) {
    for (int x = warp; x < 32; x += kGroupWarps) {
      Path mine = {true, 0.0};
      if (end - 32 + x >= 0) mine = group_path(args, row, h, end - 32 + x, lane);
      if (lane == 0) paths[x] = mine;
    }
    __syncthreads();
    if (warp == 0) {
      const Path from = suffix_scan(paths[lane], lane);
      const Path beyond = then(later, next_lane(from, lane));
      const int group = end - 32 + lane;
      if (group >= 0) {
        double* out = chunk_gates(args, row.first + group * kGroupChunks, h);
        out[0] = beyond.keeps ? 1.0 : 0.0;
        out[1] = beyond.added;
      }
      const Path all = {__shfl_sync(kFullWarp, static_cast<int>(from.keeps), 0) != 0,
                        __shfl_sync(kFullWarp, from.added, 0)};
      later = then(later, all);
    }
    __syncthreads();
  }
  // The next kernel waits for this one only.
  wait_for_previous();
}

// Groups are numbered with room for one that is not full in each row; false for a number without.
__device__ __forceinline__ bool find_group(const Args& args, int64_t number, Row& row, int& group) {
  const auto first_group = [&](int row) {
    return first_chunk(args, row) / kGroupChunks + row;
  };
  int low = 0, high = args.rows - 1;
  while (low < high) {
    const int middle = high - (high - low) / 2;
    if (first_group(middle) <= number) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  row = row_of(args, low);
  group = static_cast<int>(number - first_group(low));
  // A row without tokens may still have its dm_initial.
  return group < max(row.groups, 1);
}

// E at a boundary, by a warp.
__device__ __forceinline__ float boundary_sum(const Args& args, int64_t first, int row, int h,
                                              int boundary) {
  const float* parts =
      args.boundary_e +
      (boundary_slot(args, first, row, boundary) * args.nh + h) * args.boundary_parts;
  float sum = 0.0f;
#pragma unroll 1
  for (int part = threadIdx.x % 32; part < args.boundary_parts; part += 32) sum += parts[part];
  return warp_sum(sum);
}

// `through_m` at the end of a group, by a warp.
__device__ __forceinline__ double end_path(const Args& args, const Row& row, int h, int group) {
  double x = 0.0;
  // A literal gradient of m_last, beyond what keeps C e^m as it is.
  if (args.dm_last.data != nullptr) {
    x = at<float>(args.dm_last, row.row, h, 0)[0];
    x -= boundary_sum(args, row.first, row.row, h, row.groups);
  }
  if (group + 1 >= row.groups) return x;
  const double* kept = chunk_gates(args, row.first + group * kGroupChunks, h);
  return apply(Path{__ldcg(kept) != 0.0, __ldcg(kept + 1)}, x);
}

__device__ __forceinline__ void store_gate(const Args& args, const GateTokens& gate, int j, float x) {
  char* to = gate.first + j * gate.step;
  if (args.gate_dtype == kF32) {
    *reinterpret_cast<float*>(to) = x;
  } else {
    *reinterpret_cast<uint16_t*>(to) = args.gate_dtype == kBf16
                                           ? __bfloat16_as_ushort(__float2bfloat16(x))
                                           : __half_as_ushort(__float2half(x));
  }
}

__device__ __forceinline__ float fast_sigmoid(float x) {
  return reciprocal_approx(1.0f + exp2_approx(-static_cast<float>(kLog2E) * x));
}

// Per lane, of its tokens: sums from each on, of those and all that follow.
struct Suffixes {
  float of[kPieces];

  __device__ __forceinline__ explicit Suffixes(const float4& x)
      : of{x.x + (x.y + (x.z + x.w)), x.y + (x.z + x.w), x.z + x.w, x.w} {}
};

__device__ __forceinline__ void emit(const Args& args) {
  start_dependents();
  // In the order of tokens: lanes read and write every 32nd, and add up neighbours.
  __shared__ alignas(16) float shared[3][kGroupTokens];
  __shared__ float4 totals[kGroupWarps];
  __shared__ float boundary_e[2];
  __shared__ double after_group;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int h = static_cast<int>(blockIdx.x % args.nh);
  Row row;
  int group;
  if (!find_group(args, blockIdx.x / args.nh, row, group)) return;
  const bool exponential = (args.flags & kExponential) != 0;
  const bool with_dm = has_dm(args);
  const bool with_path = with_dm || (exponential && args.dm_last.data != nullptr);
  const int b = batch_of(args, row.row), first = warp * kWarpTokens;
  const Span tokens = row_tokens(args, row.row);
  const int64_t start = tokens.start + static_cast<int64_t>(group) * kGroupTokens + first;
  const int left = static_cast<int>(
      max(min(tokens.end - start, static_cast<int64_t>(kWarpTokens)), static_cast<int64_t>(0)));

  const GateTokens f_tokens = gate_tokens(args, args.f, b, h, start + lane);
  uint32_t f[kPieces] = {};
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    if (j * 32 + lane < left) f[j] = load_bits(args, f_tokens, j * 32);
  }
  // Of the lane's neighbours.
  uint4 bits = {0, 0, ~0u, ~0u};
  if (lane / 16 * 64 < left) {
    bits = __ldcg(token_bits(args, row.first + group * kGroupChunks + warp * 2 + lane / 16, h));
  }
  const uint32_t resets = ((lane & 8) == 0 ? bits.x : bits.y) >> (lane & 7) * 4;
  const uint32_t follows = ((lane & 8) == 0 ? bits.z : bits.w) >> (lane & 7) * 4;
  wait_for_previous();

  const int64_t base = token_index(args, b, h, start) + lane;
  const int64_t stride = static_cast<int64_t>(args.b) * args.nh * args.s;
  const float* q_dq = static_cast<const float*>(args.q_dq) + base;
  const float* k_dk = static_cast<const float*>(args.k_dk) + base;
  float q[kPieces] = {}, k[kPieces] = {}, m[kPieces];
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const bool inside = with_dm && j * 32 + lane < left;
    m[j] = inside ? static_cast<const float*>(args.dm)[base + j * 32] : 0.0f;
  }
#pragma unroll 1
  for (int part = 0; part < args.qk_tiles; ++part) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const bool inside = j * 32 + lane < left;
      q[j] += inside ? q_dq[j * 32] : 0.0f;
      k[j] += inside ? k_dk[j * 32] : 0.0f;
    }
    q_dq += stride;
    k_dk += stride;
  }
  float* const differences = shared[0] + first;
  float* const squares = shared[1] + first;
  float* const through = shared[2] + first;
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    differences[j * 32 + lane] = q[j] - k[j];
    squares[j * 32 + lane] = q[j] * q[j] + k[j] * k[j];
    through[j * 32 + lane] = m[j];
  }
  if (warp < 2) {
    const float e = boundary_sum(args, row.first, row.row, h, min(group + warp, row.groups));
    if (lane == 0) boundary_e[warp] = e;
  } else if (warp == 2) {
    const double x = with_path ? end_path(args, row, h, group) : 0.0;
    if (lane == 0) after_group = x;
  }
  __syncwarp();

  const Suffixes sum(reinterpret_cast<const float4*>(differences)[lane]);
  const Suffixes weight(reinterpret_cast<const float4*>(squares)[lane]);
  const float4 dm = reinterpret_cast<const float4*>(through)[lane];
  const float dm_of[kPieces] = {dm.x, dm.y, dm.z, dm.w};
  const float sum_from = suffix_sum(sum.of[0], lane);
  const float weight_from = suffix_sum(weight.of[0], lane);
  float later_sum = __shfl_down_sync(kFullWarp, sum_from, 1);
  float later_weight = __shfl_down_sync(kFullWarp, weight_from, 1);
  if (lane == 31) later_sum = later_weight = 0.0f;
  PathOf<float> from = {true, 0.0f}, later = from;
  if (with_path) {
#pragma unroll
    for (int j = kPieces - 1; j >= 0; --j) {
      const bool keeps = (follows >> j & 1) != 0;
      from = then(from, {keeps, keeps ? dm_of[j] : 0.0f});
    }
    from = suffix_scan(from, lane);
    later = next_lane(from, lane);
  }
  if (lane == 0) totals[warp] = {sum_from, weight_from, from.added, from.keeps ? 1.0f : 0.0f};
  __syncthreads();

  const float before = boundary_e[0], after = boundary_e[1];
  float all = 0.0f, weights = 0.0f, warps_sum = 0.0f, warps_weight = 0.0f;
  PathOf<float> warps = {true, 0.0f};
#pragma unroll
  for (int x = kGroupWarps - 1; x >= 0; --x) {
    const float4 total = totals[x];
    all += total.x;
    weights += total.y;
    if (x == warp + 1) {
      warps_sum = all;
      warps_weight = weights;
    }
    if (x > warp) warps = then(warps, {total.w != 0.0f, total.z});
  }
  // What rounding makes of the difference is spread as in gategrad.cu. A state that is not finite says
  // nothing about a group that starts with a reset.
  const float rest = before - (after + all);
  const bool correct = weights > 0.0f && isfinite(rest) && isfinite(weights);
  const float correction = correct ? rest / weights : 0.0f;
  later_sum += after + warps_sum;
  later_weight += warps_weight;
  const PathOf<float> beyond = then(warps, later);
  double x = apply(Path{beyond.keeps, beyond.added}, after_group);
  float to_f[kPieces], to_i[kPieces];
#pragma unroll
  for (int j = kPieces - 1; j >= 0; --j) {
    to_f[j] = later_sum + sum.of[j];
    if (correct) to_f[j] += correction * (later_weight + weight.of[j]);
    // A token that forgets all has no gradient there; the sum is 0 up to rounding only.
    if ((resets >> j & 1) != 0) to_f[j] = 0.0f;
    to_i[j] = 0.0f;
    x += dm_of[j];
    if ((follows >> j & 1) != 0) {
      to_f[j] += static_cast<float>(x);
    } else {
      to_i[j] = static_cast<float>(x);
      x = 0.0;
    }
  }
  reinterpret_cast<float4*>(differences)[lane] = {to_f[0], to_f[1], to_f[2], to_f[3]};
  reinterpret_cast<float4*>(through)[lane] = {to_i[0], to_i[1], to_i[2], to_i[3]};
  if (threadIdx.x == 0 && group == 0 && exponential && args.dm_initial.data != nullptr) {
    at<float>(args.dm_initial, row.row, h, 0)[0] = static_cast<float>(before + x);
  }
  __syncwarp();

  const GateTokens i = gate_tokens(args, args.i, b, h, start + lane);
  const GateTokens di = gate_tokens(args, args.di, b, h, start + lane);
  const GateTokens df = gate_tokens(args, args.df, b, h, start + lane);
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    if (j * 32 + lane >= left) continue;
    float d_i = k[j] + through[j * 32 + lane];
    if (!exponential) d_i *= fast_sigmoid(-gate_value(args, load_bits(args, i, j * 32)));
    store_gate(args, di, j * 32, d_i);
    store_gate(args, df, j * 32,
               differences[j * 32 + lane] * fast_sigmoid(-gate_value(args, f[j])));
  }
}

}  // namespace
}  // namespace mlstm

extern "C" __global__ void __launch_bounds__(32 * mlstm::kGroupWarps)
    gategrad_path(const __grid_constant__ mlstm::Args args) {
  mlstm::path(args);
}
MLSTM_GEOMETRY(gategrad_path, 1, 1, 32 * mlstm::kGroupWarps, 0)

extern "C" __global__ void __launch_bounds__(32 * mlstm::kGroupWarps, 4)
    gategrad_emit_fast(const __grid_constant__ mlstm::Args args) {
  mlstm::emit(args);
}
MLSTM_GEOMETRY(gategrad_emit_fast, 1, 1, 32 * mlstm::kGroupWarps, 0)
