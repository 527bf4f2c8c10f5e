// What the Hopper kernels share: a block's place in the problem, its shared memory, barriers and
// loads, and how the state in registers starts, grows and ends. forward_sm90.cuh has the overview.
#pragma once

#include "params.cuh"
#include "ptx_sm90.cuh"
#include "tile.cuh"
#include "wgmma_sm90.cuh"

namespace mlstm {

// Passed by value to every Hopper kernel: copy descriptors of tensors as (64, S, slabs, NH, B) and of
// Args::packed, and what every kernel gets.
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

constexpr int kTileBytes = 64 * 128;     // 64 tokens x 64 dims of 16 bits
constexpr int kKeyTileBytes = 72 * 128;  // the same and 8 rows more, for n

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
  static constexpr int kScoreRegisters =
      kTight ? 72 : kLarge ? 88 : kWgs == 1 ? 168 : 120;
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
  static __device__ __forceinline__ int ahead_stage(int i) {
    return (i + kTurns) % kAhead;
  }

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
constexpr int kScoreBarrier = 3;
constexpr int kStateBarrier = 4;  // all state warpgroups

// A 16-byte piece of a row in a tile of 128-byte rows.
__device__ __forceinline__ uint32_t swizzled(uint32_t tile, int row, int piece) {
  return tile + row * 128 + ((piece ^ (row & 7)) << 4);
}

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

// Where two warpgroups hold halves of a state's columns, the second gives its part of a chunk's outputs
// (the i-th) through shared memory to the first, which adds it. All threads arrive at both barriers.
__device__ __forceinline__ void give_outputs(const float (&o)[32], int i, uint32_t exchange,
                                             uint32_t full, uint32_t empty) {
  barrier_wait(empty, (i & 1) ^ 1);
  const uint32_t to = exchange + threadIdx.x % 128 * 16;
#pragma unroll
  for (int x = 0; x < 8; ++x) {
    store_shared_4(to + x * 2048, o[4 * x], o[4 * x + 1], o[4 * x + 2], o[4 * x + 3]);
  }
  barrier_arrive(full);
}
__device__ __forceinline__ void take_outputs(float (&o)[32], int i, uint32_t exchange,
                                             uint32_t full, uint32_t empty) {
  barrier_wait(full, i & 1);
  const uint32_t from = exchange + threadIdx.x % 128 * 16;
#pragma unroll
  for (int x = 0; x < 8; ++x) {
    const float4 part = load_shared_4(from + x * 2048);
    o[4 * x] += part.x;
    o[4 * x + 1] += part.y;
    o[4 * x + 2] += part.z;
    o[4 * x + 3] += part.w;
  }
  barrier_arrive(empty);
}

template <typename T, typename Shape>
struct Block {
  const HopperArgs& hopper;
  const Args& args;
  uint32_t base;
  int row, head, batch;
  int slab0;  // first of the block's 64-column slabs of DHHV
  int segment;
  int count;      // chunks of the segment
  int before;     // chunks before them that the block takes for their effect on the state alone
  int64_t first;  // its first chunk
  int token0;     // and that one's first token, unless sequences are packed
  bool ends;      // the sequence ends with it

  __device__ __forceinline__ Block(const HopperArgs& from, unsigned char* smem)
      : hopper(from), args(from.args), base((shared_address(smem) + 1023) & ~1023u) {
    uint32_t id = blockIdx.x;
    const uint32_t slices = div_up(args.dhhv, Shape::kColumns);
    slab0 = static_cast<int>(id % slices) * (Shape::kColumns / 64);
    id /= slices;
    segment = id % args.segments;
    id /= args.segments;
    head = id % args.nh;
    row = id / args.nh;
    batch = batch_of(args, row);
  }

