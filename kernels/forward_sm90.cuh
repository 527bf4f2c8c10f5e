// The chunkwise forward on Hopper: one pass along the chunks of a sequence with the state in
// registers. Formulas and buffers are those of params.cuh, with L = 64.
//
// A block owns some columns of DHHV of one sequence and head, over one segment of its chunks
// (HopperShape has the sizes). NOTES.md tells what was tried.
//   state warpgroups   each holds C transposed, 64 columns of DHHV as rows x all of DHQK, in float
//                      accumulators: they are the A operand of C^T q without leaving registers
//   score warpgroup    P = D * (q k^T), the denominators, and n
//   other warps        load, and make the chunks' vectors from the gates (forward_gates_sm90.cuh); where
//                      large states take all registers the last state warpgroup loads, and
//                      gates_sm90.cu makes the vectors beforehand
// Per chunk a state warpgroup does
//   O^T = C^T q^T          decays C meanwhile
//   O^T = w O^T + v^T P^T  waits for the score warpgroup's P
//   C^T += (a v)^T k       under which it scales O by 1/den and stores it
// q and n meet in the product q k^T: n, split in two numbers of the data's type (their sum has its
// digits), fills rows 64 and 65 of each k tile. Its new terms sum_y a_y k_y are a product too, with
// a in two such numbers.
//
// Segments run side by side. Of long sequences segments_sm90.cu leaves the states that each one adds from
// zero, in the frame of its end, and a block puts together what the segments before its own leave behind.
// In short ones a block catches up: it adds the chunks before its segment to its state itself.
#pragma once

#include "forward_gates_sm90.cuh"
#include "forward_states_sm90.cuh"
#include "overlap.cuh"

namespace mlstm {

// P of one chunk, rows of queries; and the vector den: N of each query, then its 1/den in the order
// of columns.
template <typename T, typename Shape>
struct Scores {
  const Block<T, Shape>& block;

  // The registers of one product q [k | n]^T: 64 columns of keys, then N's two halves.
  using Product = float[36];

