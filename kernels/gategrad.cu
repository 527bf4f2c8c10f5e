// Gradients of the gates, from what the other backward kernels leave per token and per chunk:
//   dlogf_t = E_c + sum over the chunk's tokens u >= t of (q_u.dq_u - k_u.dk_u)
// At a chunk's first token that is also E_{c-1}. What rounding makes of the difference is spread over
// the sum in proportion to what its terms may have contributed, so that errors of 16-bit products do
// not pile up over a chunk.
//   di_t    = k_t.dk_t
//   df      = dlogf sigmoid<Acc>(-f);  sigmoid gate: di *= sigmoid<Acc>(-i)
// h depends on m only through eps, and the caller may have a gradient for m_last; both reach the
// gates along the path of the maximum: walking backward, `through_m` collects dm and goes to dlogf
// where m follows the forget gate (and on to the token before), to di where it follows the input.
// gategrad_sm90.cu does the same for the Hopper backward.
// Kernels: gategrad_reduce (warp per chunk, head), gategrad_scan (warp per row, head),
// gategrad_emit (warp per chunk, head); 128 threads. Without m (sigmoid) only gategrad_emit and,
// for nothing but dm_initial, no other is needed.
#include "gatemath.cuh"

namespace mlstm {
namespace {

template <typename Acc>
__device__ __forceinline__ double sum_partials(const void* data, int64_t first, int64_t stride,
                                               int count) {
  double sum = 0.0;
  for (int part = 0; part < count; ++part) {
    sum += static_cast<const Acc*>(data)[first + part * stride];
  }
  return sum;
}

// The same for `count` neighbours, by a whole warp.
template <typename Acc>
__device__ __forceinline__ double warp_sum(const void* data, int64_t first, int count, int lane) {
  double sum = 0.0;
  for (int part = lane; part < count; part += 32) {
    sum += static_cast<const Acc*>(data)[first + part];
  }
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_xor_sync(kFullWarp, sum, delta);
  return sum;
}

template <typename Acc>
__device__ __forceinline__ double chunk_e(const Args& args, int64_t c, int h, int lane) {
  return warp_sum<Acc>(args.e, chunk_index(args, c, h) * args.e_tiles, args.e_tiles, lane);
}

// <dC, C> + <dn, n> before the first token of a row.
template <typename Acc>
__device__ __forceinline__ double first_e(const Args& args, int row, int h, int lane) {
  int64_t head = static_cast<int64_t>(row) * args.nh + h;
  return warp_sum<Acc>(args.e_first, head * args.e_tiles, args.e_tiles, lane);
}

// The gates of a lane's tokens and their part of the path.
template <typename Acc>
__device__ __forceinline__ Path lane_path(const Args& args, const LaneTokens& tokens, int h,
                                          double m, TokenGates (&gates)[kPerLane],
                                          double (&dm)[kPerLane]) {
  bool exponential = (args.flags & kExponential) != 0;
  int64_t base = token_index(args, tokens.b, h, tokens.first);
  Path path = {true, 0.0};
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    if (j >= tokens.count) continue;
    gates[j] = token_gates<Acc>(tokens.i[j], tokens.logf[j], m, exponential);
    m = gates[j].m;
    dm[j] = exponential ? static_cast<const Acc*>(args.dm)[base + j] : 0.0;
    // A token adds its dm first and then passes all on, or nothing.
    path = then({gates[j].forgets, gates[j].forgets ? dm[j] : 0.0}, path);
  }
  return path;
}

template <typename Acc>
__device__ __forceinline__ void reduce(const Args& args) {
  int64_t item;
  int lane;
  if (!warp_item(args.num_chunks * args.nh, &item, &lane)) return;
  int64_t c = item / args.nh;
  int h = static_cast<int>(item % args.nh);
  LaneTokens tokens = lane_tokens<Acc>(args, c, h, lane);
  double* scratch = chunk_gates(args, c, h);
  double m = lane_m(tokens, scratch[2], lane);
  TokenGates gates[kPerLane];
  double dm[kPerLane];
  Path path = suffix_scan(lane_path<Acc>(args, tokens, h, m, gates, dm), lane);
  if (lane == 0) {
    scratch[0] = path.keeps ? 1.0 : 0.0;
    scratch[1] = path.added;
  }
}

template <typename Acc>
__device__ __forceinline__ void scan(const Args& args) {
  int64_t item;
  int lane;
  if (!warp_item(static_cast<int64_t>(args.rows) * args.nh, &item, &lane)) return;
  int row = static_cast<int>(item / args.nh);
  int h = static_cast<int>(item % args.nh);
  int64_t begin = first_chunk(args, row);
  int64_t end = first_chunk(args, row + 1);
  double e_first = 0.0;
  if (args.dm_initial.data != nullptr || begin == end) {
    e_first = first_e<Acc>(args, row, h, lane);
  }
  // A literal gradient of m_last, beyond what keeps C e^m as it is.
  double x = 0.0;
  if (args.dm_last.data != nullptr) {
    int64_t index = row * args.dm_last.stride_b + h * args.dm_last.stride_h;
    x = static_cast<const Acc*>(args.dm_last.data)[index];
    x -= begin == end ? e_first : chunk_e<Acc>(args, end - 1, h, lane);
  }
  // Lane 31 takes the last chunk of each group of 32.
  for (int64_t c = end - 32; c + 32 > begin; c -= 32) {
    Path mine = {true, 0.0};
    double* scratch = c + lane >= begin ? chunk_gates(args, c + lane, h) : nullptr;
    if (scratch != nullptr) mine = {scratch[0] != 0.0, scratch[1]};
    Path from = suffix_scan(mine, lane);
    Path later = next_lane(from, lane);
    if (scratch != nullptr) scratch[3] = apply(later, x);
    x = __shfl_sync(kFullWarp, apply(from, x), 0);
  }
  if (lane == 0 && args.dm_initial.data != nullptr) {
    int64_t index = row * args.dm_initial.stride_b + h * args.dm_initial.stride_h;
    static_cast<Acc*>(args.dm_initial.data)[index] = static_cast<Acc>(e_first + x);
  }
}

template <typename Acc>
__device__ __forceinline__ void emit(const Args& args) {
  int64_t item;
  int lane;
  if (!warp_item(args.num_chunks * args.nh, &item, &lane)) return;
  int64_t c = item / args.nh;
  int h = static_cast<int>(item % args.nh);
  LaneTokens tokens = lane_tokens<Acc>(args, c, h, lane);
  if (tokens.chunk.len == 0) return;
  bool exponential = (args.flags & kExponential) != 0;
  double m = exponential ? lane_m(tokens, chunk_gates(args, c, h)[2], lane) : 0.0;

  // Below it a decay is 0 in Acc.
  constexpr double kForgets = sizeof(Acc) == 8 ? -1075.0 : -150.0;
  TokenGates gates[kPerLane];
  double dm[kPerLane];
  Path path = lane_path<Acc>(args, tokens, h, m, gates, dm);
  Path later = next_lane(suffix_scan(path, lane), lane);
  double through_m = exponential ? apply(later, chunk_gates(args, c, h)[3]) : 0.0;

  int64_t base = token_index(args, tokens.b, h, tokens.first);
  int64_t stride = static_cast<int64_t>(args.b) * args.nh * args.s;
  double q_dq[kPerLane];
  double k_dk[kPerLane];
  double mine = 0.0;
  double my_weight = 0.0;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    if (j >= tokens.count) continue;
    q_dq[j] = sum_partials<Acc>(args.q_dq, base + j, stride, args.qk_tiles);
    k_dk[j] = sum_partials<Acc>(args.k_dk, base + j, stride, args.qk_tiles);
    mine += q_dq[j] - k_dk[j];
    my_weight += q_dq[j] * q_dq[j] + k_dk[j] * k_dk[j];
  }
  double e = chunk_e<Acc>(args, c, h, lane);
  double upto = suffix_sum(mine, lane);
  double weight_upto = suffix_sum(my_weight, lane);
  double dlogf = upto - mine + e;
  double weight = weight_upto - my_weight + e * e;
  double all = __shfl_sync(kFullWarp, upto, 0) + e;
  double all_weight = __shfl_sync(kFullWarp, weight_upto, 0) + e * e;
  double before = c > first_chunk(args, tokens.chunk.row)
                      ? chunk_e<Acc>(args, c - 1, h, lane)
                      : first_e<Acc>(args, tokens.chunk.row, h, lane);
  // A state that is not finite says nothing about a chunk that starts with a reset.
  double rest = before - all;
  double correction = all_weight > 0.0 && isfinite(rest) ? rest / all_weight : 0.0;

#pragma unroll
  for (int j = kPerLane - 1; j >= 0; --j) {
    if (j >= tokens.count) continue;
    dlogf += q_dq[j] - k_dk[j];
    weight += q_dq[j] * q_dq[j] + k_dk[j] * k_dk[j];
    through_m += dm[j];
    // A token that forgets all has no gradient there; the sum above is 0 up to rounding only.
    double d_f = gates[j].step * kLog2E < kForgets ? 0.0 : dlogf + correction * weight;
    double d_i = k_dk[j];
    if (exponential && gates[j].forgets) {
      d_f += through_m;
    } else if (exponential) {
      d_i += through_m;
      through_m = 0.0;
    } else {
      d_i *= sigmoid<Acc>(-tokens.i[j]);
    }
    d_f *= sigmoid<Acc>(-tokens.f[j]);
    int64_t t = tokens.first + j;
    store_double(args.di.data, tokens.b * args.di.stride_b + h * args.di.stride_h +
                 t * args.di.stride_s, args.gate_dtype, d_i);
    store_double(args.df.data, tokens.b * args.df.stride_b + h * args.df.stride_h +
                 t * args.df.stride_s, args.gate_dtype, d_f);
  }
}

}  // namespace
}  // namespace mlstm