  // Its chunks, which the kernel before may have to find first.
  __device__ __forceinline__ void locate() {
    const int64_t begin = first_chunk(args, row);
    const int chunks = static_cast<int>(first_chunk(args, row + 1) - begin);
    const int per = chunks_per_segment(args, chunks);
    int from = min(segment * per, chunks);
    count = min(per, chunks - from);
    before = 0;
    if constexpr (Shape::kCatchUp) {
      from = caught_up(chunks, segment);
      count = caught_up(chunks, segment + 1) - from;
      before = count > 0 ? from : 0;
    }
    first = begin + from;
    token0 = from * 64;
    ends = chunks == 0 ? segment == 0 : count > 0 && from + count == chunks;
  }

  // Where a segment starts that catches up: later ones are shorter, since each chunk before them takes a
  // third of a chunk's time; src/dispatch.rs has the same.
  __device__ __forceinline__ int caught_up(int chunks, int segment) const {
    constexpr float kLeft = 2.0f / 3.0f;
    float length = 1.0f, upto = 0.0f, all = 0.0f;
    for (int j = 0; j < args.segments; ++j) {
      if (j < segment) upto += length;
      all += length;
      length *= kLeft;
    }
    return __float2int_rd(chunks * (upto / all) + 0.4f);
  }

  // Whether it writes what all slices of DHHV have alike; computed anew, for want of registers.
  __device__ __forceinline__ bool is_first_slice() const {
    return opaque(static_cast<int>(blockIdx.x)) % div_up(args.dhhv, Shape::kColumns) == 0;
  }

  // ---- shared memory

  __device__ __forceinline__ uint32_t query(int stage) const {
    return base + Shape::kQueryAt + stage * Shape::kQueryBytes;
  }
  __device__ __forceinline__ uint32_t key(int stage) const {
    return base + Shape::kKeyAt + stage * Shape::kKeyBytes;
  }
  __device__ __forceinline__ uint32_t value(int stage, int group) const {
    return base + Shape::kValueAt + stage * Shape::kValueBytes +
           (Shape::kSplit ? 0 : group * kTileBytes);
  }
  __device__ __forceinline__ uint32_t score(int stage) const {
    return base + Shape::kScoreAt + stage * kTileBytes;
  }
  __device__ __forceinline__ uint32_t output(int group) const {
    return base + Shape::kOutputAt + group * kTileBytes;
  }
  __device__ __forceinline__ uint32_t exchange() const { return base + Shape::kExchangeAt; }
  __device__ __forceinline__ uint32_t vectors(int stage) const {
    return base + Shape::kVectorAt + stage * kVectorStage;
  }
  __device__ __forceinline__ uint32_t den(int stage) const {
    return base + Shape::kDenAt + stage * 256;
  }
  __device__ __forceinline__ uint32_t sums(int stage) const {
    return base + Shape::kSumAt + stage * 256;
  }
  // m after a chunk, from one of the gates' warps to the next.
  __device__ __forceinline__ double* stabilizer(int warp) const {
    return static_cast<double*>(__cvta_shared_to_generic(base + Shape::kStabilizerAt)) + warp;
  }
  __device__ __forceinline__ uint32_t bar(Barrier which, int stage) const {
    return base + Shape::kBarrierAt + which * 32 + stage * 8;
  }

  // Barriers, and the rows for n in the k tiles: those never written must hold numbers.
  __device__ __forceinline__ void prepare() const {
    if (threadIdx.x == 0) {
      for (const TensorMap* map : {&hopper.q, &hopper.k, &hopper.v, &hopper.packed, &hopper.h}) {
        prefetch_map(map);
      }
      for (int stage = 0; stage < 4; ++stage) {
        barrier_init(bar(kQueryFull, stage), 1);
        barrier_init(bar(kQueryEmpty, stage), 1 + Shape::kWgs);
        barrier_init(bar(kKeyFull, stage), 1 + (Shape::kGated ? 32 : 0));
        barrier_init(bar(kKeyEmpty, stage), Shape::kKeyReleases);
        barrier_init(bar(kValueFull, stage), 1);
        barrier_init(bar(kValueEmpty, stage), Shape::kWgs);
        barrier_init(bar(kScoreFull, stage), 128);
        barrier_init(bar(kScoreEmpty, stage), 128 * (Shape::kSplit ? 1 : Shape::kWgs));
        barrier_init(bar(kClean, stage), 128);
        barrier_init(bar(kExchangeFull, stage), 128);
        barrier_init(bar(kExchangeEmpty, stage), 128);
        barrier_init(bar(kStabilized, stage), 1);
        barrier_init(bar(kAheadFull, stage), 1);
        barrier_init(bar(kAheadEmpty, stage), Shape::kSlabs + Shape::kWgs);
      }
      barrier_init_fence();
    }
    for (int i = threadIdx.x; i < Shape::kStages * Shape::kSlabs * 256; i += Shape::kThreads) {
      store_shared(base + Shape::kKeyAt + i / 256 * kKeyTileBytes + kTileBytes + i % 256 * 4, 0u);
    }
    async_proxy_fence();
    __syncthreads();
  }

