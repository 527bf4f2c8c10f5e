// The Hopper forward's arguments, forms and sizes; forward_sm90.cuh has the overview.
#pragma once

#include "sweep_sm90.cuh"

namespace mlstm {

// Passed by value to the forward: copy descriptors of tensors as (64, S, slabs, NH, B) and of Args::packed,
// and what every kernel gets.
struct HopperArgs {
  TensorMap q, k, v, h, packed;
  Args args;
};

// Parts of a chunk's vectors in shared memory, byte offsets; params.cuh has their meaning. They
// start with the two rows of a, as a tile whose other rows do not matter.
constexpr int kWeightAt = kPackedVectors * 4;  // w, in the order of columns
constexpr int kRowAt = kWeightAt + 256;        // row
constexpr int kColAt = kRowAt + 256;           // col, in the order of columns
constexpr int kInputAt = kColAt + 256;         // a, in the order of columns
constexpr int kFloorAt = kInputAt + 256;       // floor
constexpr int kDecayAt = kPackedDecay * 4;     // g
constexpr int kVectorStage = 2048;
static_assert(kInputAt == kSourceAt && kDecayAt == kSweepDecayAt, "what segments' states need");

constexpr int kKeyTileBytes = 72 * 128;  // 64 tokens x 64 dims of 16 bits, and 8 rows more, for n

// How the forward comes by a chunk's vectors and by the state before a segment:
//   kPlain    vectors from memory, states from what the segments before add
//   kGated    vectors made on the way by warps of the block; one segment
//   kCatchUp  vectors from memory, the state made by the block, from the sequence's first chunk on
enum class Form { kPlain, kGated, kCatchUp };

// DHQK up to 64 kSlabs. The state warpgroups hold 64 columns of DHHV each, or, where DHQK is too
// large for one's registers (kSplit), a half each of DHQK for the same 64 columns.
template <int kSlabs_, int kWgs_, Form kForm>
struct HopperShape {
  static constexpr int kSlabs = kSlabs_;
  static constexpr int kWgs = kWgs_;
  static constexpr bool kCatchUp = kForm == Form::kCatchUp;
  static constexpr bool kGated = kForm == Form::kGated;
  static constexpr int kDim = 64 * kSlabs;
  static constexpr bool kSplit = kSlabs > 4;
  static constexpr int kColumns = 64 * (kSplit ? 1 : kWgs);  // of DHHV
  static constexpr int kStateSlabs = kSplit ? kSlabs / 2 : kSlabs;
  using State = float[32 * kStateSlabs];

  // Where a large state does not take their registers, a warpgroup of one warp for the loads alone and three
  // for the gates.
  static constexpr bool kLarge = kStateSlabs == 4;
  static constexpr bool kLoader = !kLarge;
  static constexpr int kThreads = 128 * (kWgs + (kLoader ? 2 : 1));
  static constexpr int kGateWarps = 3;
  static_assert(kLoader || !kGated, "warps for the gates");
  // All together are at most the pool: what the compiler gives to each thread, times all threads.
  static constexpr bool kTight = kSplit || (kLarge && kCatchUp);  // for the scores
  static constexpr int kStateRegisters = kTight ? 216 : kLarge ? 208 : kWgs == 1 ? 208 : 168;
  static constexpr int kScoreRegisters = kTight ? 72 : kLarge ? 88 : kWgs == 1 ? 168 : 120;
  static constexpr int kLoadRegisters = kWgs == 1 ? 112 : 56;
  static_assert(kWgs * kStateRegisters + kScoreRegisters + (kLoader ? kLoadRegisters : 0) <=
                kThreads / 128 * (65536 / kThreads / 8 * 8));

  // Chunks on their way: of large states there is room for two.
  static constexpr int kStages = kSplit ? 1 : (kSlabs == 4 ? 2 : 5 - kSlabs);
  static __device__ __forceinline__ int stage(int i) { return i % kStages; }
  static __device__ __forceinline__ uint32_t phase(int i) { return i / kStages & 1; }
  // Of those before the segment, whose numbers are negative: after the segment's own stages, q's tiles hold
  // k, and P's and h's v.
  static constexpr int kAhead = kLarge ? 2 * kStages : kStages;
  static constexpr int kTurns = 24 << 20;  // a multiple of kAhead
  static __device__ __forceinline__ int ahead_stage(int i) { return (i + kTurns) % kAhead; }

