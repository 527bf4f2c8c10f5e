// The state warpgroups of the backward's sweeps: see backward_sm90.cuh.
#pragma once

#include "backward_ends_sm90.cuh"

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
  static constexpr int kAlphaBetaAt = Shape::kSweep == Sweep::kDq ? kWDeltaAt : kSourceAt;
  static constexpr int kTakeAt = Shape::kReverse ? kWsiAt : kSourceAt;
  static constexpr int kTakeVectorAt = Shape::kReverse ? kWDeltaAt : kSourceAt;

  // A (64 columns of v' as rows x 16 tokens) of c v'; its row sums with b in place of c go to `sum`.
  static __device__ __forceinline__ void weigh(uint32_t (&a)[4], float (&sum)[2], int j,
                                               uint32_t tile, uint32_t vectors, int lane, int warp) {
    load_matrices_transposed(
        swizzled(tile, j * 16 + (lane & 7) + (lane >> 4) * 8, warp * 2 + (lane >> 3 & 1)), a);
    const uint32_t own = vectors + (lane & 3) * 64 + j * 16;
    const float4 c = load_shared_4(own + kTakeAt);
    float4 b = c;
    if (Shape::kAlongQk && kTakeVectorAt != kTakeAt) b = load_shared_4(own + kTakeVectorAt);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float first, second;
      unpack<T>(a[i], first, second);
      if constexpr (Shape::kAlongQk) {
        sum[i & 1] += first * (i < 2 ? b.x : b.z) + second * (i < 2 ? b.y : b.w);
      }
      a[i] = pack_operand<T>(first * (i < 2 ? c.x : c.z), second * (i < 2 ? c.y : c.w));
    }
  }

  // O = S q'^T by half slabs, as in the forward: while one is multiplied, the next is packed and the
  // last decayed.
  template <typename F>
  __device__ __forceinline__ void multiply(float (&o)[32], State& c, int i, float g,
                                           F meanwhile) const {
    const int first = i * Shape::kSlabs + (Shape::kSplit ? group * Shape::kStateSlabs : 0);
    const bool leader = threadIdx.x % 128 == 0;
    uint32_t a[2][2][4];
    // Nothing is in flight here, but the compiler does not see as far as the last update's wait.
    wgmma_wait<0>();
    pin<32 * Shape::kStateSlabs>(c);
    pin<32>(o);
#pragma unroll
    for (int h = 0; h < 2 * Shape::kStateSlabs; ++h) {
      if (h >= 2) wgmma_wait<1>();
      if (h >= 3 && (h & 1) != 0 && leader) {
        barrier_arrive(block.bar(kQueriesEmpty, Slots::slot(first + (h - 3) / 2)));
      }
      pin<16>(c + 16 * h);
#pragma unroll
      for (int x = 0; x < 8; ++x) {
        a[h & 1][x / 4][x % 4] = pack_operand<T>(c[16 * h + 2 * x], c[16 * h + 2 * x + 1]);
      }
      const int slot = Slots::slot(first + h / 2);
      if ((h & 1) == 0) barrier_wait(block.bar(kQueriesFull, slot), Slots::phase(first + h / 2));
      const uint64_t b = operand(block.query(slot), 16, 1024);
      wgmma_fence();
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        wgmma<0>(o, a[h & 1][x], b + ((h & 1) * 2 + x) * 2, h + x > 0, T{});
      }
      wgmma_commit();
      pin<16>(c + 16 * h);
      // Volatile, or the compiler would do all of it at the end.
#pragma unroll
      for (int x = 0; x < 16; ++x) {
        asm volatile("mul.f32 %0, %0, %1;" : "+f"(c[16 * h + x]) : "f"(g));
      }
      if (Shape::kStateSlabs < 4) meanwhile(h);
      if (Shape::kStateSlabs == 1) meanwhile(h + 2);
    }
    wgmma_wait<0>();
    pin<32>(o);
    if (leader) {
      constexpr int kReleased = Shape::kStateSlabs - 1;
#pragma unroll
      for (int j = kReleased; j < Shape::kStateSlabs; ++j) {
        barrier_arrive(block.bar(kQueriesEmpty, Slots::slot(first + j)));
      }
    }
    if (Shape::kStateSlabs == 4) {
#pragma unroll
      for (int j = 0; j < 4; ++j) meanwhile(j);
    }
  }

  // S += (c v') k'^T; left in flight.
  __device__ __forceinline__ void update(State& c, uint32_t (&a)[4][4], int unit) const {
    const uint64_t keys = operand(block.key(unit), kTileBytes, 1024);
#pragma unroll
    for (int j = 0; j < 4; ++j) wgmma<1>(c, a[j], keys + j * 128, true, T{});
    wgmma_commit();
  }

  // O = alpha O + alpha beta e.
  __device__ __forceinline__ void scale(float (&o)[32], const float (&e)[2], uint32_t vectors,
                                        int lane) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t own = vectors + (lane & 3) * 64 + j * 16;
      const float4 alpha = load_shared_4(own + kAlphaAt);
      float4 beta = alpha;
      if (Shape::kAlongQk && kAlphaBetaAt != kAlphaAt) beta = load_shared_4(own + kAlphaBetaAt);
