// A block of the Hopper forward: its place in the problem, its shared memory and barriers, and its loads.
// forward_sm90.cuh has the overview.
#pragma once

#include "forward_shape_sm90.cuh"

namespace mlstm {

template <typename T, typename Shape>
struct BlockTiles {
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

  __device__ __forceinline__ BlockTiles(const HopperArgs& from, unsigned char* smem)
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
};

}  // namespace mlstm