  // By all threads that read a chunk's k or vectors, once they and their warpgroup's products have.
  __device__ __forceinline__ void release_key(int stage, bool leader) const {
    if (Shape::kGated || leader) barrier_arrive(bar(kKeyEmpty, stage));
  }

  // ---- chunks before the segment's, by negative numbers up to -1, in the order that they are taken

  // From the last one on.
  __device__ __forceinline__ int ahead_chunk(int i) const { return -1 - (i + before); }
  __device__ __forceinline__ uint32_t ahead_pitch(int stage) const {
    return stage < Shape::kStages ? kKeyTileBytes : kTileBytes;
  }
  __device__ __forceinline__ uint32_t ahead_key(int stage) const {
    return stage < Shape::kStages ? key(stage) : query(stage - Shape::kStages);
  }
  __device__ __forceinline__ uint32_t ahead_value(int stage, int group) const {
    if (stage < Shape::kStages) return value(stage, group);
    return stage == Shape::kAhead - 1 ? output(group) : score(group);
  }
  __device__ __forceinline__ uint32_t ahead_phase(int i) const {
    return (i + before) / Shape::kAhead & 1;
  }
  // Until the stage of the i-th load is free again of the one before it there. After the chunks before
  // the segment's come the segment's first: k, v and vectors, then q where stages are borrowed.
  __device__ __forceinline__ void await_ahead(int i) const {
    const int last = i - Shape::kAhead;
    if (last >= -before) {
      barrier_wait(bar(kAheadEmpty, Shape::ahead_stage(last)), ahead_phase(last));
    }
  }
  __device__ __forceinline__ void expect_ahead(int i) const {
    barrier_expect(bar(kAheadFull, Shape::ahead_stage(i)),
                   Shape::kSlabs * kTileBytes + kPackedFloats * 4 + Shape::kValueBytes);
  }
  __device__ __forceinline__ void load_ahead_slab(int i, int j) const {
    const int stage = Shape::ahead_stage(i);
    load_box(ahead_key(stage) + j * ahead_pitch(stage), &hopper.k, bar(kAheadFull, stage),
             start(ahead_chunk(i)), j, head, batch);
  }
  __device__ __forceinline__ void load_ahead_vectors(int i) const {
    const int stage = Shape::ahead_stage(i);
    load_row(vectors(stage), &hopper.packed, bar(kAheadFull, stage),
             static_cast<int>(chunk_index(args, first + ahead_chunk(i), head)));
  }
  __device__ __forceinline__ void load_ahead_value(int i) const {
    const int stage = Shape::ahead_stage(i);
    load_box(ahead_value(stage, 0), &hopper.v, bar(kAheadFull, stage), start(ahead_chunk(i)), slab0,
             head, batch);
  }
  // A part of the i-th load by each warp; vectors later, if they are not there yet.
  __device__ __forceinline__ void load_ahead(int i, int warp, bool vectors = true) const {
    if (i >= Shape::kStages) {
      if (warp == 3) await_ahead(i);
      load_queries(i - Shape::kStages, warp);
    } else if (i >= 0) {
      if (warp < 3) await_ahead(i);
      load_keys(i, warp, vectors);
    } else if (warp < 3 && elect_one()) {
      constexpr int kHalf = (Shape::kSlabs + 1) / 2;
      await_ahead(i);
      if (warp == 0) {
        expect_ahead(i);
#pragma unroll 1
        for (int j = 0; j < kHalf; ++j) load_ahead_slab(i, j);
      } else if (warp == 1) {
        if (vectors) load_ahead_vectors(i);
#pragma unroll 1
        for (int j = kHalf; j < Shape::kSlabs; ++j) load_ahead_slab(i, j);
      } else {
        load_ahead_value(i);
      }
    }
    __syncwarp();
  }