#pragma unroll
      for (int x = 0; x < 8; ++x) {
        const float weight = x < 4 ? (x & 1 ? alpha.y : alpha.x) : (x & 1 ? alpha.w : alpha.z);
        float out = o[8 * j + x] * weight;
        if constexpr (Shape::kAlongQk) {
          if (!Shape::kSplit || group == 0) {
            out += e[x >> 1 & 1] * (x < 4 ? (x & 1 ? beta.y : beta.x) : (x & 1 ? beta.w : beta.z));
          }
        }
        // A weight of zero forgets the state, NaN included.
        o[8 * j + x] = weight == 0.0f ? 0.0f : out;
      }
    }
  }

  // The second half of the columns of S gives its part of the outputs to the first, which adds it.
  __device__ __forceinline__ void give(const float (&o)[32], int i) const {
    if (i > 0) named_sync<kTakenBarrier, 256>();
    const uint32_t to = block.exchange() + threadIdx.x % 128 * 16;
#pragma unroll
    for (int x = 0; x < 8; ++x) {
      store_shared_4(to + x * 2048, o[4 * x], o[4 * x + 1], o[4 * x + 2], o[4 * x + 3]);
    }
    named_arrive<kGivenBarrier, 256>();
  }
  __device__ __forceinline__ void take(float (&o)[32], bool more) const {
    named_sync<kGivenBarrier, 256>();
    const uint32_t from = block.exchange() + threadIdx.x % 128 * 16;
#pragma unroll
    for (int x = 0; x < 8; ++x) {
      const float4 part = load_shared_4(from + x * 2048);
      o[4 * x] += part.x;
      o[4 * x + 1] += part.y;
      o[4 * x + 2] += part.z;
      o[4 * x + 3] += part.w;
    }
    if (more) named_arrive<kTakenBarrier, 256>();
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

  // A finished tile to memory: by the copy engine, unless the chunk ends within it and the next
  // sequence's tokens follow.
  __device__ __forceinline__ void store(uint32_t tile, int chunk, int tid) const {
    const int token = block.start(chunk);
    if (!block.unclean(chunk)) {
      if (tid == 0) {
        store_box(&block.maps.out, tile, token, block.column_of(group) / 64, block.head,
                  block.batch);
        store_commit();
      }
      return;
    }
    const Args& args = block.args;
    const int len = block.length(chunk), column = block.column_of(group);
    if (column >= (Shape::kAlongQk ? args.dhqk : args.dhhv)) return;
    const Tensor& out = Shape::kSweep == Sweep::kDv   ? args.dv
                        : Shape::kSweep == Sweep::kDq ? args.dq
                                                      : args.dk;
    for (int r = tid / 8; r < len; r += 16) {
      T* row = at<T>(out, block.batch, block.head, token + r) + column;
      reinterpret_cast<uint4*>(row)[tid & 7] = load_shared_16(swizzled(tile, r, tid & 7));
    }
  }

  // The outputs of one chunk through shared memory, and the sums of each token.
  __device__ __forceinline__ void put(const float (&o)[32], int i, int chunk) const {
    const int tid = opaque(static_cast<int>(threadIdx.x % 128));
    const int lane = tid & 31, warp = tid >> 5;
    if constexpr (Shape::kOwn) sum_own(o, i, lane, warp);
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
    block.sync_group(group);
    store(tile, chunk, tid);
    if constexpr (Shape::kOwn) {
      const Args& args = block.args;
      const int column = block.column_of(group);
      if (tid < block.length(chunk) && column < args.dhqk) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < 4; ++w) sum += load_shared(block.sums(group) + w * 256 + tid * 4);
        void* to = Shape::kSweep == Sweep::kDq ? args.q_dq : args.k_dk;
        const int64_t part = static_cast<int64_t>(column / 64) * args.b * args.nh * args.s;
        static_cast<float*>(to)[part + token_index(args, block.batch, block.head,
                                                   block.start(chunk) + tid)] = sum;
      }
    }
  }

  // Zeroes what the tiles of a chunk hold of the next sequence: it must not count, not even as 0
  // times NaN. By all state warpgroups.
  __device__ __forceinline__ void clean(int i, int chunk) const {
    const int words = (64 - block.length(chunk)) * 32, offset = block.length(chunk) * 128;
#pragma unroll 1
    for (int part = 0; part < (Shape::kSplit ? 2 : 1); ++part) {
      const int unit = block.unit_of(i, part);
      barrier_wait(block.bar(kKeysFull, Units::slot(unit)), Units::phase(unit));
#pragma unroll 1
      for (int j = 0; j < Shape::kStateSlabs; ++j) {
        const uint32_t tile = block.key(Units::slot(unit)) + j * kTileBytes + offset;
        for (int x = threadIdx.x - 128; x < words; x += 128 * Shape::kWgs) {
          store_shared(tile + x * 4, 0u);
        }
      }
    }
#pragma unroll 1
    for (int j = 0; j < Shape::kColumns / 64; ++j) {
      const uint32_t tile = block.value(Stages::slot(i), j) + offset;
      for (int x = threadIdx.x - 128; x < words; x += 128 * Shape::kWgs) {
        store_shared(tile + x * 4, 0u);
      }
    }
    async_proxy_fence();
    named_sync<kCleanBarrier, 128 * Shape::kWgs>();
  }

  // P v' onto O; left in flight.
  __device__ __forceinline__ void add_scores(float (&o)[32], int i) const {
    const uint64_t values = operand(block.value(Stages::slot(i), group), kTileBytes, 1024);
    const uint32_t tile = block.score(ScoreStages::slot(i));
    // The tiles' rows are queries, dq's tokens; the others' are their columns.
    const uint64_t scores = operand(tile, Shape::kReverse ? kTileBytes : 16, 1024);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<1, Shape::kReverse ? 1 : 0>(o, values + j * 128,
                                        scores + j * (Shape::kReverse ? 128 : 2), true, T{});
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void run() const {
    const Ends<T, Shape> ends{block, group};
    State c;
    float e[2];
    ends.start(c, e);
    if constexpr (Shape::kSweep == Sweep::kDk) {
      if (block.ends) ends.meet_boundary(c, e, div_up(block.total, kGroupChunks));
    }
    const bool leader = threadIdx.x % 128 == 0;
    const int lane = threadIdx.x & 31;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5 & 3, 0);
    const int count = block.count;
    float decay = 1.0f;
    for (int i = 0; i < count; ++i) {
      const int chunk = block.chunk(i), place = block.from + chunk;
      if constexpr (Shape::kSweep == Sweep::kDq) {
        if (place % kGroupChunks == 0) ends.keep_boundary(c, e, place / kGroupChunks);
      }
      const int stage = Stages::slot(i), unit = block.unit_of(i, group);
      barrier_wait(block.bar(kValuesFull, stage), Stages::phase(i));
      const uint32_t vectors = block.vectors(stage);
      const float g = load_shared(vectors + kSweepDecayAt);
      if (block.unclean(chunk)) clean(i, chunk);
      const uint32_t value = block.value(stage, group);
      uint32_t a[4][4];
      float sum[2] = {0.0f, 0.0f};
      const auto weigh_part = [&](int j) { weigh(a[j], sum, j, value, vectors, lane, warp); };
      float o[32];
      if constexpr (Shape::kOutputs) {
        // The last chunk's store must have read its tile before anyone writes the next.
        if (leader) store_wait_read();
        block.sync_group(group);
        multiply(o, c, i, g, weigh_part);
        scale(o, e, vectors, lane);
      } else {
#pragma unroll
        for (int x = 0; x < 32 * Shape::kStateSlabs; ++x) c[x] *= g;
#pragma unroll
        for (int j = 0; j < 4; ++j) weigh_part(j);
        decay *= g;
      }
      if (g == 0.0f) {
#pragma unroll
        for (int x = 0; x < 32 * Shape::kStateSlabs; ++x) c[x] = 0.0f;
      }
      if constexpr (Shape::kAlongQk) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          e[half] = (g == 0.0f ? 0.0f : e[half] * g) + quad_sum(sum[half]);
        }
      }

      const bool finishes = Shape::kOutputs && (!Shape::kSplit || group == 0);
      if (Shape::kOutputs && Shape::kSplit && group == 1) give(o, i);
      if (finishes) {
        if (Shape::kSplit) take(o, i + 1 < count);
        barrier_wait(block.bar(kScoresFull, ScoreStages::slot(i)), ScoreStages::phase(i));
        pin<32>(o);
        pin<32 * Shape::kStateSlabs>(c);
        wgmma_fence();
        add_scores(o, i);
        barrier_wait(block.bar(kKeysFull, Units::slot(unit)), Units::phase(unit));
        update(c, a, Units::slot(unit));
        wgmma_wait<1>();
        pin<32>(o);
        if (leader) barrier_arrive(block.bar(kScoresEmpty, ScoreStages::slot(i)));
        __syncwarp();
        if (lane == 0) barrier_arrive(block.bar(kValuesEmpty, stage));
        put(o, i, chunk);
      } else {
        __syncwarp();
        if (lane == 0) barrier_arrive(block.bar(kValuesEmpty, stage));
        barrier_wait(block.bar(kKeysFull, Units::slot(unit)), Units::phase(unit));
        pin<32 * Shape::kStateSlabs>(c);
        wgmma_fence();
        update(c, a, Units::slot(unit));
      }
      wgmma_wait<0>();
      pin<32 * Shape::kStateSlabs>(c);
      if (leader) barrier_arrive(block.bar(kKeysEmpty, Units::slot(unit)));
      if constexpr (Shape::kSweep == Sweep::kDk) {
        if (place % kGroupChunks == 0) ends.meet_boundary(c, e, place / kGroupChunks);
      }
    }
    if (Shape::kOutputs && leader) store_wait();
    if constexpr (Shape::kSweep == Sweep::kDq) {
      if (block.ends) ends.keep_boundary(c, e, div_up(block.total, kGroupChunks));
    }
    if constexpr (Shape::kSweep == Sweep::kDk) {
      const Args& args = block.args;
      if (block.from == 0 && args.dc_initial.data != nullptr) {
        ends.keep(c, at<float>(args.dc_initial, block.row, block.head, 0), args.dc_initial.stride_s);
      }
      if (block.from == 0 && args.dn_initial.data != nullptr) {
        ends.keep_vector(e, at<float>(args.dn_initial, block.row, block.head, 0));
      }
    }
    if constexpr (!Shape::kOutputs) ends.keep_segment(c, e, decay);
  }
};

