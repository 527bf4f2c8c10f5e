// The arithmetic of the gates. Stabilisers and exponents are sums over the whole sequence, in double
// for every dtype: float32 sums would not keep 1e-5, nor m its last digits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.cuh"

namespace mlstm {

constexpr double kLog2E = 1.4426950408889634;
constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ double minus_infinity() {
  return __longlong_as_double(0xfff0000000000000ull);
}

// One element of a tensor whose dtype is known at run time only.
__device__ __forceinline__ double load_as_double(const void* data, int64_t index, int32_t dtype) {
  switch (dtype) {
    case kF32: return static_cast<const float*>(data)[index];
    case kF64: return static_cast<const double*>(data)[index];
    case kBf16: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
    default: return __half2float(static_cast<const __half*>(data)[index]);
  }
}

__device__ __forceinline__ void store_double(void* data, int64_t index, int32_t dtype, double x) {
  switch (dtype) {
    case kF32: static_cast<float*>(data)[index] = static_cast<float>(x); break;
    case kF64: static_cast<double*>(data)[index] = x; break;
    case kBf16: static_cast<__nv_bfloat16*>(data)[index] = __double2bfloat16(x); break;
    default: static_cast<__half*>(data)[index] = __double2half(x); break;
  }
}

__device__ __forceinline__ double load_gate(const Args& args, const Tensor& gate, int b, int h,
                                            int64_t t) {
  int64_t index = b * gate.stride_b + h * gate.stride_h + t * gate.stride_s;
  return load_as_double(gate.data, index, args.gate_dtype);
}

// log(sigmoid(x)) without overflow; to the digits of float where the arithmetic is in float.
template <typename Acc>
__device__ __forceinline__ double logsigmoid(double x) {
  return fmin(x, 0.0) - log1p(exp(-fabs(x)));
}
// The same in fewer instructions: log1p(y) / y for y from 0 to 1 as a polynomial with the least greatest
// relative error (1.6e-7 with float's rounding).
__device__ __forceinline__ float fast_logsigmoid(float x) {
  const float y = expf(-fabsf(x));
  float p = -0.00324401166f;
  p = fmaf(p, y, 0.0198514052f);
  p = fmaf(p, y, -0.0569594353f);
  p = fmaf(p, y, 0.106036462f);
  p = fmaf(p, y, -0.153055876f);
  p = fmaf(p, y, 0.196759388f);
  p = fmaf(p, y, -0.249541342f);
  p = fmaf(p, y, 0.333299637f);
  p = fmaf(p, y, -0.499999017f);
  p = fmaf(p, y, 1.0f);
  return fmaf(-p, y, fminf(x, 0.0f));
}
template <>
__device__ __forceinline__ double logsigmoid<float>(double x) {
  return fast_logsigmoid(static_cast<float>(x));
}

template <typename Acc>
__device__ __forceinline__ double sigmoid(double x) {
  return 1.0 / (1.0 + exp(-x));
}
template <>
__device__ __forceinline__ double sigmoid<float>(double x) {
  return 1.0f / (1.0f + expf(-static_cast<float>(x)));
}

// 2^x; float keeps the digits of x that it cannot hold itself.
template <typename Acc>
__device__ __forceinline__ Acc power_of_2(double x) {
  return exp2(x);
}
template <>
__device__ __forceinline__ float power_of_2<float>(double x) {
  float hi = static_cast<float>(x);
  float lo = static_cast<float>(x - static_cast<double>(hi));
  float power = exp2f(hi);
  // hi may be infinite, and lo then is not a number.
  return power == 0.0f || isinf(power) ? power : power * fmaf(lo, 0.69314718f, 1.0f);
}

// Effect of consecutive tokens on m: m -> max(m + decay, floor).
template <typename A>
struct MaxPlusOf {
  A decay;
  A floor;
};
using MaxPlus = MaxPlusOf<double>;

template <typename A>
__device__ __forceinline__ MaxPlusOf<A> then(MaxPlusOf<A> first, MaxPlusOf<A> second) {
  return {first.decay + second.decay, max(first.floor + second.decay, second.floor)};
}

template <typename A>
__device__ __forceinline__ A apply(MaxPlusOf<A> tokens, A m) {
  return max(m + tokens.decay, tokens.floor);
}

__device__ __forceinline__ MaxPlus no_tokens() { return {0.0, minus_infinity()}; }

template <typename A>
__device__ __forceinline__ MaxPlusOf<A> shuffle_up(MaxPlusOf<A> x, int delta) {
  return {__shfl_up_sync(kFullWarp, x.decay, delta), __shfl_up_sync(kFullWarp, x.floor, delta)};
}

// Combination of all lanes up to and including this one.
template <typename A>
__device__ __forceinline__ MaxPlusOf<A> inclusive_scan(MaxPlusOf<A> x, int lane) {
  for (int delta = 1; delta < 32; delta *= 2) {
    MaxPlusOf<A> before = shuffle_up(x, delta);
    if (lane >= delta) x = then(before, x);
  }
  return x;
}

template <typename A>
__device__ __forceinline__ A inclusive_sum(A x, int lane) {
  for (int delta = 1; delta < 32; delta *= 2) {
    A before = __shfl_up_sync(kFullWarp, x, delta);
    if (lane >= delta) x += before;
  }
  return x;
}

// Effect of consecutive tokens, walked backward, on `through_m` (gategrad.cu): x -> keeps ? x + added :
// added.
template <typename A>
struct PathOf {
  bool keeps;
  A added;
};
using Path = PathOf<double>;

// The later tokens come first on the way back.
template <typename A>
__device__ __forceinline__ PathOf<A> then(PathOf<A> later, PathOf<A> earlier) {
  return {later.keeps && earlier.keeps,
          earlier.keeps ? later.added + earlier.added : earlier.added};
}

template <typename A>
__device__ __forceinline__ A apply(PathOf<A> path, A x) {
  return path.keeps ? x + path.added : path.added;
}

template <typename A>
__device__ __forceinline__ PathOf<A> shuffle_down(PathOf<A> x, int delta) {
  return {__shfl_down_sync(kFullWarp, static_cast<int>(x.keeps), delta) != 0,
          __shfl_down_sync(kFullWarp, x.added, delta)};
}

// Of the next lane; the last one has nothing after it.
template <typename A>
__device__ __forceinline__ PathOf<A> next_lane(PathOf<A> x, int lane) {
  x = shuffle_down(x, 1);
  return lane == 31 ? PathOf<A>{true, A(0)} : x;
}

// Combination of this lane's tokens and all later ones.
template <typename A>
__device__ __forceinline__ PathOf<A> suffix_scan(PathOf<A> x, int lane) {
  for (int delta = 1; delta < 32; delta *= 2) {
    PathOf<A> later = shuffle_down(x, delta);
    if (lane + delta < 32) x = then(later, x);
  }
  return x;
}

template <typename A>
__device__ __forceinline__ A suffix_sum(A x, int lane) {
  for (int delta = 1; delta < 32; delta *= 2) {
    A later = __shfl_down_sync(kFullWarp, x, delta);
    if (lane + delta < 32) x += later;
  }
  return x;
}

// What the state decays by at a token and what k v^T gains, as natural exponents.
struct TokenGates {
  double step;
  double source;
  double m;
  bool forgets;  // m follows the forget gate (else the input gate): the arg-max path
};

// (chunk, head) or (row, head) of a warp, in blocks of kWarps warps.
constexpr int kWarps = 4;

__device__ __forceinline__ bool warp_item(int64_t count, int64_t* item, int* lane) {
  *lane = threadIdx.x % 32;
  *item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  return *item < count;
}

template <typename Acc>
__device__ constexpr int32_t acc_dtype() {
  return sizeof(Acc) == 8 ? kF64 : kF32;
}

// Exponents that mean "never" stay finite, so that sums of them do; NaN passes through.
__device__ __forceinline__ double clamp_never(double x) {
  return x < kNever / kLog2E ? kNever / kLog2E : x;
}

template <typename Acc>
__device__ __forceinline__ TokenGates token_gates(double i, double logf, double m_before,
                                                  bool exponential) {
  TokenGates gates;
  if (!exponential) {
    gates.step = clamp_never(logf);
    gates.source = clamp_never(logsigmoid<Acc>(i));
    gates.m = 0.0;
    gates.forgets = true;
    return gates;
  }
  double kept = logf + m_before;
  gates.m = fmax(kept, i);
  gates.forgets = kept >= i;
  if (gates.m == minus_infinity()) {
    // Nothing has been seen since a reset: the state is zero in any frame.
    gates.step = gates.source = kNever / kLog2E;
    return gates;
  }
  gates.step = clamp_never(kept - gates.m);
  gates.source = clamp_never(i - gates.m);
  return gates;
}

// Warps take (chunk, head) pairs; a lane takes up to kPerLane consecutive tokens.
constexpr int kPerLane = kMaxChunk / 32;

struct LaneTokens {
  Chunk chunk;
  int b;
  int64_t first;  // within the batch row
  int count;
  double i[kPerLane];
  double f[kPerLane];
  double logf[kPerLane];
};

template <typename Acc>
__device__ __forceinline__ LaneTokens lane_tokens(const Args& args, int64_t c, int h, int lane) {
  LaneTokens tokens;
  tokens.chunk = chunk_at(args, c);
  tokens.b = batch_of(args, tokens.chunk.row);
  int per_lane = args.chunk_len / 32;
  int first = lane * per_lane;
  tokens.first = tokens.chunk.start + first;
  tokens.count = max(0, min(per_lane, tokens.chunk.len - first));
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    if (j < tokens.count) {
      tokens.i[j] = load_gate(args, args.i, tokens.b, h, tokens.first + j);
      tokens.f[j] = load_gate(args, args.f, tokens.b, h, tokens.first + j);
      tokens.logf[j] = logsigmoid<Acc>(tokens.f[j]);
    }
  }
  return tokens;
}