  static __device__ __forceinline__ void multiply(Product& s, uint32_t q, uint32_t k) {
    uint64_t a = operand(q, 16, 1024), b = operand(k, 16, 1024);
    pin<36>(s);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < Shape::kSlabs; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        wgmma<0, 0>(s, a + j * (kTileBytes / 16) + 2 * i, b + j * (kKeyTileBytes / 16) + 2 * i,
                    j + i > 0, T{});
      }
    }
    wgmma_commit();
  }

  // n after the chunks before the segment's, from the last one on, as C: a slab by each warp. Meanwhile they
  // load, a chunk behind, for the state warpgroups must be done with it too.
  __device__ __forceinline__ void catch_up() const {
    if (block.before == 0) return;
    static_assert(!Shape::kLarge || Shape::kSlabs == 4, "a slab for each warp that loads");
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);
    float sum[8] = {}, left = 1.0f;
    for (int i = warp < Shape::kSlabs ? -block.before : 0; i < 0; ++i) {
      const int stage = Shape::ahead_stage(i);
      barrier_wait(block.bar(kAheadFull, stage), block.ahead_phase(i));
      if (left != 0.0f) block.add_keys_ahead(sum, warp, stage, left);
      left *= load_shared(block.vectors(stage) + kDecayAt);
      __syncwarp();
      if ((threadIdx.x & 31) == 0) barrier_arrive(block.bar(kAheadEmpty, stage));
      if (Shape::kLarge && i > -block.before) block.load_ahead(i - 1 + Shape::kAhead, warp);
    }
    if (Shape::kLarge) block.load_ahead(Shape::kAhead - 1, warp);
    // The state given has been put there by others.
    named_sync<kScoreBarrier, 128>();
    if (warp < Shape::kSlabs) block.put_keys_ahead(sum, warp, left);
  }

  // The score warpgroup's whole life.
  __device__ __forceinline__ void run() const {
    const Args& args = block.args;
    const bool normalize = (args.flags & kNormalize) != 0;
    block.first_normalizer();
    if constexpr (Shape::kCatchUp) catch_up();
    async_proxy_fence();
    named_sync<kScoreBarrier, 128>();
    const int count = block.count;
    for (int i = 0; i < count; ++i) {
      const int stage = Shape::stage(i);
      const uint32_t phase = Shape::phase(i);
      // Addresses are cheap to compute and dear to keep.
      const int lane = opaque(static_cast<int>(threadIdx.x & 31));
      const int warp = opaque(static_cast<int>(threadIdx.x >> 5 & 3));
      barrier_wait(block.bar(kQueryFull, stage), phase);
      barrier_wait(block.bar(kKeyFull, stage), phase);
      if (block.unclean(i)) block.clean(i);
      Product s;
      multiply(s, block.query(stage), block.key(stage));
      // For n after this chunk: under all that follows, if there are registers for it.
      constexpr bool kEarly = !Shape::kTight;
      constexpr int kPart = Shape::kSplit ? 4 : Shape::kSlabs;
      float keys[kPart][4];
      if constexpr (kEarly) block.sum_keys(keys, 0, stage);
      const uint32_t vectors = block.vectors(stage);
      const int r0 = warp * 16 + (lane >> 2);
      const float row0 = load_shared(vectors + kRowAt + r0 * 4);
      const float row1 = load_shared(vectors + kRowAt + (r0 + 8) * 4);
      float4 col[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        col[j] = load_shared_4(vectors + kColAt + (lane & 3) * 64 + j * 16);
      }
      wgmma_wait<kEarly ? 1 : 0>();
      pin<36>(s);
      const float before0 = s[32] + s[33], before1 = s[34] + s[35];
      if (threadIdx.x % 128 == 0) barrier_arrive(block.bar(kQueryEmpty, stage));
      barrier_wait(block.bar(kScoreEmpty, i & 1), (i >> 1 & 1) ^ 1);
      // The thread's first row minus its first column: how far it sees.
      const int reach = r0 - (lane & 3) * 2;
      float sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint32_t packed[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int y = (j + half) * 8;
          const float u0 = half == 0 ? col[j / 2].x : col[j / 2].z;
          const float u1 = half == 0 ? col[j / 2].y : col[j / 2].w;
          float* x = s + 4 * (j + half);
          x[0] = reach >= y ? x[0] * exp2_approx(row0 + u0) : 0.0f;
          x[1] = reach >= y + 1 ? x[1] * exp2_approx(row0 + u1) : 0.0f;
          x[2] = reach >= y - 8 ? x[2] * exp2_approx(row1 + u0) : 0.0f;
          x[3] = reach >= y - 7 ? x[3] * exp2_approx(row1 + u1) : 0.0f;
          sum0 += x[0] + x[1];
          sum1 += x[2] + x[3];
          packed[2 * half] = pack_operand<T>(x[0], x[1]);
          packed[2 * half + 1] = pack_operand<T>(x[2], x[3]);
        }
        store_matrices(swizzled(block.score(i & 1), warp * 16 + (lane & 15), j + (lane >> 4)),
                       packed);
      }
      sum0 = quad_sum(sum0);
      sum1 = quad_sum(sum1);
      if ((lane & 3) < 2) {
        // Lane 0 of a quad sees row r0, lane 1 row r0 + 8; N's halves are in lane 0's registers.
        const int r = r0 + (lane & 1) * 8;
        const unsigned quads = 0x33333333u;
        float q_n = __shfl_sync(quads, before0, lane & ~1);
        float q_n8 = __shfl_sync(quads, before1, lane & ~1);
        const float w = load_shared(vectors + kWeightAt + column_order(r) * 4);
        const float before = (lane & 1) != 0 ? q_n8 : q_n;
        float sum = ((lane & 1) != 0 ? sum1 : sum0) + (w == 0.0f ? 0.0f : w * before);
        const float scale = static_cast<float>(args.qk_scale);
        sum *= scale;
        store_shared(block.sums(i & 1) + r * 4, sum);
        const float floor = load_shared(vectors + kFloorAt + r * 4);
        float inv = reciprocal_approx(fmaxf(fabsf(sum), floor) + static_cast<float>(args.eps));
        store_shared(block.den(i & 1) + column_order(r) * 4, normalize ? scale * inv : scale);
      }
      async_proxy_fence();
      barrier_arrive(block.bar(kScoreFull, i & 1));

      // n after this chunk, for the product with the next one's queries.
      if constexpr (!kEarly) block.sum_keys(keys, 0, stage);
      block.add_keys(keys, 0, stage, Shape::stage(i + 1));
      if constexpr (Shape::kSplit) {
        block.sum_keys(keys, kPart, stage);
        block.add_keys(keys, kPart, stage, Shape::stage(i + 1));
      }
      __syncwarp();
      block.release_key(stage, lane == 0);
      async_proxy_fence();
      named_sync<kScoreBarrier, 128>();
    }
    block.last_normalizer();
  }
};

