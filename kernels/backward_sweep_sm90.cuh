// The state warpgroups of the backward's sweeps: see backward_sm90.cuh.
#pragma once

#include "backward_ends_sm90.cuh"
#include "backward_scores_sm90.cuh"

namespace mlstm {

template <typename T, typename Shape>
struct Sweeper {
  const BackwardBlock<T, Shape>& block;
  int group;

  using State = typename Shape::State;
  using Stages = Ring<Shape::kStages>;
  using Units = Ring<Shape::kKeyUnits>;
  using Slots = Ring<Shape::kOutputs ? Shape::kQuerySlots : 1>;
  using ScoreStages = Ring<Shape::kOutputs ? Shape::kScoreStages : 1>;
  using OwnStages = Ring<Shape::kOwn ? Shape::kOwnStages : 1>;

  // Byte offsets in a chunk's vectors.
  static constexpr int kAlphaAt = Shape::kSweep == Sweep::kDq ? kWsiAt : kSourceAt;
  static constexpr int kTakeAt = Shape::kReverse ? kWsiAt : kSourceAt;
  static constexpr int kTakeVectorAt = Shape::kReverse ? kWDeltaAt : kSourceAt;

  // dn of segments is made by segments_sm90.cu, after delta.
  static constexpr bool kHasVector = Shape::kAlongQk && Shape::kSweep != Sweep::kDc;

  // A (64 columns of v' as rows x 16 tokens) of c v'; its row sums with b in place of c go to `sum`.
  static __device__ __forceinline__ void weigh(uint32_t (&a)[4], float (&sum)[2], int j,
                                               uint32_t tile, uint32_t vectors, int lane, int warp,
                                               float factor) {
    load_matrices_transposed(
        swizzled(tile, j * 16 + (lane & 7) + (lane >> 4) * 8, warp * 2 + (lane >> 3 & 1)), a);
    const uint32_t own = vectors + (lane & 3) * 64 + j * 16;
    float4 c = load_shared_4(own + kTakeAt);
    if constexpr (!Shape::kOutputs) {
      c = make_float4(c.x * factor, c.y * factor, c.z * factor, c.w * factor);
    }
    float4 b = c;
    if (Shape::kSweep == Sweep::kDk) b = load_shared_4(own + kTakeVectorAt);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float first, second;
      unpack<T>(a[i], first, second);
      if constexpr (kHasVector) {
        // Volatile, or the compiler would keep products for later.
        asm volatile("fma.rn.f32 %0, %1, %2, %0;" : "+f"(sum[i & 1]) : "f"(first), "f"(i < 2 ? b.x : b.z));
        asm volatile("fma.rn.f32 %0, %1, %2, %0;" : "+f"(sum[i & 1]) : "f"(second), "f"(i < 2 ? b.y : b.w));
      }
      a[i] = pack_operand<T>(first * (i < 2 ? c.x : c.z), second * (i < 2 ? c.y : c.w));
    }
  }

