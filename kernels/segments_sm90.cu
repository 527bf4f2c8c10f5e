// States of the segments into which forward_sm90.cuh cuts long sequences: what each segment adds to
// the state, from zero.
#include "sweep_sm90.cuh"

namespace mlstm {
namespace {

// n and the product of g; and the loads.
template <typename T, typename Shape>
__device__ __forceinline__ void sum_segment(const Block<T, Shape>& block) {
  float n[2] = {};
  float decay = 1.0f;
  const bool first_warp = threadIdx.x < 32;
  if (first_warp) {
    for (int i = 0; i < 2; ++i) block.load_keys_ahead(i);
  }
  for (int i = 0; i < block.count; ++i) {
    const int stage = i & 1;
    const uint32_t phase = i >> 1 & 1;
    const float g = block.decay(i);
    decay *= g;
    const int len = block.length(i);
    barrier_wait(block.bar(kKeyFull, stage), phase);
    if (block.unclean(len)) block.clean(stage, phase, len);
    barrier_wait(block.bar(kNormalizerFull, stage), phase);
    block.add_normalizer(n, g, stage);
    __syncwarp();
    // The sums are overwritten two chunks on, when these keys have been replaced.
    if ((threadIdx.x & 31) == 0) barrier_arrive(block.bar(kKeyEmpty, stage));
    if (first_warp) block.load_keys_ahead(i + 2);
  }
  if (block.slice != 0) return;
  if (block.holds_normalizer()) {
    reinterpret_cast<float2*>(block.segment_normalizer(block.segment))[threadIdx.x] =
        make_float2(n[0], n[1]);
  }
  if (threadIdx.x == 0) block.args.segment_g[block.segment_index(block.segment)] = decay;
}

template <typename T, typename Shape>
__device__ __forceinline__ void add_segment(const Block<T, Shape>& block, int group) {
  float c[32 * Shape::kSlabs];
#pragma unroll
  for (int x = 0; x < 32 * Shape::kSlabs; ++x) c[x] = 0.0f;
  const bool leader = threadIdx.x % 128 == 0;
  for (int i = 0; i < block.count; ++i) {
    const int stage = i & 1;
    const uint32_t phase = i >> 1 & 1;
    const int lane = threadIdx.x & 31;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5 & 3, 0);
    const float g = block.decay(i);
    barrier_wait(block.bar(kKeyFull, stage), phase);
    barrier_wait(block.bar(kValueFull, stage), phase);
    const int len = block.length(i);
    if (block.unclean(len)) barrier_wait(block.bar(kClean, 0), 0);
    block.sum_keys(stage, group * 4 + warp);
    uint32_t a[4][4];
    weighted_values<T>(a, block.value(stage, group), block.vectors(stage) + kInputAt, lane, warp);
    block.decay_state(c, g);
    pin<32 * Shape::kSlabs>(c);
    wgmma_fence();
    update_state<T, Shape>(c, a, block.key(stage));
    wgmma_wait<0>();
    pin<32 * Shape::kSlabs>(c);
    // All of the warpgroup has read what it needed by ordinary loads.
    block.sync_group(group);
    if (leader) {
      barrier_arrive(block.bar(kKeyEmpty, stage));
      barrier_arrive(block.bar(kValueEmpty, stage));
    }
  }
  block.keep_segment(c, group);
}

template <typename T, typename Shape>
__device__ __forceinline__ void segment_states(const HopperArgs& hopper, unsigned char* smem) {
  const Block<T, Shape> block(hopper, smem);
  if (block.count == 0) return;
  block.prepare();
  const int group = __shfl_sync(0xffffffffu, threadIdx.x >> 7, 0);
  if (group == 0) {
    if constexpr (Shape::kUneven) give_registers<Shape::kScoreRegisters>();
    sum_segment(block);
  } else {
    if constexpr (Shape::kUneven) take_registers<Shape::kStateRegisters>();
    add_segment(block, group - 1);
  }
}

}  // namespace
}  // namespace mlstm

#define MLSTM_SEGMENTS(NAME, T, SLABS, WGS)                                                       \
  extern "C" __global__ void __launch_bounds__(128 * (WGS + 1), 1)                                \
      NAME(const __grid_constant__ mlstm::HopperArgs args) {                                      \
    extern __shared__ unsigned char smem[];                                                       \
    mlstm::segment_states<T, mlstm::HopperShape<SLABS, WGS>>(args, smem);                         \
  }                                                                                               \
  MLSTM_GEOMETRY(NAME, 64 * SLABS, 64 * WGS, 128 * (WGS + 1),                                     \
                 (mlstm::HopperShape<SLABS, WGS>::kBytes))
MLSTM_HOPPER_SHAPES(MLSTM_SEGMENTS, hopper_segments_bf16, mlstm::bf16)
MLSTM_HOPPER_SHAPES(MLSTM_SEGMENTS, hopper_segments_f16, mlstm::f16)