template <typename T, typename Shape>
__device__ __forceinline__ void backward_sweep(const BackwardArgs& maps, unsigned char* smem) {
  BackwardBlock<T, Shape> block(maps, smem);
  block.prepare();
  wait_for_previous();
  start_dependents();
  block.locate();
  if (block.count == 0 && (!Shape::kOutputs || !block.ends)) return;
  const int group = __shfl_sync(0xffffffffu, threadIdx.x >> 7, 0);
  if (group == 0) {
    if constexpr (Shape::kUneven) give_registers<Shape::kLoadRegisters>();
    block.load(__shfl_sync(0xffffffffu, threadIdx.x >> 5, 0));
  } else {
    if constexpr (Shape::kUneven) take_registers<Shape::kStateRegisters>();
    Sweeper<T, Shape>{block, group - 1}.run();
  }
}

#define MLSTM_SWEEP(NAME, T, SLABS, WGS, SWEEP)                                            \
  extern "C" __global__ void __launch_bounds__(128 * (WGS + 1), 1)                         \
      NAME(const __grid_constant__ mlstm::BackwardArgs args) {                             \
    extern __shared__ unsigned char smem[];                                                \
    mlstm::backward_sweep<T, mlstm::BackwardShape<SLABS, WGS, SWEEP>>(args, smem);         \
  }                                                                                        \
  MLSTM_GEOMETRY(NAME, (mlstm::BackwardShape<SLABS, WGS, SWEEP>::kColumns), 64 * SLABS,    \
                 128 * (WGS + 1), (mlstm::BackwardShape<SLABS, WGS, SWEEP>::kBytes))

// Names are <sweep>_<type>_<rows>x<columns of S>.
#define MLSTM_SWEEPS(NAME, T, SWEEP)               \
  MLSTM_SWEEP(NAME##_64x64, T, 1, 1, SWEEP)        \
  MLSTM_SWEEP(NAME##_128x64, T, 1, 2, SWEEP)       \
  MLSTM_SWEEP(NAME##_64x128, T, 2, 1, SWEEP)       \
  MLSTM_SWEEP(NAME##_128x128, T, 2, 2, SWEEP)      \
  MLSTM_SWEEP(NAME##_128x256, T, 4, 2, SWEEP)      \
  MLSTM_SWEEP(NAME##_64x512, T, 8, 2, SWEEP)

}  // namespace mlstm