  // The first that takes h's tiles for v; a state given comes through them before.
  __device__ __forceinline__ int first_in_outputs() const {
    return -((before - 1) / Shape::kAhead * Shape::kAhead) - 1;
  }
  // What is left after them of the state before; by all lanes of a warp.
  __device__ __forceinline__ float ahead_decay() const {
    float left = 1.0f;
    for (int i = threadIdx.x & 31; i < before; i += 32) {
      left *= args.packed[chunk_index(args, first - 1 - i, head) * kPackedFloats + kPackedDecay];
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) left *= __shfl_xor_sync(0xffffffffu, left, lanes);
    return left;
  }

  // ---- chunks

  __device__ __forceinline__ int start(int i) const {
    return args.chunks != nullptr ? static_cast<int>(args.chunks[first + i].start)
                                  : token0 + i * 64;
  }
  __device__ __forceinline__ int length(int i) const {
    if (args.chunks != nullptr) return args.chunks[first + i].len;
    return min(static_cast<int>(args.s) - start(i), 64);
  }

  // Whether a chunk's tiles hold tokens of the next sequence as well, which must not count, not
  // even as 0 times NaN. (Beyond the end of the tensor tiles are zero.)
  __device__ __forceinline__ bool unclean(int i) const {
    return args.chunks != nullptr && length(i) < 64;
  }
  // By one warpgroup, which goes on at once; the others wait for kClean, phase 0: it happens once.
  __device__ __forceinline__ void clean(int i) const {
    const int stage = Shape::stage(i);
    const int len = length(i);
    barrier_wait(bar(kValueFull, stage), Shape::phase(i));
    const int words = (64 - len) * 32;
    for (int x = threadIdx.x % 128; x < words; x += 128) {
#pragma unroll 1
      for (int j = 0; j < Shape::kSlabs; ++j) {
        store_shared(key(stage) + j * kKeyTileBytes + len * 128 + x * 4, 0u);
      }
#pragma unroll 1
      for (int j = 0; j < Shape::kColumns / 64; ++j) {
        store_shared(value(stage, j) + len * 128 + x * 4, 0u);
      }
    }
    async_proxy_fence();
    named_sync<kScoreBarrier, 128>();
    barrier_arrive(bar(kClean, 0));
  }

  // ---- loads of the i-th chunk, by one thread each

  __device__ __forceinline__ void load_query(int i) const {
    const int stage = Shape::stage(i);
    barrier_wait(bar(kQueryEmpty, stage), Shape::phase(i) ^ 1);
    barrier_expect(bar(kQueryFull, stage), Shape::kQueryBytes);
    load_box(query(stage), &hopper.q, bar(kQueryFull, stage), start(i), 0, head, batch);
  }
  __device__ __forceinline__ void load_value(int i) const {
    const int stage = Shape::stage(i);
    barrier_wait(bar(kValueEmpty, stage), Shape::phase(i) ^ 1);
    barrier_expect(bar(kValueFull, stage), Shape::kValueBytes);
    load_box(value(stage, 0), &hopper.v, bar(kValueFull, stage), start(i), slab0, head, batch);
  }
  __device__ __forceinline__ void await_key(int i) const {
    barrier_wait(bar(kKeyEmpty, Shape::stage(i)), Shape::phase(i) ^ 1);
  }
  __device__ __forceinline__ void expect_key(int i) const {
    constexpr int kExpected = Shape::kSlabs * kTileBytes + (Shape::kGated ? 0 : kPackedFloats * 4);
    barrier_expect(bar(kKeyFull, Shape::stage(i)), kExpected);
  }
  __device__ __forceinline__ void load_key_slab(int i, int j) const {
    const int stage = Shape::stage(i);
    load_box(key(stage) + j * kKeyTileBytes, &hopper.k, bar(kKeyFull, stage), start(i), j, head,
             batch);
  }
  __device__ __forceinline__ void load_vectors(int i) const {
    const int stage = Shape::stage(i);
    load_row(vectors(stage), &hopper.packed, bar(kKeyFull, stage),
             static_cast<int>(chunk_index(args, first + i, head)));
  }

