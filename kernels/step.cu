// Generation: up to 16 tokens per row on a pool of states, in two kernels.
//   step_gates_ACC           per row and head: gates, n, N, denominator -> scalars; writes n and m
//                            grid B * NH, 128 threads
//   step_state_STATE_vV_tT   per row, head and slice of kColumns columns of C: the state and h
//                            grid B * NH * ceil(DHHV / kColumns), 256 threads
// Every element of C is read once and written once, whatever the number of tokens. The second kernel
// starts while the first one runs (programmatic launch on sm_90) and waits with its first rows of C
// already on their way. The slices of a head must not read n and m, which the first kernel updates
// in place: all they need is in the scalars.
// Rows are split over threads in a way that depends on the dims alone, so a row's result does not
// depend on the batch it is in.
#include "gatemath.cuh"
#include "overlap.cuh"
#include "step_params.cuh"

namespace mlstm {
namespace {

constexpr int kColumns = 64;
constexpr int kGateThreads = 128;
constexpr int kStateThreads = 256;

template <typename Acc>
struct Scalars {
  Acc decay;
  Acc gain;
  Acc scale;
};

__device__ __forceinline__ int64_t row_index(const RowIndex& index, int row, int64_t absent) {
  if (index.data == nullptr) return absent;
  int64_t at = row * index.stride;
  if (index.size == 1) return static_cast<const uint8_t*>(index.data)[at];
  if (index.size == 4) return static_cast<const int32_t*>(index.data)[at];
  return static_cast<const int64_t*>(index.data)[at];
}

struct Row {
  int64_t src;  // -1: a padding row
  int64_t dst;  // -1: the new state is not stored
  bool has_state;
  int tokens;
};

// Contents of the index tensors are the caller's; outside the pool they count as padding.
__device__ __forceinline__ int64_t checked_slot(const StepArgs& args, int64_t slot) {
  return slot >= 0 && slot < args.num_slots ? slot : -1;
}

__device__ __forceinline__ Row row_of(const StepArgs& args, int b) {
  Row row;
  int64_t src = row_index(args.src_slots, b, b);
  row.dst = checked_slot(args, row_index(args.dst_slots, b, src));
  row.src = checked_slot(args, src);
  row.has_state = row_index(args.has_state, b, 1) != 0;
  int64_t tokens = row_index(args.num_tokens, b, args.tokens);
  row.tokens = static_cast<int>(min(max(tokens, int64_t(0)), int64_t(args.tokens)));
  return row;
}

__device__ __forceinline__ float log_sigmoid(float x) { return fast_logsigmoid(x); }
__device__ __forceinline__ double log_sigmoid(double x) { return logsigmoid<double>(x); }

template <typename Acc>
__device__ __forceinline__ Acc load(const Tensor& t, int64_t offset, int32_t dtype) {
  switch (dtype) {
    case kF32: return static_cast<Acc>(static_cast<const float*>(t.data)[offset]);
    case kF64: return static_cast<Acc>(static_cast<const double*>(t.data)[offset]);
    case kBf16: return __bfloat162float(static_cast<const __nv_bfloat16*>(t.data)[offset]);
    default: return __half2float(static_cast<const __half*>(t.data)[offset]);
  }
}

template <typename Acc>
__device__ __forceinline__ void store(const Tensor& t, int64_t offset, int32_t dtype, Acc x) {
  switch (dtype) {
    case kF32: static_cast<float*>(t.data)[offset] = static_cast<float>(x); break;
    case kF64: static_cast<double*>(t.data)[offset] = x; break;
    case kBf16: static_cast<__nv_bfloat16*>(t.data)[offset] = __float2bfloat16(x); break;
    default: static_cast<__half*>(t.data)[offset] = __float2half(x); break;
  }
}

__device__ __forceinline__ int64_t offset(const Tensor& t, int64_t b, int64_t h, int64_t s) {
  return b * t.stride_b + h * t.stride_h + s * t.stride_s;
}

// decay * x, where a decay of 0 forgets whatever was there, NaN included.
template <typename Acc>
__device__ __forceinline__ Acc scaled(Acc decay, Acc x) {
  return decay == Acc(0) ? Acc(0) : decay * x;
}

// Decay, gain and m of one token; `m` goes from before to after it.
template <typename Acc>
__device__ __forceinline__ Scalars<Acc> advance(const StepArgs& args, Acc i, Acc f, Acc* m) {
  Acc logf = log_sigmoid(f);
  if ((args.flags & kExponential) == 0) return {exp(logf), exp(log_sigmoid(i)), Acc(1)};
  Acc kept = logf + *m;
  *m = fmax(kept, i);
  if (*m == -static_cast<Acc>(INFINITY)) return {Acc(0), Acc(0), Acc(1)};
  return {exp(kept - *m), exp(i - *m), Acc(1)};
}

template <typename Acc>
__device__ __forceinline__ void gates(const StepArgs& args) {
  constexpr int kWarpCount = kGateThreads / 32;
  constexpr int kPerThread = 8;
  __shared__ Acc gate_i[kMaxStepTokens];
  __shared__ Acc gate_f[kMaxStepTokens];
  __shared__ Scalars<Acc> tokens[kMaxStepTokens];
  __shared__ Acc floors[kMaxStepTokens];
  __shared__ Acc partial[kMaxStepTokens][kWarpCount];
  start_dependents();
  int b = static_cast<int>(blockIdx.x / args.nh);
  int h = static_cast<int>(blockIdx.x % args.nh);
  Row row = row_of(args, b);
  if (row.src < 0) return;
  int warp = threadIdx.x / 32;
  bool first_lane = threadIdx.x % 32 == 0;

  const Acc* n_src = at<const Acc>(args.n, row.src, h, 0);
  Acc* n_dst = row.dst >= 0 ? at<Acc>(args.n_dst, row.dst, h, 0) : nullptr;
  Acc n[kPerThread];
  auto fetch = [&](int tile) {
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      int d = tile + j * kGateThreads + threadIdx.x;
      n[j] = row.has_state && d < args.dhqk ? n_src[d] : Acc(0);
    }
  };
  fetch(0);

