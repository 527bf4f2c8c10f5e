// The chunkwise forward on Hopper: one pass along the chunks of a sequence with the state in
// registers. Formulas and buffers are those of params.cuh, with L = 64.
//
// A block owns 64 kWgs columns of DHHV of one sequence and head, over one segment of its chunks.
//   state warpgroups   each holds C transposed, 64 columns of DHHV as rows x all of DHQK, in float
//                      accumulators: they are the A operand of C^T q without leaving registers
//   score warpgroup    P = D * (q k^T), the denominators, and n
// Per chunk a state warpgroup does
//   O^T = C^T q^T          decays C meanwhile
//   O^T = w O^T + v^T P^T  waits for the score warpgroup's P
//   C^T += (a v)^T k       under which it scales O by 1/den and stores it
// q and n meet in the product q k^T: n, split in two numbers of the data's type (their sum has its
// digits), fills rows 64 and 65 of each k tile. Its new terms sum_y a_y k_y are summed on CUDA cores
// by the state warpgroups while they wait for P.
//
// Segments run side by side: segment_states (segments_sm90.cu) leaves the states that each one adds
// from zero, in the frame of its end, and a block puts together what the segments before its own
// leave behind.
#pragma once

#include "gatemath.cuh"
#include "sweep_sm90.cuh"

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

  // The score warpgroup's whole life.
  __device__ __forceinline__ void run() const {
    const Args& args = block.args;
    const bool normalize = (args.flags & kNormalize) != 0;
    const bool writes_n = block.slab0 == 0 && args.n.data != nullptr;
    float n[2];
    block.first_normalizer(n);
    block.put_normalizer(n, 0);
    async_proxy_fence();
    named_sync<kScoreBarrier, 128>();
    for (int i = 0; i < block.count; ++i) {
      const int stage = i & 1;
      const uint32_t phase = (i >> 1) & 1;
      const float g = block.decay(i);
      // Addresses are cheap to compute and dear to keep.
      const int lane = opaque(static_cast<int>(threadIdx.x & 31));
      const int warp = opaque(static_cast<int>(threadIdx.x >> 5 & 3));
      const int len = block.length(i);
      barrier_wait(block.bar(kQueryFull, stage), phase);
      barrier_wait(block.bar(kKeyFull, stage), phase);
      if (block.unclean(len)) block.clean(stage, phase, len);
      Product s;
      multiply(s, block.query(stage), block.key(stage));
      const uint32_t vectors = block.vectors(stage);
      const int r0 = warp * 16 + (lane >> 2);
      const float row0 = load_shared(vectors + kRowAt + r0 * 4);
      const float row1 = load_shared(vectors + kRowAt + (r0 + 8) * 4);
      float4 col[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        col[j] = load_shared_4(vectors + kColAt + (lane & 3) * 64 + j * 16);
      }
      wgmma_wait<0>();
      pin<36>(s);
      if (threadIdx.x % 128 == 0) barrier_arrive(block.bar(kQueryEmpty, stage));
      barrier_wait(block.bar(kScoreEmpty, stage), phase ^ 1);
      float sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint32_t packed[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int y = (j + half) * 8 + (lane & 3) * 2;
          const float u0 = half == 0 ? col[j / 2].x : col[j / 2].z;
          const float u1 = half == 0 ? col[j / 2].y : col[j / 2].w;
          float* x = s + 4 * (j + half);
          x[0] = y <= r0 ? x[0] * exp2_approx(row0 + u0) : 0.0f;
          x[1] = y + 1 <= r0 ? x[1] * exp2_approx(row0 + u1) : 0.0f;
          x[2] = y <= r0 + 8 ? x[2] * exp2_approx(row1 + u0) : 0.0f;
          x[3] = y + 1 <= r0 + 8 ? x[3] * exp2_approx(row1 + u1) : 0.0f;
          sum0 += x[0] + x[1];
          sum1 += x[2] + x[3];
          packed[2 * half] = pack_operand<T>(x[0], x[1]);
          packed[2 * half + 1] = pack_operand<T>(x[2], x[3]);
        }
        store_matrices(swizzled(block.score(stage), warp * 16 + (lane & 15), j + (lane >> 4)),
                       packed);
      }
      async_proxy_fence();
      barrier_arrive(block.bar(kScoreFull, stage));

      sum0 = quad_sum(sum0);
      sum1 = quad_sum(sum1);
      if ((lane & 3) < 2) {
        // Lane 0 of a quad sees row r0, lane 1 row r0 + 8; N's halves are in lane 0's registers.
        const int r = r0 + (lane & 1) * 8;
        const unsigned quads = 0x33333333u;
        float q_n = __shfl_sync(quads, s[32] + s[33], lane & ~1);
        float q_n8 = __shfl_sync(quads, s[34] + s[35], lane & ~1);
        const float w = load_shared(vectors + kWeightAt + column_order(r) * 4);
        const float before = (lane & 1) != 0 ? q_n8 : q_n;
        float sum = ((lane & 1) != 0 ? sum1 : sum0) + (w == 0.0f ? 0.0f : w * before);
        const float scale = static_cast<float>(args.qk_scale);
        sum *= scale;
        if (writes_n && r < len) at<float>(args.n, block.batch, block.head, block.start(i) + r)[0] = sum;
        const float floor = load_shared(vectors + kFloorAt + r * 4);
        float inv = reciprocal_approx(fmaxf(fabsf(sum), floor) + static_cast<float>(args.eps));
        store_shared(block.den(stage) + column_order(r) * 4, normalize ? scale * inv : scale);
      }
      __syncwarp();
      if (lane == 0) {
        barrier_arrive(block.bar(kDenFull, stage));
        barrier_arrive(block.bar(kKeyEmpty, stage));
      }

      // n after this chunk, for the product with the next one's queries.
      barrier_wait(block.bar(kNormalizerFull, stage), phase);
      block.add_normalizer(n, g, stage);
      block.put_normalizer(n, stage ^ 1);
      async_proxy_fence();
      named_sync<kScoreBarrier, 128>();
    }
    block.last_normalizer(n);
  }
};