  // Arrivals that free a chunk's k and vectors: each thread's own where warps write vectors anew; else one of
  // each warp of the scores and one of each state warpgroup.
  static constexpr int kKeyReleases = kGated ? 128 * (1 + kWgs) : 4 + kWgs;

  static constexpr int kQueryBytes = kSlabs * kTileBytes;
  static constexpr int kKeyBytes = kSlabs * kKeyTileBytes;
  static constexpr int kValueBytes = kColumns / 64 * kTileBytes;

  static constexpr int kQueryAt = 0;
  static constexpr int kKeyAt = kQueryAt + kStages * kQueryBytes;
  static constexpr int kValueAt = kKeyAt + kStages * kKeyBytes;
  static constexpr int kScoreAt = kValueAt + kStages * kValueBytes;
  static constexpr int kOutputAt = kScoreAt + 2 * kTileBytes;
  // Partial outputs of the second half of DHQK, in float.
  static constexpr int kExchangeAt = kOutputAt + kWgs * kTileBytes;
  static constexpr int kVectorAt = kExchangeAt + (kSplit ? 2 * kTileBytes : 0);
  static constexpr int kDenAt = kVectorAt + (kCatchUp ? kAhead : kStages) * kVectorStage;
  static constexpr int kSumAt = kDenAt + 2 * 256;
  static constexpr int kNormalizerAt = kSumAt + 2 * 256;
  static constexpr int kStabilizerAt = kNormalizerAt + kDim * 4;
  static constexpr int kBarrierAt = kStabilizerAt + 32;
  // Tiles are aligned to 1024 bytes, which dynamic shared memory need not be.
  static constexpr int kBytes = kBarrierAt + 448 + 1024;
};

// The shapes there are, as MACRO(name of the kernel, type, slabs, state warpgroups).
#define MLSTM_SMALL_SHAPES(MACRO, NAME, T) \
  MACRO(NAME##_64x64, T, 1, 1)             \
  MACRO(NAME##_64x128, T, 1, 2)            \
  MACRO(NAME##_128x64, T, 2, 1)            \
  MACRO(NAME##_128x128, T, 2, 2)
#define MLSTM_LARGE_SHAPE(MACRO, NAME, T) MACRO(NAME##_256x128, T, 4, 2)
#define MLSTM_SPLIT_SHAPE(MACRO, NAME, T) MACRO(NAME##_512x64, T, 8, 2)

// Barriers, one for each stage; of the scores there are always two.
enum Barrier : int {
  kQueryFull,
  kQueryEmpty,
  kKeyFull,  // vectors too
  kKeyEmpty,
  kValueFull,
  kValueEmpty,
  kScoreFull,  // den and N's sums too
  kScoreEmpty,
  // Not by stage: only a sequence's last chunk needs the first, and there is one exchange.
  kClean,
  kExchangeFull,
  kExchangeEmpty,
  kStabilized,  // by warp
  // Chunks before the segment's: k, v and vectors.
  kAheadFull,
  kAheadEmpty,
};
// Named barriers: a state warpgroup's own are 1 + group.
constexpr int kStateBarrier = 4;  // all state warpgroups

// A (64 columns of DHHV as rows x 16 tokens, of 64) of a times v, for the update of the state.
template <typename T>
__device__ __forceinline__ void weighted_values(uint32_t (&a)[4], int j, uint32_t tile,
                                                uint32_t vector, int lane, int warp,
                                                float factor = 1.0f) {
  load_matrices_transposed(
      swizzled(tile, j * 16 + (lane & 7) + (lane >> 4) * 8, warp * 2 + (lane >> 3 & 1)), a);
  float4 x = load_shared_4(vector + (lane & 3) * 64 + j * 16);
  x = make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float first, second;
    unpack<T>(a[i], first, second);
    a[i] = pack_operand<T>(first * (i < 2 ? x.x : x.z), second * (i < 2 ? x.y : x.w));
  }
}

// C^T += (a v)^T k; left in flight.
template <typename T, typename Shape>
__device__ __forceinline__ void update_state(typename Shape::State& c, uint32_t (&a)[4][4],
                                             uint32_t key) {
  uint64_t keys = operand(key, kKeyTileBytes, 1024);
#pragma unroll
  for (int j = 0; j < 4; ++j) wgmma<1>(c, a[j], keys + j * 128, true, T{});
  wgmma_commit();
}

}  // namespace mlstm