  if (threadIdx.x < row.tokens) {
    int t = threadIdx.x;
    gate_i[t] = load<Acc>(args.i, offset(args.i, b, h, t), args.gate_dtype);
    gate_f[t] = load<Acc>(args.f, offset(args.f, b, h, t), args.gate_dtype);
  }
  if (first_lane) {
    for (int t = 0; t < kMaxStepTokens; ++t) partial[t][warp] = Acc(0);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    Acc m = 0;
    if (row.has_state && args.m.data != nullptr) m = *at<const Acc>(args.m, row.src, h, 0);
#pragma unroll 1
    for (int t = 0; t < row.tokens; ++t) {
      tokens[t] = advance(args, gate_i[t], gate_f[t], &m);
      floors[t] = (args.flags & kExponential) != 0 ? exp(-m) : Acc(1);
    }
    if (row.dst >= 0 && args.m_dst.data != nullptr) *at<Acc>(args.m_dst, row.dst, h, 0) = m;
  }
  __syncthreads();

  for (int tile = 0; tile < args.dhqk; tile += kPerThread * kGateThreads) {
    if (tile > 0) fetch(tile);
#pragma unroll 1
    for (int t = 0; t < row.tokens; ++t) {
      Acc decay = tokens[t].decay;
      Acc gain = tokens[t].gain;
      int64_t q_at = offset(args.q, b, h, t) + tile;
      int64_t k_at = offset(args.k, b, h, t) + tile;
      Acc sum = 0;
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        int d = j * kGateThreads + threadIdx.x;
        if (tile + d >= args.dhqk) continue;
        n[j] = scaled(decay, n[j]) + gain * load<Acc>(args.k, k_at + d, args.dtype);
        sum += load<Acc>(args.q, q_at + d, args.dtype) * n[j];
      }
      for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_xor_sync(kFullWarp, sum, delta);
      if (first_lane) partial[t][warp] += sum;
    }
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      int d = tile + j * kGateThreads + threadIdx.x;
      if (n_dst != nullptr && d < args.dhqk) n_dst[d] = n[j];
    }
  }
  __syncthreads();
  int t = threadIdx.x;
  if (t >= row.tokens) return;
  Acc scale = static_cast<Acc>(args.qk_scale);
  Scalars<Acc> out = {tokens[t].decay, tokens[t].gain, scale};
  if ((args.flags & kNormalize) != 0) {
    Acc sum = 0;
    for (int part = 0; part < kWarpCount; ++part) sum += partial[t][part];
    out.scale = scale / (fmax(fabs(scale * sum), floors[t]) + static_cast<Acc>(args.eps));
  }
  static_cast<Scalars<Acc>*>(
      args.scalars)[static_cast<int64_t>(blockIdx.x) * args.tokens + t] = out;
}