template <typename T, typename Shape>
struct Outputs {
  const Block<T, Shape>& block;
  int group;  // which of the state warpgroups

  using State = float[32 * Shape::kSlabs];

  // O^T = C^T q^T, by half slabs: while one is multiplied, the next is packed and the last decayed.
  static __device__ __forceinline__ void multiply(float (&o)[32], State& c, uint32_t q, float g) {
    uint64_t b = operand(q, 16, 1024);
    uint32_t a[2][2][4];
    // Nothing is in flight here, but the compiler does not see as far as the last update's wait.
    wgmma_wait<0>();
    pin<32 * Shape::kSlabs>(c);
    pin<32>(o);
#pragma unroll
    for (int h = 0; h < 2 * Shape::kSlabs; ++h) {
      if (h >= 2) wgmma_wait<1>();
      pin<16>(c + 16 * h);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        a[h & 1][i / 4][i % 4] = pack_operand<T>(c[16 * h + 2 * i], c[16 * h + 2 * i + 1]);
      }
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        wgmma<0>(o, a[h & 1][i], b + (h / 2) * (kTileBytes / 16) + ((h & 1) * 2 + i) * 2,
                 h + i > 0, T{});
      }
      wgmma_commit();
      pin<16>(c + 16 * h);
      // Volatile, or the compiler would do all of it at the end.
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        asm volatile("mul.f32 %0, %0, %1;" : "+f"(c[16 * h + i]) : "f"(g));
      }
    }
    wgmma_wait<0>();
    pin<32>(o);
  }

  // Two state warpgroups do the first product in turns: one's tensor work beside the other's rest.
  __device__ __forceinline__ void take_turn(int i) const {
    if (Shape::kWgs == 1) {
      block.sync_group(group);
    } else if (group == 1) {
      named_sync<4, 256>();
    } else if (i > 0) {
      named_sync<5, 256>();
    }
  }
  __device__ __forceinline__ void pass_turn(int i) const {
    if (Shape::kWgs == 1) return;
    if (group == 0) {
      named_arrive<4, 256>();
    } else if (i + 1 < block.count) {
      named_arrive<5, 256>();
    }
  }

  // A finished tile to memory: by the copy engine, unless the chunk ends within it and the next
  // sequence's tokens follow.
  __device__ __forceinline__ void store(uint32_t tile, int i, int warp) const {
    const int len = block.length(i);
    if (!block.unclean(len)) {
      if (warp == 0 && (threadIdx.x & 31) == 0) {
        store_box(&block.hopper.h, tile, block.start(i), block.slab0 + group,
                  block.head, block.batch);
        store_commit();
      }
      return;
    }
    const int column = (block.slab0 + group) * 64;
    const int piece = threadIdx.x & 7;
    if (column >= block.args.dhhv) return;
    for (int r = threadIdx.x % 128 / 8; r < len; r += 16) {
      T* to = at<T>(block.args.h, block.batch, block.head, block.start(i) + r) + column;
      reinterpret_cast<uint4*>(to)[piece] = load_shared_16(swizzled(tile, r, piece));
    }
  }

  // Every query's numbers times its entry of a vector in the order of columns.
  __device__ __forceinline__ void scale_queries(float (&o)[32], uint32_t vector, int lane) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float4 w = load_shared_4(vector + (lane & 3) * 64 + j * 16);
      float* x = o + 8 * j;
      // A weight of zero forgets the state, NaN included.
      x[0] = w.x == 0.0f ? 0.0f : x[0] * w.x;
      x[1] = w.y == 0.0f ? 0.0f : x[1] * w.y;
      x[2] = w.x == 0.0f ? 0.0f : x[2] * w.x;
      x[3] = w.y == 0.0f ? 0.0f : x[3] * w.y;
      x[4] = w.z == 0.0f ? 0.0f : x[4] * w.z;
      x[5] = w.w == 0.0f ? 0.0f : x[5] * w.w;
      x[6] = w.z == 0.0f ? 0.0f : x[6] * w.z;
      x[7] = w.w == 0.0f ? 0.0f : x[7] * w.w;
    }
  }

  // h of one chunk through shared memory.
  __device__ __forceinline__ void put(const float (&o)[32], int i, int stage, int lane,
                                      int warp) const {
    const uint32_t tile = block.output(group);
    const uint32_t den = block.den(stage);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      float4 x = load_shared_4(den + (lane & 3) * 64 + j * 8);
      const uint32_t packed[4] = {pack_operand<T>(o[4 * j] * x.x, o[4 * j + 1] * x.y),
                                  pack_operand<T>(o[4 * j + 2] * x.x, o[4 * j + 3] * x.y),
                                  pack_operand<T>(o[4 * j + 4] * x.z, o[4 * j + 5] * x.w),
                                  pack_operand<T>(o[4 * j + 6] * x.z, o[4 * j + 7] * x.w)};
      store_matrices_transposed(
          swizzled(tile, j * 8 + (lane & 7) + (lane >> 4) * 8, warp * 2 + (lane >> 3 & 1)), packed);
    }
    async_proxy_fence();
    block.sync_group(group);
    store(tile, i, warp);
  }

  __device__ __forceinline__ void run() const {
    State c;
    block.first_state(c, group);
    const bool leader = threadIdx.x % 128 == 0;
    float g = block.decay(0);
    for (int i = 0; i < block.count; ++i) {
      const int stage = i & 1;
      const uint32_t phase = (i >> 1) & 1;
      const int lane = threadIdx.x & 31;
      const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5 & 3, 0);
      float o[32];
      const float g_next = block.decay(i + 1);
      barrier_wait(block.bar(kQueryFull, stage), phase);
      // The last chunk's store must have read its tile before anyone writes the next.
      if (leader) store_wait_read();
      take_turn(i);
      multiply(o, c, block.query(stage), g);
      pass_turn(i);
      if (leader) barrier_arrive(block.bar(kQueryEmpty, stage));
      if (g == 0.0f) {
#pragma unroll
        for (int x = 0; x < 32 * Shape::kSlabs; ++x) c[x] = 0.0f;
      }
      g = g_next;

      const uint32_t vectors = block.vectors(stage);
      barrier_wait(block.bar(kKeyFull, stage), phase);
      barrier_wait(block.bar(kValueFull, stage), phase);
      const int len = block.length(i);
      if (block.unclean(len)) barrier_wait(block.bar(kClean, 0), 0);
      block.sum_keys(stage, group * 4 + warp);
      scale_queries(o, vectors + kWeightAt, lane);
      uint32_t a[4][4];
      const uint32_t value = block.value(stage, group);
      weighted_values<T>(a, value, vectors + kInputAt, lane, warp);

      barrier_wait(block.bar(kScoreFull, stage), phase);
      pin<32>(o);
      pin<32 * Shape::kSlabs>(c);
      wgmma_fence();
      uint64_t values = operand(value, kTileBytes, 1024);
      uint64_t scores = operand(block.score(stage), 16, 1024);
#pragma unroll
      for (int j = 0; j < 4; ++j) wgmma<1, 0>(o, values + j * 128, scores + 2 * j, true, T{});
      wgmma_commit();
      update_state<T, Shape>(c, a, block.key(stage));
      wgmma_wait<1>();
      pin<32>(o);
      barrier_wait(block.bar(kDenFull, stage), phase);
      put(o, i, stage, lane, warp);
      if (leader) barrier_arrive(block.bar(kScoreEmpty, stage));
      if (group == Shape::kWgs - 1 && warp == 0) block.load_queries_ahead(i + 2);
      wgmma_wait<0>();
      pin<32 * Shape::kSlabs>(c);
      if (leader) {
        barrier_arrive(block.bar(kKeyEmpty, stage));
        barrier_arrive(block.bar(kValueEmpty, stage));
      }
      if (group == Shape::kWgs - 1 && warp == 0) block.load_keys_ahead(i + 2);
    }
    if (leader) store_wait();
    block.sync_group(group);
    block.last_state(c, group);
  }
};


