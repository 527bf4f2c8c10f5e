// States of the segments into which forward_sm90.cuh cuts long sequences: what each segment adds to
// the state, from zero.
#include "overlap.cuh"
#include "sweep_sm90.cuh"

namespace mlstm {
namespace {

// n and the product of g; and the loads.
template <typename T, typename Shape>
__device__ __forceinline__ void sum_segment(const Block<T, Shape>& block) {
  // The slices of DHHV share the slabs of n out among them.
  const int slices = div_up(block.args.dhhv, Shape::kColumns);
  const int slice = block.slab0 * 64 / Shape::kColumns;
  float decay = 1.0f;
  block.template each_dim<Shape::kSlabs>(
      0, [&](int d, int, int) { block.put_normalizer(d, 0.0f, 0); });
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5 & 3, 0);
  for (int i = 0; i < Shape::kStages; ++i) block.load_keys(i, warp);
  const int count = block.count;
  for (int i = 0; i < count; ++i) {
    const int stage = Shape::stage(i);
    const uint32_t phase = Shape::phase(i);
    barrier_wait(block.bar(kKeyFull, stage), phase);
    if (block.unclean(i)) block.clean(i);
    for (int j = slice; j < Shape::kSlabs; j += slices) {
      float keys[1][4];
      block.sum_keys(keys, j, stage);
      block.add_keys(keys, j, stage, Shape::stage(i + 1));
    }
    decay *= load_shared(block.vectors(stage) + kDecayAt);
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(block.bar(kKeyEmpty, stage));
    block.load_keys(i + Shape::kStages, warp);
  }
  for (int j = slice; j < Shape::kSlabs; j += slices) {
    block.template each_dim<1>(j, [&](int d, int, int) {
      block.segment_normalizer(block.segment)[d] = load_shared(block.normalizer(d));
    });
  }
  if (threadIdx.x == 0 && slice == 0) {
    block.args.segment_g[block.segment_index(block.segment)] = decay;
  }
}

// C of one state warpgroup. While a chunk is added, the next one's values are weighted.
template <typename T, typename Shape>
struct Sum {
  const Block<T, Shape>& block;
  int group;

  using Weighted = uint32_t[4][4];

  __device__ __forceinline__ void weigh(Weighted& a, int i) const {
    const int stage = Shape::stage(i);
    const uint32_t phase = Shape::phase(i);
    barrier_wait(block.bar(kKeyFull, stage), phase);
    barrier_wait(block.bar(kValueFull, stage), phase);
    if (block.unclean(i)) barrier_wait(block.bar(kClean, 0), 0);
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5 & 3, 0);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      weighted_values<T>(a[j], j, block.value(stage, group), block.vectors(stage) + kInputAt,
                         threadIdx.x & 31, warp);
    }
  }

  __device__ __forceinline__ void add(typename Shape::State& c, Weighted& now, Weighted& next,
                                      int i, int count) const {
    const int stage = Shape::stage(i);
    block.decay_state(c, load_shared(block.vectors(stage) + kDecayAt));
    pin<32 * Shape::kSlabs>(c);
    wgmma_fence();
    update_state<T, Shape>(c, now, block.key(stage));
    if (i + 1 < count) weigh(next, i + 1);
    wgmma_wait<0>();
    pin<32 * Shape::kSlabs>(c);
    // All of the warpgroup has read what it needed by ordinary loads.
    block.sync_group(group);
    if (threadIdx.x % 128 == 0) {
      barrier_arrive(block.bar(kKeyEmpty, stage));
      barrier_arrive(block.bar(kValueEmpty, stage));
    }
  }

  __device__ __forceinline__ void run() const {
    typename Shape::State c;
#pragma unroll
    for (int x = 0; x < 32 * Shape::kSlabs; ++x) c[x] = 0.0f;
    const int count = block.count;
    Weighted even, odd;
    weigh(even, 0);
    for (int i = 0; i < count; i += 2) {
      add(c, even, odd, i, count);
      if (i + 1 < count) add(c, odd, even, i + 1, count);
    }
    block.keep_segment(c, group);
  }
};

template <typename T, typename Shape>
__device__ __forceinline__ void segment_states(const HopperArgs& hopper, unsigned char* smem) {
  start_dependents();
  Block<T, Shape> block(hopper, smem);
  block.prepare();
  wait_for_previous();
  block.locate();
  if (block.count == 0) return;
  const int group = __shfl_sync(0xffffffffu, threadIdx.x >> 7, 0);
  if (group == 0) {
    if constexpr (Shape::kUneven) give_registers<Shape::kScoreRegisters>();
    sum_segment(block);
  } else {
    if constexpr (Shape::kUneven) take_registers<Shape::kStateRegisters>();
    Sum<T, Shape>{block, group - 1}.run();
  }
}

}  // namespace
}  // namespace mlstm

#define MLSTM_SEGMENTS(NAME, T, SLABS, WGS)                                      \
  extern "C" __global__ void __launch_bounds__(128 * (WGS + 1), 1)               \
      NAME(const __grid_constant__ mlstm::HopperArgs args) {                     \
    extern __shared__ unsigned char smem[];                                      \
    mlstm::segment_states<T, mlstm::HopperShape<SLABS, WGS, false>>(args, smem); \
  }                                                                              \
  MLSTM_GEOMETRY(NAME, 64 * SLABS, 64 * WGS, 128 * (WGS + 1),                    \
                 (mlstm::HopperShape<SLABS, WGS, false>::kBytes))
MLSTM_HOPPER_SHAPES(MLSTM_SEGMENTS, hopper_segments_bf16, mlstm::bf16)
MLSTM_HOPPER_SHAPES(MLSTM_SEGMENTS, hopper_segments_f16, mlstm::f16)