  // Vectors of a chunk, before the segment's or not.
  __device__ __forceinline__ void load_vectors_of(int i) const {
    if (Shape::kCatchUp && i < 0) {
      load_ahead_vectors(i);
    } else {
      load_vectors(i);
    }
  }

  // All, by one thread, of a chunk, before the segment's or not.
  __device__ __forceinline__ void load_tiles(int i, bool with_vectors) const {
    if (Shape::kCatchUp && i < Shape::kStages) await_ahead(i);
    if (Shape::kCatchUp && i < 0) {
      expect_ahead(i);
#pragma unroll
      for (int j = 0; j < Shape::kSlabs; ++j) load_ahead_slab(i, j);
      if (with_vectors) load_ahead_vectors(i);
      load_ahead_value(i);
    } else {
      await_key(i);
      expect_key(i);
#pragma unroll
      for (int j = 0; j < Shape::kSlabs; ++j) load_key_slab(i, j);
      if (with_vectors) load_vectors(i);
      load_value(i);
    }
  }
  // The chunks that fit at first; then their vectors, and all of the others.
  __device__ __forceinline__ void load_first() const {
    for (int i = 0; i < min(Shape::kStages, count); ++i) load_query(i);
    for (int i = -before; i < min(Shape::kStages - before, count); ++i) load_tiles(i, false);
  }
  __device__ __forceinline__ void load_rest() const {
    const int rest = min(Shape::kStages - before, count);
    if constexpr (!Shape::kGated) {
      for (int i = -before; i < rest; ++i) load_vectors_of(i);
    }
    for (int i = rest; i < count; ++i) {
      if (i >= Shape::kStages) load_query(i);
      load_tiles(i, !Shape::kGated);
    }
  }

  // Or a part by each warp of a warpgroup that has more to do, for issuing takes long.
  __device__ __forceinline__ void load_keys(int i, int warp, bool vectors = true) const {
    if (i < count && elect_one()) {
      constexpr int kHalf = (Shape::kSlabs + 1) / 2;
      if (warp < 2) await_key(i);
      if (warp == 0) {
        expect_key(i);
#pragma unroll
        for (int j = 0; j < kHalf; ++j) load_key_slab(i, j);
      } else if (warp == 1) {
        if (vectors) load_vectors(i);
#pragma unroll
        for (int j = kHalf; j < Shape::kSlabs; ++j) load_key_slab(i, j);
      } else if (warp == 2) {
        load_value(i);
      }
    }
    __syncwarp();
  }
  __device__ __forceinline__ void load_queries(int i, int warp) const {
    if (warp == 3 && i < count && elect_one()) load_query(i);
    __syncwarp();
  }

  // The chunks that fit at first, by those warps, and their vectors.
  __device__ __forceinline__ void load_first(int warp) const {
    if constexpr (Shape::kCatchUp) {
      each_first([&](int i) { load_ahead(i, warp, false); });
    } else {
      for (int i = 0; i < Shape::kStages; ++i) {
        load_queries(i, warp);
        load_keys(i, warp, false);
      }
    }
  }
  __device__ __forceinline__ void load_first_vectors(int warp) const {
    if (warp == 1 && elect_one()) {
      each_first([&](int i) {
        if (i < min(Shape::kStages, count)) load_vectors_of(i);
      });
    }
    __syncwarp();
  }
  template <typename F>
  __device__ __forceinline__ void each_first(F f) const {
    constexpr int kFirst = Shape::kCatchUp ? Shape::kAhead : Shape::kStages;
    for (int i = -before; i < kFirst - before; ++i) {
      // h's tiles are free only later.
      if (Shape::kCatchUp && i < 0 && i == first_in_outputs()) continue;
      f(i);
    }
  }