  // O = S q'^T by 16 columns of S: while some are multiplied, the next are packed and the last decayed.
  __device__ __forceinline__ void multiply(float (&o)[32], State& c, int i, float g) const {
    constexpr int kBuffers = Shape::kLarge && Shape::kScored ? 3 : 4;  // for want of registers
    const int first = i * Shape::kSlabs + (Shape::kSplit ? group * Shape::kStateSlabs : 0);
    const bool leader = threadIdx.x % 128 == 0;
    uint32_t a[kBuffers][4];
    // Nothing is in flight here, but the compiler does not see as far as the last update's wait.
    wgmma_wait<0>();
    pin<32 * Shape::kStateSlabs>(c);
    pin<32>(o);
#pragma unroll
    for (int h = 0; h < 4 * Shape::kStateSlabs; ++h) {
      if (h >= kBuffers) wgmma_wait<kBuffers - 1>();
      // All but the last kBuffers - 1 are done.
      if (h >= 3 + kBuffers && (h - kBuffers) % 4 == 3 && leader) {
        barrier_arrive(block.bar(kQueriesEmpty, Slots::slot(first + (h - kBuffers) / 4)));
      }
      uint32_t(&own)[4] = a[h % kBuffers];
      pin<8>(c + 8 * h);
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        own[x] = pack_operand<T>(c[8 * h + 2 * x], c[8 * h + 2 * x + 1]);
      }
      const int slot = Slots::slot(first + h / 4);
      if (h % 4 == 0) barrier_wait(block.bar(kQueriesFull, slot), Slots::phase(first + h / 4));
      wgmma_fence();
      wgmma<0>(o, own, operand(block.query(slot), 16, 1024) + h % 4 * 2, h > 0, T{});
      wgmma_commit();
      pin<8>(c + 8 * h);
      // Volatile, or the compiler would do all of it at the end.
#pragma unroll
      for (int x = 0; x < 8; ++x) {
        asm volatile("mul.f32 %0, %0, %1;" : "+f"(c[8 * h + x]) : "f"(g));
      }
    }
    wgmma_wait<0>();
    pin<32>(o);
    if (leader) {
      barrier_arrive(block.bar(kQueriesEmpty, Slots::slot(first + Shape::kStateSlabs - 1)));
    }
  }

  // S += (c v') k'^T of 16 tokens; left in flight. By at most 128 columns: with four warpgroups the
  // compiler has too few registers for an instruction of 256.
  __device__ __forceinline__ void update(State& c, const uint32_t (&a)[4], uint32_t keys) const {
    constexpr int kPart = Shape::kStateSlabs > 2 ? 2 : Shape::kStateSlabs;
    wgmma_fence();
#pragma unroll
    for (int part = 0; part < Shape::kStateSlabs; part += kPart) {
      wgmma<1>(reinterpret_cast<float(&)[32 * kPart]>(c[32 * part]), a,
               operand(keys + part * kTileBytes, kTileBytes, 1024), true, T{});
    }
    wgmma_commit();
  }

  // The same of all tokens, and e with them: while some are multiplied the next are weighted.
  __device__ __forceinline__ void update_all(State& c, int i, float g) const {
    const int unit = block.unit_of(i, group), stage = Stages::slot(i);
    const int lane = opaque(static_cast<int>(threadIdx.x & 31));
    const int warp = opaque(static_cast<int>(threadIdx.x >> 5 & 3));
    const uint32_t value = block.value(stage, group), vectors = block.vectors(stage);
    const uint32_t keys = block.key(Units::slot(unit));
    uint32_t a[2][4];
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j >= 2) wgmma_wait<1>();
      weigh(a[j & 1], sum, j, value, vectors, lane, warp, 1.0f);
      if (j == 0) barrier_wait(block.bar(kKeysFull, Units::slot(unit)), Units::phase(unit));
      update(c, a[j & 1], keys + j * 2048);
    }
    if constexpr (kHasVector) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t entry = block.entry(group) + half * 32;
        const float e = load_shared(entry), added = quad_sum(sum[half]);
        __syncwarp();
        if ((lane & 3) == 0) store_shared(entry, (g == 0.0f ? 0.0f : e * g) + added);
      }
      __syncwarp();
    }
  }

  // O = alpha O + alpha beta e. Where a token resets the state, alpha may be zero and then forgets the
  // state, NaN included.
  template <bool kResets>
  __device__ __forceinline__ void scale(float (&o)[32], int stage, int lane) const {
    float e[2];
    if constexpr (Shape::kAlongQk) {
      e[0] = load_shared(block.entry(group));
      e[1] = load_shared(block.entry(group) + 32);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t own = (lane & 3) * 64 + j * 16;
      const float4 alpha = load_shared_4(block.vectors(stage) + kAlphaAt + own);
      float4 beta = alpha;
      if (Shape::kSweep == Sweep::kDq) beta = load_shared_4(block.w_delta(stage) + own);
#pragma unroll
      for (int x = 0; x < 8; ++x) {
        const float weight = x < 4 ? (x & 1 ? alpha.y : alpha.x) : (x & 1 ? alpha.w : alpha.z);
        float* out = o + 8 * j + x;
        *out = kResets && weight == 0.0f ? 0.0f : *out * weight;
        if constexpr (Shape::kAlongQk) {
          if (!Shape::kSplit || group == 0) {
            const float add = x < 4 ? (x & 1 ? beta.y : beta.x) : (x & 1 ? beta.w : beta.z);
            if (!kResets || add != 0.0f) *out += e[x >> 1 & 1] * add;
          }
        }
      }
    }
  }

  // Sums of two lanes: each keeps half of the kHalf * 2 and gives the rest.
  template <int kHalf>
  static __device__ __forceinline__ void halve(float (&sum)[16], int lane, int bit) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int x = 0; x < kHalf; ++x) {
      const float given = upper ? sum[x] : sum[x + kHalf];
      const float kept = upper ? sum[x + kHalf] : sum[x];
      sum[x] = kept + __shfl_xor_sync(0xffffffffu, given, bit);
    }
  }

  // Per token, the sum over this warpgroup's columns of its own tile times O: each warp's to shared
  // memory, of 16 columns.
  __device__ __forceinline__ void sum_own(const float (&o)[32], int i, int lane, int warp) const {
    const int stage = OwnStages::slot(i);
    barrier_wait(block.bar(kOwnFull, stage), OwnStages::phase(i));
    const uint32_t tile = block.own(stage, group);
    float sum[16];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t own[4];
      load_matrices_transposed(
          swizzled(tile, j * 16 + (lane & 7) + (lane >> 4) * 8, warp * 2 + (lane >> 3 & 1)), own);
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        float first, second, first8, second8;
        unpack<T>(own[2 * x], first, second);
        unpack<T>(own[2 * x + 1], first8, second8);
        const float* part = o + 8 * j + 4 * x;
        sum[4 * j + 2 * x] = part[0] * first + part[2] * first8;
        sum[4 * j + 2 * x + 1] = part[1] * second + part[3] * second8;
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(block.bar(kOwnEmpty, stage));
    // Over the lanes of the same columns of O.
    halve<8>(sum, lane, 16);
    halve<4>(sum, lane, 8);
    halve<2>(sum, lane, 4);
    // Of tokens 2 lane and 2 lane + 1.
    store_shared_2(block.sums(group) + warp * 256 + lane * 8, sum[0], sum[1]);
  }

  // The outputs of one chunk to shared memory, from where others store them.
  __device__ __forceinline__ void put(const float (&o)[32], int i) const {
    const int tid = opaque(static_cast<int>(threadIdx.x % 128));
    const int lane = tid & 31, warp = tid >> 5;
    barrier_wait(block.bar(kOutputsEmpty, group), (i & 1) ^ 1);
    if constexpr (Shape::kAlongQk) sum_own(o, i, lane, warp);
    const uint32_t tile = block.output(group);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const float* part = o + 4 * j;
      const uint32_t packed[4] = {
          pack_operand<T>(part[0], part[1]), pack_operand<T>(part[2], part[3]),
          pack_operand<T>(part[4], part[5]), pack_operand<T>(part[6], part[7])};
      store_matrices_transposed(
          swizzled(tile, j * 8 + (lane & 7) + (lane >> 4) * 8, warp * 2 + (lane >> 3 & 1)), packed);
    }
    async_proxy_fence();
    barrier_arrive(block.bar(kOutputsFull, group));
  }

  // Or, where another part of DHHV finishes them, for the next part to add.
  __device__ __forceinline__ void leave(const float (&o)[32], int i) const {
    if (block.column_of(group) >= block.args.dhqk) return;
    float4* to = block.again().part_sums(i, group) + threadIdx.x % 128;
#pragma unroll
    for (int x = 0; x < 8; ++x) {
      to[x * 128] = make_float4(o[4 * x], o[4 * x + 1], o[4 * x + 2], o[4 * x + 3]);
    }
  }
  // Adds what the parts before have left.
  __device__ __forceinline__ void add_parts(float (&o)[32], int i) const {
    const float4* from = block.again().part_sums(i, group) + threadIdx.x % 128;
#pragma unroll
    for (int first = 0; first < 8; first += 4) {
      float4 part[4];  // in flight
#pragma unroll
      for (int x = 0; x < 4; ++x) part[x] = from[(first + x) * 128];
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        float* to = o + 4 * (first + x);
        to[0] += part[x].x;
        to[1] += part[x].y;
        to[2] += part[x].z;
        to[3] += part[x].w;
      }
    }
  }

  // Zeroes what the tiles of a chunk hold of the next sequence: it must not count, not even as 0
  // times NaN. By all state warpgroups.
  __device__ __forceinline__ void clean(int i, int length) const {
    const int words = (64 - length) * 32, offset = length * 128;
#pragma unroll 1
    for (int part = 0; part < (Shape::kSplit ? 2 : 1); ++part) {
      const int unit = block.unit_of(i, part);
      barrier_wait(block.bar(kKeysFull, Units::slot(unit)), Units::phase(unit));
#pragma unroll 1
      for (int j = 0; j < Shape::kStateSlabs; ++j) {
        const uint32_t tile = block.key(Units::slot(unit)) + j * kTileBytes + offset;
        for (int x = threadIdx.x - 128 * Shape::kFirstState; x < words; x += 128 * Shape::kWgs) {
          store_shared(tile + x * 4, 0u);
        }
      }
    }
#pragma unroll 1
    for (int j = 0; j < Shape::kColumns / 64; ++j) {
      const uint32_t tile = block.value(Stages::slot(i), j) + offset;
      for (int x = threadIdx.x - 128 * Shape::kFirstState; x < words; x += 128 * Shape::kWgs) {
        store_shared(tile + x * 4, 0u);
      }
    }
    async_proxy_fence();
    named_sync<kCleanBarrier, 128 * Shape::kWgs>();
  }

  // P v' onto O; left in flight.
  __device__ __forceinline__ void add_scores(float (&o)[32], int i) const {
    barrier_wait(block.bar(kScoresFull, ScoreStages::slot(i)), ScoreStages::phase(i));
    pin<32>(o);
    wgmma_fence();
    const uint64_t values = operand(block.value(Stages::slot(i), group), kTileBytes, 1024);
    const uint32_t tile = block.score(ScoreStages::slot(i));
    // What dq has left has the tokens of dk as columns.
    constexpr bool kTurned = !Shape::kScored;
    const uint64_t scores = operand(tile, kTurned ? kTileBytes : 16, 1024);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<1, kTurned ? 1 : 0>(o, values + j * 128, scores + j * (kTurned ? 128 : 2), true, T{});
    }
    wgmma_commit();
  }

  // What a segment adds to the state from zero, from its end on: each chunk counts by what is left of it
  // there, so that the state itself does not decay and products follow each other. Where nothing is left
  // any more the rest of the segment is not even loaded.
  __device__ __forceinline__ void sum_segment() const {
    const Ends<T, Shape> ends{block, group};
    State c;
    ends.start(c);
    const bool leader = threadIdx.x % 128 == 0;
    const int lane = threadIdx.x & 31;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5 & 3, 0);
    float factor = 1.0f, sum[2] = {0.0f, 0.0f};
    uint32_t a[2][4];
    // While the last tokens of a chunk are added, the first of the next are weighted.
    const auto weigh_part = [&](int i, int j) {
      weigh(a[j & 1], sum, j, block.value(Stages::slot(i), group), block.vectors(Stages::slot(i)),
            lane, warp, factor);
    };
    const auto begin = [&](int i) {
      const int stage = Stages::slot(i);
      barrier_wait(block.bar(kValuesFull, stage), Stages::phase(i));
      const int length = __float_as_int(load_shared(block.vectors(stage) + kSweepLengthAt));
      if (length < 64) clean(i, length);
      weigh_part(i, 0);
    };
    begin(0);
    for (int i = 0; i < block.count && factor != 0.0f; ++i) {
      const int stage = Stages::slot(i);
      const uint32_t keys = block.key(Units::slot(i));
      const float g = load_shared(block.vectors(stage) + kSweepDecayAt);
      barrier_wait(block.bar(kKeysFull, Units::slot(i)), Units::phase(i));
      pin<32 * Shape::kStateSlabs>(c);
      update(c, a[0], keys);
#pragma unroll
      for (int j = 1; j < 4; ++j) {
        if (j >= 2) wgmma_wait<1>();
        weigh_part(i, j);
        update(c, a[j & 1], keys + j * 2048);
      }
      factor *= g;
      __syncwarp();
      // Before the arrivals by which loads go on.
      if (factor == 0.0f && leader && group == 0) block.set_forgotten(stage, 1.0f);
      if (lane == 0) barrier_arrive(block.bar(kValuesEmpty, stage));
      wgmma_wait<1>();
      if (i + 1 < block.count && factor != 0.0f) begin(i + 1);
      wgmma_wait<0>();
      pin<32 * Shape::kStateSlabs>(c);
      if (leader) barrier_arrive(block.bar(kKeysEmpty, Units::slot(i)));
    }
    if constexpr (kHasVector) {
      const float e[2] = {quad_sum(sum[0]), quad_sum(sum[1])};
      ends.put_entries(e);
    }
    ends.keep_segment(c, factor);
  }

  __device__ __forceinline__ void run() const {
    const Ends<T, Shape> ends{block, group};
    State c;
    ends.start(c);
    if constexpr (Shape::kSweep == Sweep::kDk) {
      if (block.ends) ends.meet_boundary(c, div_up(block.total, kGroupChunks));
    }
    const bool leader = threadIdx.x % 128 == 0;
    const int lane = threadIdx.x & 31;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5 & 3, 0);
    const int count = block.count;
    for (int i = 0; i < count; ++i) {
      // A segment starts with a group of chunks.
      const int chunk = block.chunk(i);
      if constexpr (Shape::kSweep == Sweep::kDq) {
        if (chunk % kGroupChunks == 0) {
          ends.keep_boundary(c, (block.from + chunk) / kGroupChunks);
        }
      }
      const int stage = Stages::slot(i);
      barrier_wait(block.bar(kValuesFull, stage), Stages::phase(i));
      const uint32_t vectors = block.vectors(stage);
      const float g = load_shared(vectors + kSweepDecayAt);
      const int length = __float_as_int(load_shared(vectors + kSweepLengthAt));
      if (length < 64) clean(i, length);
      float o[32];
      multiply(o, c, i, g);
      if (Shape::kSweep == Sweep::kDq) {
        barrier_wait(block.bar(kDeltasFull, stage), Stages::phase(i));
      }
      if (g == 0.0f) {
        scale<true>(o, stage, lane);
      } else {
        scale<false>(o, stage, lane);
      }
      if (g == 0.0f) {
#pragma unroll
        for (int x = 0; x < 32 * Shape::kStateSlabs; ++x) c[x] = 0.0f;
      }

      const bool finishes = !Shape::kSplit || group == 0;
      if (Shape::kSplit && group == 1) {
        // Only parts of 512 columns follow others.
        if (Shape::kAlongQk && block.args.parts_before != 0) add_parts(o, i);
        give_outputs(o, i, block.exchange(), block.bar(kExchanged, 0), block.bar(kExchangeFree, 0));
      }
      if (Shape::kSplit && finishes) {
        take_outputs(o, i, block.exchange(), block.bar(kExchanged, 0), block.bar(kExchangeFree, 0));
      }
      if (finishes) add_scores(o, i);
      pin<32 * Shape::kStateSlabs>(c);
      update_all(c, i, g);
      if (finishes) {
        // All but the last two parts of the update are done, and what came before.
        pin<32>(o);
        if (leader) barrier_arrive(block.bar(kScoresEmpty, ScoreStages::slot(i)));
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(block.bar(kValuesEmpty, stage));
      if (finishes) {
        if (Shape::kAlongQk && block.args.parts_after != 0) {
          leave(o, i);
        } else {
          put(o, i);
        }
      }
      wgmma_wait<0>();
      pin<32 * Shape::kStateSlabs>(c);
      if (leader) barrier_arrive(block.bar(kKeysEmpty, Units::slot(block.unit_of(i, group))));
      if constexpr (Shape::kSweep == Sweep::kDk) {
        if (chunk % kGroupChunks == 0) {
          ends.meet_boundary(c, (block.from + chunk) / kGroupChunks);
        }
      }
    }
    if constexpr (Shape::kSweep == Sweep::kDq) {
      if (block.ends) ends.keep_boundary(c, div_up(block.total, kGroupChunks));
    }
    if constexpr (Shape::kSweep == Sweep::kDk) {
      const Args& args = block.args;
      if (block.from == 0 && args.dc_initial.data != nullptr) {
        ends.keep(c, at<float>(args.dc_initial, block.row, block.head, 0), args.dc_initial.stride_s);
      }
      if (block.from == 0 && args.dn_initial.data != nullptr) {
        ends.keep_vector(at<float>(args.dn_initial, block.row, block.head, 0));
      }
    }
  }
};