// What a lane's tokens do to m.
__device__ __forceinline__ MaxPlus effect(const LaneTokens& tokens) {
  MaxPlus all = no_tokens();
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    if (j < tokens.count) all = then(all, {tokens.logf[j], tokens.i[j]});
  }
  return all;
}

// m before a lane's first token, given m before the chunk.
__device__ __forceinline__ double lane_m(const LaneTokens& tokens, double chunk_m, int lane) {
  MaxPlus before = shuffle_up(inclusive_scan(effect(tokens), lane), 1);
  return lane == 0 ? chunk_m : apply(before, chunk_m);
}

__device__ __forceinline__ double* chunk_gates(const Args& args, int64_t c, int h) {
  return args.chunk_gates + 4 * (h * args.num_chunks + c);
}

// m before the first token of a row.
__device__ __forceinline__ double initial_m(const Args& args, int row, int h, int32_t acc_dtype) {
  if (args.m_initial.data == nullptr) return 0.0;
  int64_t index = row * args.m_initial.stride_b + h * args.m_initial.stride_h;
  return load_as_double(args.m_initial.data, index, acc_dtype);
}

// m along 32 kChunks chunks by one warp, of which each lane has some consecutive ones: each calls
// keep(j, m) with m before its j-th. Returns m after the last.
template <int kChunks, typename F>
__device__ __forceinline__ double scan_chunks(const MaxPlus (&chunks)[kChunks], double m, int lane,
                                              F keep) {
  MaxPlus mine = chunks[0];
#pragma unroll
  for (int j = 1; j < kChunks; ++j) mine = then(mine, chunks[j]);
  MaxPlus upto = inclusive_scan(mine, lane);
  MaxPlus before = shuffle_up(upto, 1);
  double chunk_m = lane == 0 ? m : apply(before, m);
#pragma unroll
  for (int j = 0; j < kChunks; ++j) {
    keep(j, chunk_m);
    chunk_m = apply(chunks[j], chunk_m);
  }
  return __shfl_sync(kFullWarp, apply(upto, m), 31);
}

template <typename Acc>
__device__ __forceinline__ void store_last_m(const Args& args, int row, int h, double m) {
  if (args.m_last.data == nullptr) return;
  at<Acc>(args.m_last, row, h, 0)[0] = static_cast<Acc>(m);
}

}  // namespace mlstm