template <typename T, typename Shape>
struct Outputs {
  const Block<T, Shape>& block;
  int group;  // which of the state warpgroups

  using State = typename Shape::State;

  // O^T = C^T q^T, by some columns of C: while they are multiplied, the next are packed and the last
  // decayed, and between them meanwhile(0 ... 3) is called.
  template <typename F>
  static __device__ __forceinline__ void multiply(float (&o)[32], State& c, uint32_t q, float g,
                                                  F meanwhile) {
    // Sixteens of columns in a step, and steps in flight.
    constexpr int kWide = Shape::kLarge ? 1 : 2;
    constexpr int kBuffers = Shape::kLarge ? 3 : 2;
    constexpr int kSteps = 4 * Shape::kStateSlabs / kWide;
    const uint64_t b = operand(q, 16, 1024);
    uint32_t a[kBuffers][kWide][4];
    // Nothing is in flight here, but the compiler does not see as far as the last update's wait.
    wgmma_wait<0>();
    pin<32 * Shape::kStateSlabs>(c);
    pin<32>(o);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step >= kBuffers) wgmma_wait<kBuffers - 1>();
      uint32_t(&own)[kWide][4] = a[step % kBuffers];
      float* columns = c + 8 * kWide * step;
      pin<8 * kWide>(columns);
#pragma unroll
      for (int x = 0; x < 4 * kWide; ++x) {
        own[x / 4][x % 4] = pack_operand<T>(columns[2 * x], columns[2 * x + 1]);
      }
      wgmma_fence();
#pragma unroll
      for (int x = 0; x < kWide; ++x) {
        const int sixteen = step * kWide + x;
        wgmma<0>(o, own[x], b + sixteen / 4 * (kTileBytes / 16) + sixteen % 4 * 2, sixteen > 0, T{});
      }
      wgmma_commit();
      pin<8 * kWide>(columns);
      // Volatile, or the compiler would do all of it at the end.
#pragma unroll
      for (int x = 0; x < 8 * kWide; ++x) {
        asm volatile("mul.f32 %0, %0, %1;" : "+f"(columns[x]) : "f"(g));
      }
      if constexpr (!Shape::kLarge) {
#pragma unroll
        for (int j = step * 4 / kSteps; j < (step + 1) * 4 / kSteps; ++j) meanwhile(j);
      }
    }
    wgmma_wait<0>();
    pin<32>(o);
    // A large state leaves no registers for it before.
    if (Shape::kLarge) {
#pragma unroll
      for (int j = 0; j < 4; ++j) meanwhile(j);
    }
  }

  // A finished tile to memory: by the copy engine, unless the chunk ends within it and the next
  // sequence's tokens follow.
  __device__ __forceinline__ void store(uint32_t tile, int i, int tid) const {
    if (!block.unclean(i)) {
      if (tid == 0) {
        store_box(&block.hopper.h, tile, block.start(i), block.column_of(opaque(group)) / 64, block.head,
                  block.batch);
        store_commit();
      }
      return;
    }
    const int len = block.length(i);
    const int column = block.column_of(group);
    if (column >= block.args.dhhv) return;
    for (int r = tid / 8; r < len; r += 16) {
      T* row = at<T>(block.args.h, block.batch, block.head, block.start(i) + r) + column;
      reinterpret_cast<uint4*>(row)[tid & 7] = load_shared_16(swizzled(tile, r, tid & 7));
    }
  }

  // Every query's numbers times its entry of a vector in the order of columns.
  __device__ __forceinline__ void scale_queries(float (&o)[32], uint32_t vector, int lane) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float4 w = load_shared_4(vector + (lane & 3) * 64 + j * 16);
      // A weight of zero forgets the state, NaN included.