  // ---- n, by one warpgroup, in shared memory for want of registers: its threads with lane % 4 = 0
  // take two dims of each slab

  // Calls f(dim, j, half) for the thread's dims of `kCount` slabs from `first` on.
  template <int kCount, typename F>
  static __device__ __forceinline__ void each_dim(int first_slab, F f) {
    if ((threadIdx.x & 3) != 0) return;
    const int thread = opaque(static_cast<int>(threadIdx.x % 128));
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        f((first_slab + j) * 64 + (thread >> 5) * 16 + (thread >> 2 & 7) + half * 8, j, half);
      }
    }
  }
  __device__ __forceinline__ uint32_t normalizer(int d) const {
    return base + Shape::kNormalizerAt + d * 4;
  }

  // sum_y a_y k_y over some slabs as the product k^T a of the two parts of a; left in flight.
  template <int kCount>
  __device__ __forceinline__ void sum_keys(float (&sum)[kCount][4], int first_slab,
                                           int stage) const {
    const uint64_t weights = operand(vectors(stage), 16, 1024);
    const uint64_t keys = operand(key(stage) + first_slab * kKeyTileBytes, kKeyTileBytes, 1024);
    pin<4 * kCount>(sum[0]);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        wgmma<1, 0>(sum[j], keys + j * (kKeyTileBytes / 16) + i * 128, weights + i * 2, i > 0, T{});
      }
    }
    wgmma_commit();
  }
  // Waits for it and adds it, for the k tile of another stage.
  template <int kCount>
  __device__ __forceinline__ void add_keys(float (&sum)[kCount][4], int first_slab, int stage,
                                           int next) const {
    const float g = load_shared(vectors(stage) + kDecayAt);
    wgmma_wait<0>();
    pin<4 * kCount>(sum[0]);
    each_dim<kCount>(first_slab, [&](int d, int j, int half) {
      const float n = load_shared(normalizer(d));
      // Columns 0 and 1 are a's two parts; the others are of no use.
      put_normalizer(d, (g == 0.0f ? 0.0f : n * g) + (sum[j][2 * half] + sum[j][2 * half + 1]),
                     next);
    });
  }
  // The same before the segment, times a factor, of a slab, by a warp and without products, which would
  // starve between the state warpgroups' large ones: a lane has eight dims of every fourth token.
  __device__ __forceinline__ void add_keys_ahead(float (&sum)[8], int slab, int stage,
                                                 float factor) const {
    const int lane = threadIdx.x & 31, piece = lane & 7, offset = lane >> 3;
    const uint32_t keys = ahead_key(stage) + slab * ahead_pitch(stage) + offset * 128;
    const uint32_t weights = vectors(stage) + kInputAt;
#pragma unroll
    for (int y = 0; y < 64; y += 4) {
      const int token = y + offset;
      const float a = factor * load_shared(weights + column_order(token) * 4);
      const uint4 k = load_shared_16(keys + y * 128 + ((piece ^ (token & 7)) << 4));
      const uint32_t words[4] = {k.x, k.y, k.z, k.w};
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        float first, second;
        unpack<T>(words[x], first, second);
        sum[2 * x] += a * first;
        sum[2 * x + 1] += a * second;
      }
    }
  }
  // Those sums onto what is left of n, for the segment's first chunk.
  __device__ __forceinline__ void put_keys_ahead(float (&sum)[8], int slab, float left) const {
    const int lane = threadIdx.x & 31, d = slab * 64 + (lane & 7) * 8;
#pragma unroll
    for (int x = 0; x < 8; ++x) {
      sum[x] += __shfl_xor_sync(0xffffffffu, sum[x], 8);
      sum[x] += __shfl_xor_sync(0xffffffffu, sum[x], 16);
      if (lane >> 3 == x / 2) {
        const float given = left == 0.0f ? 0.0f : left * load_shared(normalizer(d + x));
        put_normalizer(d + x, given + sum[x], 0);
      }
    }
  }
  // n of a dim, and into a k tile as the sum of row 64 and row 65.
  __device__ __forceinline__ void put_normalizer(int d, float n, int stage) const {
    store_shared(normalizer(d), n);
    const uint32_t row = key(stage) + d / 64 * kKeyTileBytes + kTileBytes + d % 8 * 2;
    const int piece = d % 64 / 8;
    const T whole = from_acc<T>(n);
    store_shared(row + (piece << 4), whole);
    store_shared(row + 128 + ((piece ^ 1) << 4), from_acc<T>(n - to_acc(whole)));
  }

  // ---- states at the ends of the segment

  __device__ __forceinline__ int64_t segment_index(int j) const {
    return (static_cast<int64_t>(row) * args.nh + head) * (args.segments - 1) + j;
  }
  __device__ __forceinline__ const float* segment_normalizer(int j) const {
    return args.segment_n + segment_index(j) * args.dhqk;
  }
  __device__ __forceinline__ float segment_decay(int j) const {
    return args.segment_g[segment_index(j)];
  }

  // The initial state, then what the segments before this one make of it, unless the block does.
  __device__ __forceinline__ void first_normalizer() const {
    float n[Shape::kSlabs][2] = {};
    const auto add = [&](const float* from, float g) {
      // All in flight before the first is needed.
      each_dim<Shape::kSlabs>(0, [&](int d, int j, int half) {
        const float own = d < args.dhqk ? from[d] : 0.0f;
        n[j][half] = (g == 0.0f ? 0.0f : n[j][half] * g) + own;
      });
    };
    if (args.n_initial.data != nullptr) add(at<float>(args.n_initial, row, head, 0), 0.0f);
    if constexpr (!Shape::kCatchUp) {
#pragma unroll 1
      for (int j = 0; j < segment; ++j) add(segment_normalizer(j), segment_decay(j));
    }
    each_dim<Shape::kSlabs>(0, [&](int d, int j, int half) { put_normalizer(d, n[j][half], 0); });
  }
  __device__ __forceinline__ void last_normalizer() const {
    if (!ends || !is_first_slice() || args.n_last.data == nullptr) return;
#pragma unroll 1
    for (int slab = 0; slab < Shape::kSlabs; ++slab) {
      each_dim<1>(slab, [&](int d, int, int) {
        if (d < args.dhqk) at<float>(args.n_last, row, head, 0)[d] = load_shared(normalizer(d));
      });
    }
  }

  __device__ __forceinline__ void first_state(typename Shape::State& c, int group) const {
#pragma unroll
    for (int x = 0; x < 32 * Shape::kStateSlabs; ++x) c[x] = 0.0f;
    if (args.c_initial.data != nullptr) move_state<true>(c, args.c_initial, group);
    if constexpr (Shape::kCatchUp) {
      if (args.c_initial.data == nullptr) return;
      const float left = ahead_decay();
#pragma unroll
      for (int x = 0; x < 32 * Shape::kStateSlabs; ++x) c[x] = left == 0.0f ? 0.0f : c[x] * left;
      return;
    }
    const int thread = threadIdx.x % 128;
    const int column = column_of(group), row = (thread >> 5) * 16 + (thread >> 2 & 7);
    // By slabs, for the loads in flight take registers too.
#pragma unroll
    for (int slab = 0; slab < Shape::kStateSlabs; ++slab) {
      const int d = dim_of(group) + slab * 64;
      if (column >= args.dhhv || d >= args.dhqk) continue;
#pragma unroll 1
      for (int j = 0; j < segment; ++j) {
        const float g = segment_decay(j);
        const float* own = args.segment_c +
                           (segment_index(j) * args.dhqk + d + (thread & 3) * 2) * args.dhhv +
                           column + row;
        float add[32];
#pragma unroll
        for (int x = 0; x < 32; ++x) {
          add[x] = own[((x >> 2) * 8 + (x & 1)) * static_cast<int64_t>(args.dhhv) + (x & 2) * 4];
        }
#pragma unroll
        for (int x = 0; x < 32; ++x) {
          float& to = c[32 * slab + x];
          to = (g == 0.0f ? 0.0f : to * g) + add[x];
        }
      }
    }
  }
  __device__ __forceinline__ void last_state(typename Shape::State& c, int group) const {
    if (ends && args.c_last.data != nullptr) move_state<false>(c, args.c_last, group);
  }

  // A state warpgroup's first column of DHHV and first row of C.
  __device__ __forceinline__ int column_of(int group) const {
    return (slab0 + (Shape::kSplit ? 0 : group)) * 64;
  }
  static __device__ __forceinline__ int dim_of(int group) {
    return Shape::kSplit ? group * Shape::kDim / 2 : 0;
  }

  // Between a caller's C and registers, 32 rows of C at a time through the warpgroup's output tile.
  template <bool kIn>
  __device__ __forceinline__ void move_state(typename Shape::State& c, const Tensor& tensor,
                                             int group) const {
    if (args.state_dtype == kF32) {
      move_state_as<kIn, float>(c, tensor, group);
    } else if (args.state_dtype == kBf16) {
      move_state_as<kIn, bf16>(c, tensor, group);
    } else {
      move_state_as<kIn, f16>(c, tensor, group);
    }
  }
  template <bool kIn, typename S>
  __device__ __forceinline__ void move_state_as(typename Shape::State& c, const Tensor& tensor,
                                             int group) const {
#pragma unroll
    for (int h = 0; h < 2 * Shape::kStateSlabs; ++h) {
      // Computed anew each time: there are no registers to keep it in.
      const uint32_t tile = opaque(static_cast<int>(output(group)));
      const int tid = opaque(static_cast<int>(threadIdx.x % 128));
      const uint32_t own = tile + ((tid & 3) * 128 + (tid >> 5) * 16 + (tid >> 2 & 7)) * 4;
      const int column = column_of(group) + tid % 64;
      if constexpr (!kIn) {
#pragma unroll
        for (int x = 0; x < 16; ++x) {
          store_shared(own + (x / 4 * 512 + (x & 1) * 64 + (x >> 1 & 1) * 8) * 4, c[16 * h + x]);
        }
        sync_group(group);
      }
      const uint32_t element = tile + tid * 4;
      const int d = dim_of(group) + h * 32 + tid / 64;
      S* from = at<S>(tensor, row, head, d) + column;
      const int rows = column < args.dhhv ? args.dhqk - d : 0;
      if constexpr (kIn) {
        // All in flight before the first is needed.
        float x[16];
#pragma unroll
        for (int r = 0; r < 16; ++r) {
          x[r] = 2 * r < rows ? to_acc(from[2 * r * tensor.stride_s]) : 0.0f;
        }
#pragma unroll
        for (int r = 0; r < 16; ++r) store_shared(element + r * 512, x[r]);
      } else {
#pragma unroll
        for (int r = 0; r < 16; ++r) {
          const float x = load_shared(element + r * 512);
          if (2 * r < rows) from[2 * r * tensor.stride_s] = from_acc<S>(x);
        }
      }
      sync_group(group);
      if constexpr (kIn) {
#pragma unroll
        for (int x = 0; x < 16; ++x) {
          c[16 * h + x] = load_shared(own + (x / 4 * 512 + (x & 1) * 64 + (x >> 1 & 1) * 8) * 4);
        }
        sync_group(group);
      }
    }
  }

  // The 128 threads of a state warpgroup; barriers are named by constants.
  static __device__ __forceinline__ void sync_group(int group) {
    if (group == 0) {
      named_sync<1, 128>();
    } else {
      named_sync<2, 128>();
    }
  }
};

}  // namespace mlstm