template <typename Acc>
__device__ __forceinline__ Acc widen(float x) {
  return static_cast<Acc>(x);
}
template <typename Acc>
__device__ __forceinline__ Acc widen(double x) {
  return static_cast<Acc>(x);
}
template <typename Acc>
__device__ __forceinline__ Acc widen(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <typename Acc>
__device__ __forceinline__ Acc widen(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ void narrow(float* out, float x) { *out = x; }
__device__ __forceinline__ void narrow(double* out, double x) { *out = x; }
__device__ __forceinline__ void narrow(__nv_bfloat16* out, float x) { *out = __float2bfloat16(x); }
__device__ __forceinline__ void narrow(__half* out, float x) { *out = __float2half(x); }

// Read together, by all columns of a row at once.
template <typename Acc>
struct alignas(2 * sizeof(Acc)) QueryKey {
  Acc q;
  Acc k;
};

template <typename State, int kVec>
struct alignas(sizeof(State) * kVec) Vector {
  State x[kVec];
};

template <typename State, typename Acc, int kVec, int kTokens>
__device__ __forceinline__ void state(const StepArgs& args) {
  constexpr int kGroups = kColumns / kVec;
  constexpr int kRowLanes = kStateThreads / kGroups;
  // Rows in flight per thread; fewer where tokens take the registers.
  constexpr int kBatch = kTokens * kVec == 32 ? 2 : kVec == 8 ? 4 : 8;
  constexpr int kTile = sizeof(Acc) == 8 ? 128 : 256;
  constexpr int kStateWarps = kStateThreads / 32;
  // Row lanes of a warp are summed by shuffles first.
  constexpr int kParts = kGroups < 32 ? kStateWarps : kRowLanes;
  using Vec = Vector<State, kVec>;
  __shared__ QueryKey<Acc> qk[kTokens][kTile];
  __shared__ Acc parts[kParts][kColumns];
  __shared__ Acc values[kTokens][kColumns];
  __shared__ Scalars<Acc> token[kTokens];

  int slices = (args.dhhv + kColumns - 1) / kColumns;
  int64_t head = blockIdx.x / slices;
  int b = static_cast<int>(head / args.nh);
  int h = static_cast<int>(head % args.nh);
  int column = static_cast<int>(blockIdx.x % slices) * kColumns;
  int group = threadIdx.x % kGroups;
  int lane_row = threadIdx.x / kGroups;
  int mine = column + group * kVec;
  bool inside = mine < args.dhhv;
  Row row = row_of(args, b);
  if (row.src < 0) return;
  const State* source = at<const State>(args.c, row.src, h, 0) + mine;
  State* target = row.dst >= 0 ? at<State>(args.c_dst, row.dst, h, 0) + mine : nullptr;

  Vec rows[kBatch];
  auto fetch = [&](int first) {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      int d = first + j * kRowLanes;
      if (inside && d < args.dhqk && row.has_state) {
        rows[j] = *reinterpret_cast<const Vec*>(source + d * args.c.stride_s);
      }
    }
  };
  fetch(lane_row);

  // Tokens past the row's count leave the state as it is.
  Acc sums[kTokens][kVec] = {};
#pragma unroll 1
  for (int x = threadIdx.x; x < kTokens * kColumns; x += kStateThreads) {
    int t = x / kColumns;
    int e = x % kColumns;
    bool real = t < row.tokens && column + e < args.dhhv;
    values[t][e] =
        real ? load<Acc>(args.v, offset(args.v, b, h, t) + column + e, args.dtype) : Acc(0);
  }
  wait_for_previous();
  const Scalars<Acc>* scalars =
      static_cast<const Scalars<Acc>*>(args.scalars) + head * args.tokens;
  if (threadIdx.x < kTokens) {
    Scalars<Acc> none = {Acc(1), Acc(0), Acc(0)};
    token[threadIdx.x] = threadIdx.x < row.tokens ? scalars[threadIdx.x] : none;
  }
  __syncthreads();
  Acc v[kTokens][kVec];
  Acc decay[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    decay[t] = token[t].decay;
#pragma unroll
    for (int x = 0; x < kVec; ++x) v[t][x] = values[t][group * kVec + x] * token[t].gain;
  }

  for (int tile = 0; tile < args.dhqk; tile += kTile) {
    int tile_end = min(args.dhqk, tile + kTile);
    __syncthreads();
#pragma unroll 1
    for (int t = 0; t < kTokens; ++t) {
      bool real = t < row.tokens;
#pragma unroll 1
      for (int d = tile + threadIdx.x; d < tile_end; d += kStateThreads) {
        QueryKey<Acc> x = {Acc(0), Acc(0)};
        if (real) {
          x.q = load<Acc>(args.q, offset(args.q, b, h, t) + d, args.dtype);
          x.k = load<Acc>(args.k, offset(args.k, b, h, t) + d, args.dtype);
        }
        qk[t][d - tile] = x;
      }
    }
    __syncthreads();
    for (int first = tile + lane_row; first < tile_end; first += kBatch * kRowLanes) {
      if (first != lane_row) fetch(first);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        int d = first + j * kRowLanes;
        if (!inside || d >= tile_end) continue;
        Acc c[kVec];
#pragma unroll
        for (int x = 0; x < kVec; ++x) c[x] = row.has_state ? widen<Acc>(rows[j].x[x]) : Acc(0);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          QueryKey<Acc> token_qk = qk[t][d - tile];
#pragma unroll
          for (int x = 0; x < kVec; ++x) {
            c[x] = scaled(decay[t], c[x]) + token_qk.k * v[t][x];
            sums[t][x] += token_qk.q * c[x];
          }
        }
        if (target != nullptr) {
          Vec out;
#pragma unroll
          for (int x = 0; x < kVec; ++x) narrow(&out.x[x], c[x]);
          *reinterpret_cast<Vec*>(target + d * args.c_dst.stride_s) = out;
        }
      }
    }
  }