template <typename T, typename Shape>
__device__ __forceinline__ void backward_sweep(const BackwardArgs& maps, unsigned char* smem) {
  BackwardBlock<T, Shape> block(maps, blockIdx.x, (shared_address(smem) + 1023) & ~1023u);
  block.prepare();
  wait_for_previous();
  block.locate();
  if (block.count == 0 && (!Shape::kOutputs || !block.ends)) return;
  const int group = __shfl_sync(0xffffffffu, threadIdx.x >> 7, 0);
  if (group == 0) {
    if constexpr (Shape::kUneven) give_registers<Shape::kLoadRegisters>();
    block.serve(__shfl_sync(0xffffffffu, threadIdx.x >> 5, 0));
  } else if (Shape::kScored && group == 1) {
    if constexpr (Shape::kUneven && Shape::kScored) give_registers<Shape::kScoreRegisters>();
    if constexpr (Shape::kScored) Scorer<T, Shape>{block}.run();
  } else {
    if constexpr (Shape::kUneven) take_registers<Shape::kStateRegisters>();
    const Sweeper<T, Shape> sweeper{block, group - Shape::kFirstState};
    if constexpr (Shape::kOutputs) {
      sweeper.run();
    } else {
      sweeper.sum_segment();
    }
  }
}

#define MLSTM_SWEEP(NAME, T, SLABS, WGS, SWEEP)                                            \
  extern "C" __global__ void                                                               \
      __launch_bounds__((mlstm::BackwardShape<SLABS, WGS, SWEEP>::kThreads), 1)            \
          NAME(const __grid_constant__ mlstm::BackwardArgs args) {                         \
    extern __shared__ unsigned char smem[];                                                \
    mlstm::backward_sweep<T, mlstm::BackwardShape<SLABS, WGS, SWEEP>>(args, smem);         \
  }                                                                                        \
  MLSTM_GEOMETRY(NAME, (mlstm::BackwardShape<SLABS, WGS, SWEEP>::kColumns), 64 * SLABS,    \
                 (mlstm::BackwardShape<SLABS, WGS, SWEEP>::kThreads),                      \
                 (mlstm::BackwardShape<SLABS, WGS, SWEEP>::kBytes))

// Names are <sweep>_<type>_<rows>x<columns of S>.
#define MLSTM_SWEEPS(NAME, T, SWEEP)          \
  MLSTM_SWEEP(NAME##_64x64, T, 1, 1, SWEEP)   \
  MLSTM_SWEEP(NAME##_128x64, T, 1, 2, SWEEP)  \
  MLSTM_SWEEP(NAME##_64x128, T, 2, 1, SWEEP)  \
  MLSTM_SWEEP(NAME##_128x128, T, 2, 2, SWEEP) \
  MLSTM_SWEEP(NAME##_128x256, T, 4, 2, SWEEP)
// Of sweeps with outputs alone, whose blocks hold all columns.
#define MLSTM_SPLIT_SWEEP(NAME, T, SWEEP) MLSTM_SWEEP(NAME##_64x512, T, 8, 2, SWEEP)

}  // namespace mlstm
