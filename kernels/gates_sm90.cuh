// The arithmetic of the gates for the Hopper kernels: chunks of 64 tokens of 16-bit data, two
// tokens per lane. What these add up within a chunk is in float, whose errors are far below the
// data's; over chunks it stays in double.
#pragma once

#include "gatemath.cuh"
#include "tile.cuh"

namespace mlstm {

__device__ __forceinline__ float clamp_near(float x) {
  constexpr float kNearest = static_cast<float>(kNear / kLog2E);
  return x < kNearest ? kNearest : x;
}

struct LanePair {
  Chunk chunk;
  int b;
  int count;
  float i[2];
  float logf[2];
};

__device__ __forceinline__ float fast_gate(const Args& args, const Tensor& gate, int b, int h,
                                           int64_t t) {
  return load_any<float>(gate.data, b * gate.stride_b + h * gate.stride_h + t * gate.stride_s,
                         args.gate_dtype);
}

// With f, as yet, for its logarithm: so that more loads can be in flight.
__device__ __forceinline__ LanePair load_pair(const Args& args, const Chunk& chunk, int h,
                                              int lane) {
  LanePair pair;
  pair.chunk = chunk;
  pair.b = batch_of(args, chunk.row);
  pair.count = max(0, min(2, chunk.len - 2 * lane));
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (j >= pair.count) continue;
    int64_t t = pair.chunk.start + 2 * lane + j;
    pair.i[j] = fast_gate(args, args.i, pair.b, h, t);
    pair.logf[j] = fast_gate(args, args.f, pair.b, h, t);
  }
  return pair;
}

__device__ __forceinline__ void take_logarithms(LanePair& pair) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (j < pair.count) pair.logf[j] = fast_logsigmoid(pair.logf[j]);
  }
}

__device__ __forceinline__ LanePair lane_pair(const Args& args, int64_t c, int h, int lane) {
  LanePair pair = load_pair(args, chunk_at(args, c), h, lane);
  take_logarithms(pair);
  return pair;
}

// Combination of all lanes up to and including this one.
__device__ __forceinline__ MaxPlusOf<float> lane_effects(const LanePair& pair, int lane) {
  MaxPlusOf<float> all = {0.0f, -INFINITY};
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (j < pair.count) all = then(all, {pair.logf[j], pair.i[j]});
  }
  return inclusive_scan(all, lane);
}

// A lane's tokens as params.cuh describes them, with steps, sources and phi clamped (kNear) and
// zero beyond the chunk's end; total is the chunk's last phi.
struct FastVectors {
  float step[2], source[2], m[2], phi[2];
  float total;
};

// `m` is that before the lane's first token.
__device__ __forceinline__ FastVectors fast_vectors(const LanePair& pair, float m, bool exponential,
                                                    int lane) {
  constexpr float kToLog2 = static_cast<float>(kLog2E);
  FastVectors out = {};
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (j >= pair.count) continue;
    if (exponential) {
      float kept = pair.logf[j] + m;
      out.m[j] = m = fmaxf(kept, pair.i[j]);
      // At -inf nothing has been seen since a reset: the state is zero in any frame.
      bool nothing = m == -INFINITY;
      out.step[j] = kToLog2 * clamp_near(nothing ? m : kept - m);
      out.source[j] = kToLog2 * clamp_near(nothing ? m : pair.i[j] - m);
    } else {
      out.step[j] = kToLog2 * clamp_near(pair.logf[j]);
      out.source[j] = kToLog2 * clamp_near(fast_logsigmoid(pair.i[j]));
    }
  }
  float sum = inclusive_sum(out.step[0] + out.step[1], lane);
  out.total = __shfl_sync(kFullWarp, sum, 31);
  float before = __shfl_up_sync(kFullWarp, sum, 1);
  out.phi[0] = (lane == 0 ? 0.0f : before) + out.step[0];
  out.phi[1] = out.phi[0] + out.step[1];
  return out;
}

// The same by what gates_scan leaves of m before the chunk; all lanes of a warp together.
__device__ __forceinline__ FastVectors fast_vectors(const Args& args, const LanePair& pair,
                                                    int64_t c, int h, int lane) {
  bool exponential = (args.flags & kExponential) != 0;
  float m = 0.0f;
  if (exponential) {
    MaxPlusOf<float> before = shuffle_up(lane_effects(pair, lane), 1);
    m = static_cast<float>(chunk_gates(args, c, h)[2]);
    if (lane > 0) m = apply(before, m);
  }
  return fast_vectors(pair, m, exponential, lane);
}

// a of a lane's token j.
__device__ __forceinline__ float fast_input(const FastVectors& x, int j) {
  // Rounding may leave the difference of equal sums a little above 0.
  return exp2f(fminf(x.total - x.phi[j], 0.0f) + x.source[j]);
}

}  // namespace mlstm
