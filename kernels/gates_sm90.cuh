// The arithmetic of the gates for the Hopper kernels: chunks of 64 tokens of 16-bit data, two
// tokens per lane. What these add up within a chunk is in float, whose errors are far below the
// data's; over chunks it stays in double.
#pragma once

#include "gatemath.cuh"
#include "ptx_sm90.cuh"
#include "tile.cuh"

namespace mlstm {

__device__ __forceinline__ float clamp_near(float x) {
  constexpr float kNearest = static_cast<float>(kNear / kLog2E);
  return x < kNearest ? kNearest : x;
}

// Like warp_item, of all chunks and heads, which fit into 32 bits: their q alone takes 8 KiB each.
struct ChunkItem {
  uint32_t c, h;
};
__device__ __forceinline__ bool chunk_item(const Args& args, ChunkItem* item, int* lane) {
  *lane = threadIdx.x % 32;
  const uint32_t index = blockIdx.x * kWarps + threadIdx.x / 32, nh = args.nh;
  item->c = index / nh;
  item->h = index % nh;
  return item->c < static_cast<uint64_t>(args.num_chunks);
}

// The same as chunk_at for chunks of 64 tokens.
__device__ __forceinline__ Chunk fast_chunk_at(const Args& args, uint32_t c) {
  if (args.chunks != nullptr) return args.chunks[c];
  const uint32_t row = c / static_cast<uint32_t>(args.chunks_per_row);
  const int start = static_cast<int>(c - row * args.chunks_per_row) * 64;
  return {start, static_cast<int32_t>(row), min(static_cast<int>(args.s) - start, 64)};
}

// A row's tokens within its batch row.
struct Span {
  int64_t start, end;
};
__device__ __forceinline__ Span row_tokens(const Args& args, int row) {
  if (args.chunks == nullptr) return {0, args.s};
  return {args.seq_starts[row], args.seq_starts[row + 1]};
}

// Those beyond the chunk's end do nothing to m: i is -inf, logf 0. (Without branches, several chunks'
// instructions can be mixed.)
struct LanePair {
  Chunk chunk;
  int count;
  float i[2];
  float logf[2];
};

// A gate, of float or 16 bits, from a token on.
struct GateTokens {
  char* first;
  int64_t step;  // bytes
};

__device__ __forceinline__ GateTokens gate_tokens(const Args& args, const Tensor& gate, int b, int h,
                                                  int64_t t) {
  const int shift = args.gate_dtype == kF32 ? 2 : 1;
  const int64_t index = b * gate.stride_b + h * gate.stride_h + t * gate.stride_s;
  return {static_cast<char*>(gate.data) + (index << shift), gate.stride_s << shift};
}

// To be read by `gate_value`: a choice of the type around each load would wait for one after another.
__device__ __forceinline__ uint32_t load_bits(const Args& args, const GateTokens& gate, int j) {
  const char* from = gate.first + j * gate.step;
  return args.gate_dtype == kF32 ? *reinterpret_cast<const uint32_t*>(from)
                                 : *reinterpret_cast<const uint16_t*>(from);
}
__device__ __forceinline__ float gate_value(const Args& args, uint32_t bits) {
  if (args.gate_dtype == kF16) return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
  return __uint_as_float(args.gate_dtype == kF32 ? bits : bits << 16);
}

// The gates of a head from a token on.
struct HeadGates {
  GateTokens i, f;
};
__device__ __forceinline__ HeadGates head_gates(const Args& args, int b, int h, int64_t t) {
  return {gate_tokens(args, args.i, b, h, t), gate_tokens(args, args.f, b, h, t)};
}

// With f, as yet, for its logarithm: so that more loads can be in flight. `gates` from the chunk's first
// token on.
__device__ __forceinline__ LanePair load_pair(const Args& args, const Chunk& chunk,
                                              const HeadGates& gates, int lane) {
  LanePair pair;
  pair.chunk = chunk;
  pair.count = max(0, min(2, chunk.len - 2 * lane));
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int t = min(2 * lane + j, chunk.len - 1);
    pair.i[j] = gate_value(args, load_bits(args, gates.i, t));
    pair.logf[j] = gate_value(args, load_bits(args, gates.f, t));
  }
  return pair;
}