#pragma unroll
      for (int x = 0; x < 8; ++x) {
        const float weight = x < 4 ? (x & 1 ? w.y : w.x) : (x & 1 ? w.w : w.z);
        o[8 * j + x] = weight == 0.0f ? 0.0f : o[8 * j + x] * weight;
      }
    }
  }

  // h of one chunk through shared memory, and N.
  __device__ __forceinline__ void put(const float (&o)[32], int i) const {
    const int tid = opaque(static_cast<int>(threadIdx.x % 128));
    const int lane = tid & 31, warp = tid >> 5;
    const bool writes_n = group == 0 && opaque(block.slab0) == 0 && block.args.n.data != nullptr &&
                          tid < block.length(i);
    const float n = writes_n ? load_shared(block.sums(i & 1) + tid * 4) : 0.0f;
    const uint32_t tile = block.output(group);
    const uint32_t den = block.den(i & 1);
    // All at once, which the stores between would prevent.
    float4 inv[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) inv[j] = load_shared_4(den + (lane & 3) * 64 + j * 16);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const float4 x = inv[j / 2];
      const uint32_t packed[4] = {pack_operand<T>(o[4 * j] * x.x, o[4 * j + 1] * x.y),
                                  pack_operand<T>(o[4 * j + 2] * x.x, o[4 * j + 3] * x.y),
                                  pack_operand<T>(o[4 * j + 4] * x.z, o[4 * j + 5] * x.w),
                                  pack_operand<T>(o[4 * j + 6] * x.z, o[4 * j + 7] * x.w)};
      store_matrices_transposed(
          swizzled(tile, j * 8 + (lane & 7) + (lane >> 4) * 8, warp * 2 + (lane >> 3 & 1)), packed);
    }
    async_proxy_fence();
    block.sync_group(group);
    store(tile, i, tid);
    // Not before the fence, which would wait for it.
    if (writes_n) at<float>(block.args.n, block.batch, block.head, block.start(i) + tid)[0] = n;
  }

  // Adds what the chunks before the segment's add to C, from the last one on, each by what is left of it: so
  // C need not decay, and products follow each other.
  __device__ __forceinline__ void catch_up(State& c) const {
    static_assert(!Shape::kSplit, "each warpgroup has all of k");
    const bool leader = threadIdx.x % 128 == 0;
    const int lane = threadIdx.x & 31;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5 & 3, 0);
    float factor = 1.0f;
    uint32_t a[2][4];
    // While the last tokens of a chunk are added, the first of the next are weighted.
    const auto weigh = [&](int stage, int j) {
      weighted_values<T>(a[j & 1], j, block.ahead_value(stage, group),
                         block.vectors(stage) + kInputAt, lane, warp, factor);
    };
    const auto begin = [&](int i) {
      barrier_wait(block.bar(kAheadFull, Shape::ahead_stage(i)), block.ahead_phase(i));
      weigh(Shape::ahead_stage(i), 0);
    };
    const auto finish = [&](int i) {
      if (leader) barrier_arrive(block.bar(kAheadEmpty, Shape::ahead_stage(i)));
    };
    int i = -block.before;
    if (i == 0) return;
    if (Shape::kLarge) {
      // A state given has been read from h's tiles.
      async_proxy_fence();
      named_sync<kStateBarrier, 128 * Shape::kWgs>();
      if (group == Shape::kWgs - 1) block.load_ahead(block.first_in_outputs(), warp);
    }
    begin(i);
    for (; i < 0 && factor != 0.0f; ++i) {
      const int stage = Shape::ahead_stage(i);
      const uint64_t keys = operand(block.ahead_key(stage), block.ahead_pitch(stage), 1024);
      const float g = load_shared(block.vectors(stage) + kDecayAt);
      pin<32 * Shape::kStateSlabs>(c);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j >= 2) wgmma_wait<1>();
        if (j > 0) weigh(stage, j);
        wgmma_fence();
        wgmma<1>(c, a[j & 1], keys + j * 128, true, T{});
        wgmma_commit();
      }
      factor *= g;
      wgmma_wait<1>();
      if (i + 1 < 0 && factor != 0.0f) begin(i + 1);
      wgmma_wait<0>();
      pin<32 * Shape::kStateSlabs>(c);
      finish(i);
    }
    for (; i < 0; ++i) {
      barrier_wait(block.bar(kAheadFull, Shape::ahead_stage(i)), block.ahead_phase(i));
      block.sync_group(group);
      finish(i);
    }
  }

  __device__ __forceinline__ void run() const {
    State c;
    block.first_state(c, group);
    if constexpr (Shape::kCatchUp) catch_up(c);
    const bool leader = threadIdx.x % 128 == 0;
    const int count = block.count;
    for (int i = 0; i < count; ++i) {
      const int stage = Shape::stage(i);
      const uint32_t phase = Shape::phase(i);
      const int lane = threadIdx.x & 31;
      const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5 & 3, 0);
      float o[32];
      barrier_wait(block.bar(kKeyFull, stage), phase);
      const float g = load_shared(block.vectors(stage) + kDecayAt);
      barrier_wait(block.bar(kQueryFull, stage), phase);
      // The last chunk's store must have read its tile before anyone writes the next.
      if (leader) store_wait_read();
      block.sync_group(group);
      barrier_wait(block.bar(kValueFull, stage), phase);
      if (block.unclean(i)) barrier_wait(block.bar(kClean, 0), 0);
      const uint32_t value = block.value(stage, group);
      const uint32_t vectors = block.vectors(stage);
      uint32_t a[4][4] = {};
      multiply(o, c, block.query(stage) + block.dim_of(group) / 64 * kTileBytes, g,
               [&](int j) {
                 // One after another, or the compiler would keep all products before it packs them: a
                 // number that it does not know to be 0.
                 const uint32_t after =
                     Shape::kTight && !Shape::kSplit && j > 0 ? a[j - 1][3] & block.args.parts_before : 0;
                 weighted_values<T>(a[j], j, value + after, vectors + kInputAt, lane, warp);
               });
      if (leader) barrier_arrive(block.bar(kQueryEmpty, stage));
      if (g == 0.0f) {
#pragma unroll
        for (int x = 0; x < 32 * Shape::kStateSlabs; ++x) c[x] = 0.0f;
      }

      scale_queries(o, vectors + kWeightAt, lane);
      const uint32_t keys = block.key(stage) + block.dim_of(group) / 64 * kKeyTileBytes;
      if (Shape::kSplit && group == 1) {
        give_outputs(o, i, block.exchange(), block.bar(kExchangeFull, 0), block.bar(kExchangeEmpty, 0));
        wgmma_fence();
        update_state<T, Shape>(c, a, keys);
        // All of the warpgroup has read the vectors and values, as the other knows after put.
        block.sync_group(group);
      } else {
        if (Shape::kSplit) {
          take_outputs(o, i, block.exchange(), block.bar(kExchangeFull, 0), block.bar(kExchangeEmpty, 0));
        }
        barrier_wait(block.bar(kScoreFull, i & 1), i >> 1 & 1);
        pin<32>(o);
        pin<32 * Shape::kStateSlabs>(c);
        wgmma_fence();
        uint64_t values = operand(value, kTileBytes, 1024);
        uint64_t scores = operand(block.score(i & 1), 16, 1024);
#pragma unroll
        for (int j = 0; j < 4; ++j) wgmma<1, 0>(o, values + j * 128, scores + 2 * j, true, T{});
        wgmma_commit();
        update_state<T, Shape>(c, a, keys);
        wgmma_wait<1>();
        pin<32>(o);
        put(o, i);
      }
      const bool loads = !Shape::kLoader && group == Shape::kWgs - 1;
      if (loads) block.load_queries(i + Shape::kStages, warp);
      wgmma_wait<0>();
      pin<32 * Shape::kStateSlabs>(c);
      block.release_key(stage, leader);
      if (leader) barrier_arrive(block.bar(kValueEmpty, stage));
      if (loads) block.load_keys(i + Shape::kStages, warp);
      if (!Shape::kSplit || group == 0) barrier_arrive(block.bar(kScoreEmpty, i & 1));
    }
    if (leader) store_wait_read();
    block.sync_group(group);
    block.last_state(c, group);
  }
};