using mlstm::Args;

#define MLSTM_GATE_GRADIENT(ACC, SUFFIX)                               \
  extern "C" __global__ void __launch_bounds__(128)                    \
      gategrad_reduce_##SUFFIX(const __grid_constant__ Args args) {    \
    mlstm::reduce<ACC>(args);                                          \
  }                                                                    \
  MLSTM_GEOMETRY(gategrad_reduce_##SUFFIX, mlstm::kWarps, 1, 128, 0)   \
  extern "C" __global__ void __launch_bounds__(128)                    \
      gategrad_scan_##SUFFIX(const __grid_constant__ Args args) {      \
    mlstm::scan<ACC>(args);                                            \
  }                                                                    \
  MLSTM_GEOMETRY(gategrad_scan_##SUFFIX, mlstm::kWarps, 1, 128, 0)     \
  extern "C" __global__ void __launch_bounds__(128, 4)                 \
      gategrad_emit_##SUFFIX(const __grid_constant__ Args args) {      \
    mlstm::emit<ACC>(args);                                            \
  }                                                                    \
  MLSTM_GEOMETRY(gategrad_emit_##SUFFIX, mlstm::kWarps, 1, 128, 0)
MLSTM_GATE_GRADIENT(float, f32)
MLSTM_GATE_GRADIENT(double, f64)