__device__ __forceinline__ void take_logarithms(LanePair& pair) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float logf = fast_logsigmoid(pair.logf[j]);
    pair.logf[j] = j < pair.count ? logf : 0.0f;
    if (j >= pair.count) pair.i[j] = -INFINITY;
  }
}

__device__ __forceinline__ LanePair lane_pair(const Args& args, const Chunk& chunk, int h,
                                              int lane) {
  const int b = batch_of(args, chunk.row);
  LanePair pair = load_pair(args, chunk, head_gates(args, b, h, chunk.start), lane);
  take_logarithms(pair);
  return pair;
}

// Combination of all lanes up to and including this one.
__device__ __forceinline__ MaxPlusOf<float> lane_effects(const LanePair& pair, int lane) {
  const MaxPlusOf<float> first = {pair.logf[0], pair.i[0]}, second = {pair.logf[1], pair.i[1]};
  return inclusive_scan(then(first, second), lane);
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
    if (j >= pair.count) out.step[j] = out.source[j] = 0.0f;
  }
  float sum = inclusive_sum(out.step[0] + out.step[1], lane);
  out.total = __shfl_sync(kFullWarp, sum, 31);
  float before = __shfl_up_sync(kFullWarp, sum, 1);
  out.phi[0] = (lane == 0 ? 0.0f : before) + out.step[0];
  out.phi[1] = out.phi[0] + out.step[1];
  return out;
}

// What gates_scan leaves of m before the chunk.
__device__ __forceinline__ float chunk_m(const Args& args, int64_t c, int h) {
  return (args.flags & kExponential) != 0 ? static_cast<float>(chunk_gates(args, c, h)[2]) : 0.0f;
}

// m before a lane's first token, by the effects up to its last and m before the chunk.
__device__ __forceinline__ float lane_m(MaxPlusOf<float> upto, float chunk_m, int lane) {
  MaxPlusOf<float> before = shuffle_up(upto, 1);
  return lane > 0 ? apply(before, chunk_m) : chunk_m;
}

// The same by m before the chunk; all lanes of a warp together.
__device__ __forceinline__ FastVectors chunk_vectors(const Args& args, const LanePair& pair,
                                                     float chunk_m, int lane) {
  bool exponential = (args.flags & kExponential) != 0;
  float m = exponential ? lane_m(lane_effects(pair, lane), chunk_m, lane) : 0.0f;
  return fast_vectors(pair, m, exponential, lane);
}

// a of a lane's token j.
__device__ __forceinline__ float fast_input(const FastVectors& x, int j) {
  // Rounding may leave the difference of equal sums a little above 0.
  return exp2_approx(fminf(x.total - x.phi[j], 0.0f) + x.source[j]);
}

// The vectors of a chunk as Args::packed has them, before g.
template <typename T>
struct alignas(16) Packed {
  T split[2][64];
  float vector[5][64];
};

// Two neighbouring entries.
__device__ __forceinline__ void put_pair(float* to, float first, float second) {
  *reinterpret_cast<float2*>(to) = make_float2(first, second);
}
template <typename T>
__device__ __forceinline__ void put_pair(T* to, float first, float second) {
  *reinterpret_cast<uint32_t*>(to) = pack<T>(first, second);
}

// A lane's tokens.
template <typename T>
__device__ __forceinline__ void put_vectors(Packed<T>& packed, const LanePair& pair,
                                            const FastVectors& x, bool exponential, int lane) {
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
}

// As it stands among a chunk's vectors, at kSweepLengthAt.
__device__ __forceinline__ float sweep_length(const Args& args, const Chunk& chunk) {
  return __int_as_float(args.chunks != nullptr ? chunk.len : 64);
}

// Of a chunk's tokens in the Hopper backward, a bit each, after its packing in place of chunk_gates[2]
// and [3]: .x and .y whether the token forgets the state, .z and .w whether m follows the forget gate,
// as it does beyond the chunk's end.
__device__ __forceinline__ uint4* token_bits(const Args& args, int64_t c, int h) {
  return reinterpret_cast<uint4*>(chunk_gates(args, c, h) + 2);
}

}  // namespace mlstm