#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (t >= row.tokens) break;
#pragma unroll
    for (int x = 0; x < kVec; ++x) {
#pragma unroll
      for (int delta = kGroups; delta < 32; delta *= 2) {
        sums[t][x] += __shfl_xor_sync(kFullWarp, sums[t][x], delta);
      }
    }
    __syncthreads();
    int part = kGroups < 32 ? threadIdx.x / 32 : lane_row;
    if (kGroups >= 32 || threadIdx.x % 32 < kGroups) {
#pragma unroll
      for (int x = 0; x < kVec; ++x) parts[part][group * kVec + x] = sums[t][x];
    }
    __syncthreads();
    int out = threadIdx.x;
    if (out < kColumns && column + out < args.dhhv) {
      Acc sum = 0;
#pragma unroll
      for (int p = 0; p < kParts; ++p) sum += parts[p][out];
      store(args.h, offset(args.h, b, h, t) + column + out, args.dtype, token[t].scale * sum);
    }
  }
}

}  // namespace
}  // namespace mlstm

using mlstm::StepArgs;

extern "C" __global__ void __launch_bounds__(128) step_gates_f32(
    const __grid_constant__ StepArgs args) {
  mlstm::gates<float>(args);
}
MLSTM_GEOMETRY(step_gates_f32, 1, 1, 128, 0)
extern "C" __global__ void __launch_bounds__(128) step_gates_f64(
    const __grid_constant__ StepArgs args) {
  mlstm::gates<double>(args);
}
MLSTM_GEOMETRY(step_gates_f64, 1, 1, 128, 0)

#define MLSTM_STEP(STATE, ACC, NAME, VEC, TOKENS)                         \
  extern "C" __global__ void __launch_bounds__(256)                       \
      step_state_##NAME##_v##VEC##_t##TOKENS(                             \
          const __grid_constant__ StepArgs args) {                        \
    mlstm::state<STATE, ACC, VEC, TOKENS>(args);                          \
  }                                                                       \
  MLSTM_GEOMETRY(step_state_##NAME##_v##VEC##_t##TOKENS, 1, mlstm::kColumns, 256, 0)
// 16 bytes at once, but where the registers of 16 tokens allow less.
#define MLSTM_STEP_TOKENS(STATE, ACC, NAME, VEC, VEC16) \
  MLSTM_STEP(STATE, ACC, NAME, VEC, 1)                  \
  MLSTM_STEP(STATE, ACC, NAME, VEC, 4)                  \
  MLSTM_STEP(STATE, ACC, NAME, VEC16, 16)               \
  MLSTM_STEP(STATE, ACC, NAME, 1, 1)                    \
  MLSTM_STEP(STATE, ACC, NAME, 1, 16)
MLSTM_STEP_TOKENS(float, float, f32, 4, 4)
MLSTM_STEP_TOKENS(double, double, f64, 2, 2)
MLSTM_STEP_TOKENS(__nv_bfloat16, float, bf16, 8, 4)
MLSTM_STEP_TOKENS(__half, float, f16, 8, 4)
