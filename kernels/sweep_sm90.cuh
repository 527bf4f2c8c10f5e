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

// DHQK up to 64 kSlabs. The state warpgroups hold 64 columns of DHHV each, or, where DHQK is too
// large for one's registers (kSplit), a half each of DHQK for the same 64 columns.
template <int kSlabs_, int kWgs_, bool kCatchUp_ = false>
struct HopperShape {
  static constexpr int kSlabs = kSlabs_;
  static constexpr int kWgs = kWgs_;
  // Whether blocks make the state before their segment themselves, from the sequence's first chunk on.
  static constexpr bool kCatchUp = kCatchUp_;
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
  // Chunks before the segment's have negative numbers.
  static constexpr int kTurns = kCatchUp ? 24 << 20 : 0;  // a multiple of 2 kStages
  static __device__ __forceinline__ int stage(int i) { return (i + kTurns) % kStages; }
  static __device__ __forceinline__ uint32_t phase(int i) { return (i + kTurns) / kStages & 1; }

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
  static constexpr int kDenAt = kVectorAt + kStages * kVectorStage;
  static constexpr int kSumAt = kDenAt + 2 * 256;
  static constexpr int kNormalizerAt = kSumAt + 2 * 256;
  static constexpr int kStabilizerAt = kNormalizerAt + kDim * 4;
  static constexpr int kBarrierAt = kStabilizerAt + 32;
  // Tiles are aligned to 1024 bytes, which dynamic shared memory need not be.
  static constexpr int kBytes = kBarrierAt + 384 + 1024;
};