template <typename T, typename Shape>
__device__ __forceinline__ void forward(const HopperArgs& hopper, unsigned char* smem) {
  Block<T, Shape> block(hopper, smem);
  block.prepare();
  const int group = __shfl_sync(0xffffffffu, threadIdx.x >> 7, 0);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5 & 3, 0);
  constexpr int kLoads = Shape::kLoader ? Shape::kWgs + 1 : 0;  // the warpgroup
  // Of the kernel before these loads need nothing, unless it finds the chunks.
  if (hopper.args.chunks != nullptr) wait_for_previous();
  block.locate();
  if (group == kLoads) {
    if constexpr (!Shape::kLoader) {
      block.load_first(warp);
    } else if (warp == 0 && elect_one()) {
      block.load_first();
    }
  }
  wait_for_previous();
  if (block.count == 0 && !block.ends) return;
  if (group == 0) {
    give_registers<Shape::kScoreRegisters>();
    if constexpr (!Shape::kLoader) block.load_first_vectors(warp);
    Scores<T, Shape>{block}.run();
  } else if (Shape::kLoader && group == Shape::kWgs + 1) {
    give_registers<Shape::kLoadRegisters>();
    if (warp == 0 && elect_one()) block.load_rest();
    if constexpr (Shape::kGated) {
      if (warp > 0) GateVectors<T, Shape>{block, warp - 1}.run();
    }
  } else {
    take_registers<Shape::kStateRegisters>();
    Outputs<T, Shape>{block, group - 1}.run();
  }
}