template <typename T, typename Shape>
__device__ __forceinline__ void forward(const HopperArgs& hopper, unsigned char* smem) {
  const Block<T, Shape> block(hopper, smem);
  if (block.count == 0 && !block.ends) return;
  block.prepare();
  const int group = __shfl_sync(0xffffffffu, threadIdx.x >> 7, 0);
  if (group == 0) {
    if constexpr (Shape::kUneven) give_registers<Shape::kScoreRegisters>();
    if (threadIdx.x < 32) {
      for (int i = 0; i < 2; ++i) {
        block.load_queries_ahead(i);
        block.load_keys_ahead(i);
      }
    }
    Scores<T, Shape>{block}.run();
  } else {
    if constexpr (Shape::kUneven) take_registers<Shape::kStateRegisters>();
    Outputs<T, Shape>{block, group - 1}.run();
  }
}

#define MLSTM_FORWARD(NAME, T, SLABS, WGS)                                                        \
  extern "C" __global__ void __launch_bounds__(128 * (WGS + 1), 1)                                \
      NAME(const __grid_constant__ mlstm::HopperArgs args) {                                      \
    extern __shared__ unsigned char smem[];                                                       \
    mlstm::forward<T, mlstm::HopperShape<SLABS, WGS>>(args, smem);                                \
  }                                                                                               \
  MLSTM_GEOMETRY(NAME, 64 * SLABS, 64 * WGS, 128 * (WGS + 1),                                     \
                 (mlstm::HopperShape<SLABS, WGS>::kBytes))

}  // namespace mlstm