// The shapes there are, as MACRO(name of the kernel, type, slabs, state warpgroups).
#define MLSTM_HOPPER_SHAPES(MACRO, NAME, T) \
  MACRO(NAME##_64x64, T, 1, 1)              \
  MACRO(NAME##_64x128, T, 1, 2)             \
  MACRO(NAME##_128x64, T, 2, 1)             \
  MACRO(NAME##_128x128, T, 2, 2)            \
  MACRO(NAME##_256x128, T, 4, 2)
#define MLSTM_HOPPER_SPLIT(MACRO, NAME, T) MACRO(NAME##_512x64, T, 8, 2)

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
};
// Named barriers: a state warpgroup's own are 1 + group.
constexpr int kScoreBarrier = 3;

// A 16-byte piece of a row in a tile of 128-byte rows.
__device__ __forceinline__ uint32_t swizzled(uint32_t tile, int row, int piece) {
  return tile + row * 128 + ((piece ^ (row & 7)) << 4);
}

// A (64 columns of DHHV as rows x 16 tokens, of 64) of a times v, for the update of the state.
template <typename T>
__device__ __forceinline__ void weighted_values(uint32_t (&a)[4], int j, uint32_t tile,
                                                uint32_t vector, int lane, int warp) {
  load_matrices_transposed(
      swizzled(tile, j * 16 + (lane & 7) + (lane >> 4) * 8, warp * 2 + (lane >> 3 & 1)), a);
  float4 x = load_shared_4(vector + (lane & 3) * 64 + j * 16);
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
  // fifth of a chunk's time.
  __device__ __forceinline__ int caught_up(int chunks, int segment) const {
    constexpr float kLeft = 0.8f;
    float length = 1.0f, upto = 0.0f, all = 0.0f;
    for (int j = 0; j < args.segments; ++j) {
      if (j < segment) upto += length;
      all += length;
      length *= kLeft;
    }
    return __float2int_rn(chunks * (upto / all));
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
      for (int stage = 0; stage < 4; ++stage) {
        barrier_init(bar(kQueryFull, stage), 1);
        barrier_init(bar(kQueryEmpty, stage), 1 + Shape::kWgs);
        barrier_init(bar(kKeyFull, stage), key_arrivals());
        barrier_init(bar(kKeyEmpty, stage), key_releases());
        barrier_init(bar(kValueFull, stage), 1);
        barrier_init(bar(kValueEmpty, stage), Shape::kWgs);
        barrier_init(bar(kScoreFull, stage), 128);
        barrier_init(bar(kScoreEmpty, stage), 128 * (Shape::kSplit ? 1 : Shape::kWgs));
        barrier_init(bar(kClean, stage), 128);
        barrier_init(bar(kExchangeFull, stage), 128);
        barrier_init(bar(kExchangeEmpty, stage), 128);
        barrier_init(bar(kStabilized, stage), 1);
      }
      barrier_init_fence();
    }
    for (int i = threadIdx.x; i < Shape::kStages * Shape::kSlabs * 256; i += Shape::kThreads) {
      store_shared(base + Shape::kKeyAt + i / 256 * kKeyTileBytes + kTileBytes + i % 256 * 4, 0u);
    }
    async_proxy_fence();
    __syncthreads();
  }

  // Whether a warp of the block makes the chunks' vectors from the gates; else they come from memory.
  __device__ __forceinline__ bool makes_vectors() const {
    return Shape::kLoader && args.packed == nullptr;
  }
  __device__ __forceinline__ int key_arrivals() const { return 1 + (makes_vectors() ? 32 : 0); }
  // Where a warp writes vectors anew each thread tells that it has read the last ones; else one for each
  // warp of the scores and one for each state warpgroup do.
  __device__ __forceinline__ int key_releases() const {
    return makes_vectors() ? 128 * (1 + Shape::kWgs) : 4 + Shape::kWgs;
  }

  // Puts the barriers of k and v in the phases they have where the first of the chunks before the
  // segment's is next, so that the segment's own find what they find without.
  __device__ __forceinline__ void turn_barriers() const {
    if (threadIdx.x == 0) {
      constexpr int kRound = 2 * Shape::kStages;
      for (int i = -((before + kRound - 1) / kRound * kRound); i < -before; ++i) {
        const int stage = Shape::stage(i);
        barrier_arrive(bar(kKeyFull, stage), key_arrivals());
        barrier_arrive(bar(kKeyEmpty, stage), key_releases());
        barrier_arrive(bar(kValueFull, stage), 1);
        barrier_arrive(bar(kValueEmpty, stage), Shape::kWgs);
      }
    }
    __syncthreads();
  }

  // By all threads that read a chunk's k or vectors, once they and their warpgroup's products have.
  __device__ __forceinline__ void release_key(int stage, bool leader) const {
    if (makes_vectors() || leader) barrier_arrive(bar(kKeyEmpty, stage));
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
    const int vectors = makes_vectors() ? 0 : kPackedFloats * 4;
    barrier_expect(bar(kKeyFull, Shape::stage(i)), Shape::kSlabs * kTileBytes + vectors);
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

  // All, for all chunks, by a warp.
  __device__ __forceinline__ void load_all() const {
    if (!elect_one()) return;
    for (int i = -before; i < count; ++i) {
      if (i >= 0) load_query(i);
      await_key(i);
      expect_key(i);
#pragma unroll
      for (int j = 0; j < Shape::kSlabs; ++j) load_key_slab(i, j);
      if (!makes_vectors()) load_vectors(i);
      load_value(i);
    }
  }

  // Or a part by each warp of a warpgroup that has more to do, for issuing takes long.
  __device__ __forceinline__ void load_keys(int i, int warp) const {
    if (i < count && elect_one()) {
      constexpr int kHalf = (Shape::kSlabs + 1) / 2;
      if (warp < 2) await_key(i);
      if (warp == 0) {
        expect_key(i);
#pragma unroll
        for (int j = 0; j < kHalf; ++j) load_key_slab(i, j);
      } else if (warp == 1) {
        load_vectors(i);
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
  // The same of two dims of a slab, from 2 lane on, on a lane's own.
  __device__ __forceinline__ void add_keys_of(float (&n)[2], int slab, int stage) const {
    const int lane = threadIdx.x & 31;
    const uint32_t keys = key(stage) + slab * kKeyTileBytes + (lane & 3) * 4;
    const uint32_t weights = vectors(stage) + kInputAt;
    const float g = load_shared(vectors(stage) + kDecayAt);
    float sum[2] = {};
#pragma unroll 4
    for (int place = 0; place < 64; place += 4) {
      // Where the order of columns has tokens t, t + 1, t + 8 and t + 9.
      const int t = (place >> 4) * 2 + (place & 15) / 4 * 16;
      const float4 a = load_shared_4(weights + place * 4);
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int y = t + (x & 1) + (x & 2) * 4;
        float first, second;
        unpack<T>(load_shared_word(keys + y * 128 + ((lane >> 2 ^ (y & 7)) << 4)), first, second);
        const float weight = (x & 2) == 0 ? ((x & 1) == 0 ? a.x : a.y) : ((x & 1) == 0 ? a.z : a.w);
        sum[0] += weight * first;
        sum[1] += weight * second;
      }
    }
#pragma unroll
    for (int x = 0; x < 2; ++x) n[x] = (g == 0.0f ? 0.0f : n[x] * g) + sum[x];
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

  __device__ __forceinline__ int segments_before() const { return Shape::kCatchUp ? 0 : segment; }
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
#pragma unroll 1
    for (int j = 0; j < segments_before(); ++j) add(segment_normalizer(j), segment_decay(j));
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
    const int thread = threadIdx.x % 128;
    const int column = column_of(group), row = (thread >> 5) * 16 + (thread >> 2 & 7);
    // By slabs, for the loads in flight take registers too.
#pragma unroll
    for (int slab = 0; slab < Shape::kStateSlabs; ++slab) {
      const int d = dim_of(group) + slab * 64;
      if (column >= args.dhhv || d >= args.dhqk) continue;
#pragma unroll 1
      for (int j = 0; j < segments_before(); ++j) {
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