#define MLSTM_FORWARD_OF(NAME, T, ...)                                                \
  extern "C" __global__ void __launch_bounds__((__VA_ARGS__::kThreads), 1)            \
      NAME(const __grid_constant__ mlstm::HopperArgs args) {                          \
    extern __shared__ unsigned char smem[];                                           \
    mlstm::forward<T, __VA_ARGS__>(args, smem);                                       \
  }                                                                                   \
  MLSTM_GEOMETRY(NAME, (__VA_ARGS__::kDim), (__VA_ARGS__::kColumns), (__VA_ARGS__::kThreads), \
                 (__VA_ARGS__::kBytes))
#define MLSTM_FORWARD(NAME, T, SLABS, WGS) \
  MLSTM_FORWARD_OF(NAME, T, mlstm::HopperShape<SLABS, WGS, mlstm::Form::kPlain>)
#define MLSTM_GATED(NAME, T, SLABS, WGS) \
  MLSTM_FORWARD_OF(NAME, T, mlstm::HopperShape<SLABS, WGS, mlstm::Form::kGated>)
#define MLSTM_CATCH_UP(NAME, T, SLABS, WGS) \
  MLSTM_FORWARD_OF(NAME, T, mlstm::HopperShape<SLABS, WGS, mlstm::Form::kCatchUp>)

}  // namespace mlstm
