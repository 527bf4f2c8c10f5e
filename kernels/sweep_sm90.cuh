// What the Hopper kernels share: a block's place in the problem, its shared memory, barriers and
// loads, and how the state in registers starts, grows and ends. forward_sm90.cuh has the overview.
#pragma once

#include "params.cuh"
#include "ptx_sm90.cuh"
#include "tile.cuh"
#include "wgmma_sm90.cuh"

namespace mlstm {

// Passed by value to every Hopper kernel: copy descriptors of tensors as (64, S, slabs, NH, B), and
// what every kernel gets.
struct HopperArgs {
  TensorMap q, k, v, h;
  Args args;
};

// Parts of a chunk's vectors in shared memory, byte offsets; params.cuh has their meaning.
constexpr int kWeightAt = 0;    // w, in the order of columns
constexpr int kInputAt = 256;   // a, in the order of columns
constexpr int kRowAt = 512;     // row
constexpr int kColAt = 768;     // col, in the order of columns
constexpr int kFloorAt = 1024;  // floor
constexpr int kVectorBytes = kPackedVectors * 64 * 4;

constexpr int kTileBytes = 64 * 128;     // 64 tokens x 64 dims of 16 bits
constexpr int kKeyTileBytes = 72 * 128;  // the same and 8 rows more, for n

// DHQK up to 64 kSlabs; 64 kWgs of DHHV.
template <int kSlabs_, int kWgs_>
struct HopperShape {
  static constexpr int kSlabs = kSlabs_;
  static constexpr int kWgs = kWgs_;
  static constexpr int kDim = 64 * kSlabs;
  static constexpr int kThreads = 128 * (kWgs + 1);

  // The large state needs more registers than an even share; 216 x 2 + 72 is the whole pool.
  static constexpr bool kUneven = kSlabs == 4 && kWgs == 2;
  static constexpr int kStateRegisters = 216;
  static constexpr int kScoreRegisters = 72;

  // sum_keys: lanes per row of k (8 dims each), rows at once, and partial sums per dim.
  static constexpr int kRowLanes = 8 * kSlabs;
  static constexpr int kRowsAtOnce = 32 / kRowLanes;
  static constexpr int kRowsPerWarp = 16 / kWgs;
  static constexpr int kParts = 4 * kWgs * kRowsAtOnce;

  static constexpr int kQueryBytes = kSlabs * kTileBytes;
  static constexpr int kKeyBytes = kSlabs * kKeyTileBytes;
  static constexpr int kValueBytes = kWgs * kTileBytes;
  static constexpr int kPartBytes = kParts * kDim * 4;

  static constexpr int kQueryAt = 0;
  static constexpr int kKeyAt = kQueryAt + 2 * kQueryBytes;
  static constexpr int kValueAt = kKeyAt + 2 * kKeyBytes;
  static constexpr int kScoreAt = kValueAt + 2 * kValueBytes;
  static constexpr int kOutputAt = kScoreAt + 2 * kTileBytes;
  static constexpr int kVectorAt = kOutputAt + kWgs * kTileBytes;
  static constexpr int kPartAt = kVectorAt + 2 * kVectorBytes;
  static constexpr int kDenAt = kPartAt + 2 * kPartBytes;
  static constexpr int kBarrierAt = kDenAt + 2 * 256;
  // Tiles are aligned to 1024 bytes, which dynamic shared memory need not be.
  static constexpr int kBytes = kBarrierAt + 256 + 1024;
};

// The shapes there are, as MACRO(name of the kernel, type, slabs, state warpgroups).
#define MLSTM_HOPPER_SHAPES(MACRO, NAME, T) \
  MACRO(NAME##_64x64, T, 1, 1)              \
  MACRO(NAME##_64x128, T, 1, 2)             \
  MACRO(NAME##_128x64, T, 2, 1)             \
  MACRO(NAME##_128x128, T, 2, 2)            \
  MACRO(NAME##_256x128, T, 4, 2)

// Barriers, two stages each.
enum Barrier : int {
  kQueryFull,
  kQueryEmpty,
  kKeyFull,  // vectors too
  kKeyEmpty,
  kValueFull,
  kValueEmpty,
  kScoreFull,
  kScoreEmpty,
  kDenFull,
  kNormalizerFull,
  kClean,  // not by stage: only a sequence's last chunk needs it
  kBarriers,
};
// Named barriers: a state warpgroup's own are 1 + group, their turns 4 and 5.
constexpr int kScoreBarrier = 3;

// A 16-byte piece of a row in a tile of 128-byte rows.
__device__ __forceinline__ uint32_t swizzled(uint32_t tile, int row, int piece) {
  return tile + row * 128 + ((piece ^ (row & 7)) << 4);
}

// A (64 columns of DHHV as rows x 64 tokens) of a times v, for the update of the state.
template <typename T>
__device__ __forceinline__ void weighted_values(uint32_t (&a)[4][4], uint32_t tile, uint32_t vector,
                                                int lane, int warp) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    load_matrices_transposed(
        swizzled(tile, j * 16 + (lane & 7) + (lane >> 4) * 8, warp * 2 + (lane >> 3 & 1)), a[j]);
    float4 x = load_shared_4(vector + (lane & 3) * 64 + j * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float first, second;
      unpack<T>(a[j][i], first, second);
      a[j][i] = pack_operand<T>(first * (i < 2 ? x.x : x.z), second * (i < 2 ? x.y : x.w));
    }
  }
}

// C^T += (a v)^T k; left in flight.
template <typename T, typename Shape>
__device__ __forceinline__ void update_state(float (&c)[32 * Shape::kSlabs], uint32_t (&a)[4][4],
                                             uint32_t key) {
  uint64_t keys = operand(key, kKeyTileBytes, 1024);
#pragma unroll
  for (int j = 0; j < 4; ++j) wgmma<1>(c, a[j], keys + j * 128, true, T{});
  wgmma_commit();
}

template <typename T, typename Shape>
struct Block {
  const HopperArgs& hopper;
  const Args& args;
  uint32_t base;
  int row, head, batch;
  int slab0;     // first of the block's 64-column slabs of DHHV
  int slice;     // slab0 / kWgs
  int segment;
  int count;     // chunks of the segment
  int64_t first; // its first chunk
  int token0;    // and that one's first token, unless sequences are packed
  bool ends;     // the sequence ends with it

  __device__ __forceinline__ Block(const HopperArgs& from, unsigned char* smem)
      : hopper(from), args(from.args), base((shared_address(smem) + 1023) & ~1023u) {
    uint32_t id = blockIdx.x;
    const uint32_t slices = div_up(args.dhhv, 64 * Shape::kWgs);
    slice = id % slices;
    slab0 = slice * Shape::kWgs;
    id /= slices;
    // The kernel of the segments' own states leaves out the last one.
    segment = id % args.segment_grid;
    id /= args.segment_grid;
    head = id % args.nh;
    row = id / args.nh;
    batch = batch_of(args, row);
    const int64_t begin = first_chunk(args, row);
    const int64_t chunks = first_chunk(args, row + 1) - begin;
    const int64_t per = (chunks + args.segments - 1) / args.segments;
    const int64_t from_chunk = min(segment * per, chunks);
    count = static_cast<int>(min(per, chunks - from_chunk));
    first = begin + from_chunk;
    token0 = static_cast<int>(from_chunk * 64);
    ends = chunks == 0 ? segment == 0 : count > 0 && from_chunk + count == chunks;
  }

  // ---- shared memory

  __device__ __forceinline__ uint32_t query(int stage) const {
    return base + Shape::kQueryAt + stage * Shape::kQueryBytes;
  }
  __device__ __forceinline__ uint32_t key(int stage) const {
    return base + Shape::kKeyAt + stage * Shape::kKeyBytes;
  }
  __device__ __forceinline__ uint32_t value(int stage, int group) const {
    return base + Shape::kValueAt + stage * Shape::kValueBytes + group * kTileBytes;
  }
  __device__ __forceinline__ uint32_t score(int stage) const {
    return base + Shape::kScoreAt + stage * kTileBytes;
  }
  __device__ __forceinline__ uint32_t output(int group) const {
    return base + Shape::kOutputAt + group * kTileBytes;
  }
  __device__ __forceinline__ uint32_t vectors(int stage) const {
    return base + Shape::kVectorAt + stage * kVectorBytes;
  }
  __device__ __forceinline__ uint32_t parts(int stage) const {
    return base + Shape::kPartAt + stage * Shape::kPartBytes;
  }
  __device__ __forceinline__ uint32_t den(int stage) const {
    return base + Shape::kDenAt + stage * 256;
  }
  __device__ __forceinline__ uint32_t bar(Barrier which, int stage) const {
    return base + Shape::kBarrierAt + which * 16 + stage * 8;
  }

  // Barriers, and the rows of n in the k tiles: those it never writes must hold numbers.
  __device__ __forceinline__ void prepare() const {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < 2; ++stage) {
        barrier_init(bar(kQueryFull, stage), 1);
        barrier_init(bar(kQueryEmpty, stage), 1 + Shape::kWgs);
        barrier_init(bar(kKeyFull, stage), 1);
        barrier_init(bar(kKeyEmpty, stage), 4 + Shape::kWgs);
        barrier_init(bar(kValueFull, stage), 1);
        barrier_init(bar(kValueEmpty, stage), Shape::kWgs);
        barrier_init(bar(kScoreFull, stage), 128);
        barrier_init(bar(kScoreEmpty, stage), Shape::kWgs);
        barrier_init(bar(kDenFull, stage), 4);
        barrier_init(bar(kNormalizerFull, stage), 4 * Shape::kWgs);
        barrier_init(bar(kClean, stage), 128);
      }
      barrier_init_fence();
    }
    for (int i = threadIdx.x; i < 2 * Shape::kSlabs * 256; i += Shape::kThreads) {
      store_shared(base + Shape::kKeyAt + i / 256 * kKeyTileBytes + kTileBytes + i % 256 * 4, 0u);
    }
    async_proxy_fence();
    __syncthreads();
  }

  // ---- chunks

  __device__ __forceinline__ float decay(int i) const {
    return i < count ? __ldg(static_cast<const float*>(args.g) + chunk_index(args, first + i, head))
                     : 0.0f;
  }
  __device__ __forceinline__ int start(int i) const {
    return args.chunks != nullptr ? static_cast<int>(args.chunks[first + i].start) : token0 + i * 64;
  }
  __device__ __forceinline__ int length(int i) const {
    if (args.chunks != nullptr) return args.chunks[first + i].len;
    return min(static_cast<int>(args.s) - start(i), 64);
  }

  // Whether the tiles of a chunk of `len` tokens hold those of the next sequence as well, which
  // must not count, not even as 0 times NaN. (Beyond the end of the tensor tiles are zero.)
  __device__ __forceinline__ bool unclean(int len) const {
    return args.chunks != nullptr && len < 64;
  }
  // By one warpgroup, which goes on at once; the others wait for kClean, phase 0: it happens once.
  __device__ __forceinline__ void clean(int stage, uint32_t phase, int len) const {
    barrier_wait(bar(kValueFull, stage), phase);
    const int words = (64 - len) * 32;
    for (int i = threadIdx.x % 128; i < words; i += 128) {
#pragma unroll 1
      for (int j = 0; j < Shape::kSlabs; ++j) {
        store_shared(key(stage) + j * kKeyTileBytes + len * 128 + i * 4, 0u);
      }
#pragma unroll 1
      for (int j = 0; j < Shape::kWgs; ++j) {
        store_shared(value(stage, j) + len * 128 + i * 4, 0u);
      }
    }
    async_proxy_fence();
    named_sync<kScoreBarrier, 128>();
    barrier_arrive(bar(kClean, 0));
  }

  // ---- loads, by one thread

  __device__ __forceinline__ void load_queries(int i) const {
    const int stage = i & 1;
    barrier_wait(bar(kQueryEmpty, stage), (i >> 1 & 1) ^ 1);
    barrier_expect(bar(kQueryFull, stage), Shape::kQueryBytes);
    load_box(query(stage), &hopper.q, bar(kQueryFull, stage), start(i), 0, head, batch);
  }
  __device__ __forceinline__ void load_keys(int i) const {
    const int stage = i & 1;
    const uint32_t parity = (i >> 1 & 1) ^ 1;
    const int token = start(i);
    barrier_wait(bar(kKeyEmpty, stage), parity);
    barrier_expect(bar(kKeyFull, stage), Shape::kSlabs * kTileBytes + kVectorBytes);
#pragma unroll
    for (int j = 0; j < Shape::kSlabs; ++j) {
      load_box(key(stage) + j * kKeyTileBytes, &hopper.k, bar(kKeyFull, stage), token, j, head, batch);
    }
    load_bytes(vectors(stage),
               args.packed + chunk_index(args, first + i, head) * (kPackedVectors * 64),
               kVectorBytes, bar(kKeyFull, stage));
    barrier_wait(bar(kValueEmpty, stage), parity);
    barrier_expect(bar(kValueFull, stage), Shape::kValueBytes);
    load_box(value(stage, 0), &hopper.v, bar(kValueFull, stage), token, slab0, head, batch);
  }

  // By one warp.
  __device__ __forceinline__ void load_queries_ahead(int i) const {
    if (i < count && elect_one()) load_queries(i);
    __syncwarp();
  }
  __device__ __forceinline__ void load_keys_ahead(int i) const {
    if (i < count && elect_one()) load_keys(i);
    __syncwarp();
  }

  // ---- n

  // This warp's share of sum_y a_y k_y: rows 'share' of the k tile to its own rows of parts().
  __device__ __forceinline__ void sum_keys(int stage, int share) const {
    const int lane = opaque(static_cast<int>(threadIdx.x & 31));
    const int in_row = lane / Shape::kRowLanes, piece = lane % Shape::kRowLanes;
    const uint32_t keys = key(stage) + (piece >> 3) * kKeyTileBytes;
    const uint32_t weights = vectors(stage) + kInputAt;
    constexpr int kPasses = Shape::kRowsPerWarp / Shape::kRowsAtOnce;
    constexpr int kBatch = kPasses < 4 ? kPasses : 4;
    float sum[8] = {};
#pragma unroll
    for (int pass = 0; pass < kPasses; pass += kBatch) {
      uint4 k[kBatch];
      float a[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int t = share * Shape::kRowsPerWarp + (pass + j) * Shape::kRowsAtOnce + in_row;
        k[j] = load_shared_16(swizzled(keys, t, piece & 7));
        a[j] = load_shared(weights + column_order(t) * 4);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const uint32_t words[4] = {k[j].x, k[j].y, k[j].z, k[j].w};
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          float first_of_two, second_of_two;
          unpack<T>(words[x], first_of_two, second_of_two);
          sum[2 * x] += a[j] * first_of_two;
          sum[2 * x + 1] += a[j] * second_of_two;
        }
      }
    }
    const uint32_t to = parts(stage) +
                        ((share * Shape::kRowsAtOnce + in_row) * Shape::kDim + piece * 8) * 4;
    store_shared_4(to, sum[0], sum[1], sum[2], sum[3]);
    store_shared_4(to + 16, sum[4], sum[5], sum[6], sum[7]);
    __syncwarp();
    if (lane == 0) barrier_arrive(bar(kNormalizerFull, stage));
  }

  // The thread's two dims of n: 2 t and 2 t + 1 of the score warpgroup's thread t.
  __device__ __forceinline__ bool holds_normalizer() const {
    return threadIdx.x % 128 < Shape::kDim / 2;
  }
  __device__ __forceinline__ void add_normalizer(float (&n)[2], float g, int stage) const {
    if (!holds_normalizer()) return;
    float2 sum = make_float2(0.0f, 0.0f);
    const uint32_t from = parts(stage) + threadIdx.x % 128 * 8;
#pragma unroll
    for (int j = 0; j < Shape::kParts; ++j) {
      float2 x = load_shared_2(from + j * Shape::kDim * 4);
      sum.x += x.x;
      sum.y += x.y;
    }
    n[0] = (g == 0.0f ? 0.0f : n[0] * g) + sum.x;
    n[1] = (g == 0.0f ? 0.0f : n[1] * g) + sum.y;
  }
  // n into a k tile, as the sum of row 64 and row 65.
  __device__ __forceinline__ void put_normalizer(const float (&n)[2], int stage) const {
    if (!holds_normalizer()) return;
    const int t = threadIdx.x % 128;
    const uint32_t rows = key(stage) + (t >> 5) * kKeyTileBytes + kTileBytes;
    const int piece = (t & 31) >> 2;
    const uint32_t whole = pack_operand<T>(n[0], n[1]);
    float first_of_two, second_of_two;
    unpack<T>(whole, first_of_two, second_of_two);
    store_shared(rows + (piece << 4) + (t & 3) * 4, whole);
    store_shared(rows + 128 + ((piece ^ 1) << 4) + (t & 3) * 4,
                 pack_operand<T>(n[0] - first_of_two, n[1] - second_of_two));
  }

  // ---- states at the ends of the segment

  __device__ __forceinline__ int64_t segment_index(int j) const {
    return (static_cast<int64_t>(row) * args.nh + head) * (args.segments - 1) + j;
  }
  __device__ __forceinline__ float4* segment_state(int j, int group) const {
    const int64_t groups = div_up(args.dhhv, 64 * Shape::kWgs) * Shape::kWgs;
    return reinterpret_cast<float4*>(args.segment_c) +
           (segment_index(j) * groups + slab0 + group) * (16 * Shape::kDim) + threadIdx.x % 128;
  }
  __device__ __forceinline__ float* segment_normalizer(int j) const {
    return args.segment_n + segment_index(j) * Shape::kDim;
  }
  __device__ __forceinline__ float segment_decay(int j) const {
    return args.segment_g[segment_index(j)];
  }

  // The initial state, then what the segments before this one make of it.
  __device__ __forceinline__ void first_normalizer(float (&n)[2]) const {
    n[0] = n[1] = 0.0f;
    if (!holds_normalizer()) return;
    const int d = threadIdx.x % 128 * 2;
    if (args.n_initial.data != nullptr) {
      const float* from = at<float>(args.n_initial, row, head, 0) + d;
      if (d < args.dhqk) n[0] = from[0];
      if (d + 1 < args.dhqk) n[1] = from[1];
    }
    for (int j = 0; j < segment; ++j) {
      const float g = segment_decay(j);
      const float2 own = reinterpret_cast<const float2*>(segment_normalizer(j))[d / 2];
      n[0] = (g == 0.0f ? 0.0f : n[0] * g) + own.x;
      n[1] = (g == 0.0f ? 0.0f : n[1] * g) + own.y;
    }
  }
  __device__ __forceinline__ void last_normalizer(const float (&n)[2]) const {
    if (!ends || slice != 0 || args.n_last.data == nullptr || !holds_normalizer()) return;
    const int d = threadIdx.x % 128 * 2;
    float* to = at<float>(args.n_last, row, head, 0) + d;
    if (d < args.dhqk) to[0] = n[0];
    if (d + 1 < args.dhqk) to[1] = n[1];
  }

  __device__ __forceinline__ void first_state(float (&c)[32 * Shape::kSlabs], int group) const {
#pragma unroll
    for (int x = 0; x < 32 * Shape::kSlabs; ++x) c[x] = 0.0f;
    if (args.c_initial.data != nullptr) move_state<true>(c, args.c_initial, group);
    // By parts, for the loads in flight take registers too.
#pragma unroll
    for (int h = 0; h < 2 * Shape::kSlabs; ++h) {
#pragma unroll 1
      for (int j = 0; j < segment; ++j) {
        const float g = segment_decay(j);
        const float4* own = segment_state(j, group) + h * 512;
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          const float4 add = own[x * 128];
          float* to = c + 16 * h + 4 * x;
          to[0] = (g == 0.0f ? 0.0f : to[0] * g) + add.x;
          to[1] = (g == 0.0f ? 0.0f : to[1] * g) + add.y;
          to[2] = (g == 0.0f ? 0.0f : to[2] * g) + add.z;
          to[3] = (g == 0.0f ? 0.0f : to[3] * g) + add.w;
        }
      }
    }
  }
  // In place, which the compiler would not do by itself. A decay of zero forgets, NaN included.
  static __device__ __forceinline__ void decay_state(float (&c)[32 * Shape::kSlabs], float g) {
#pragma unroll
    for (int x = 0; x < 32 * Shape::kSlabs; ++x) {
      asm volatile("mul.f32 %0, %0, %1;" : "+f"(c[x]) : "f"(g));
    }
    if (g == 0.0f) {
#pragma unroll
      for (int x = 0; x < 32 * Shape::kSlabs; ++x) c[x] = 0.0f;
    }
  }
  __device__ __forceinline__ void last_state(float (&c)[32 * Shape::kSlabs], int group) const {
    if (ends && args.c_last.data != nullptr) move_state<false>(c, args.c_last, group);
  }
  __device__ __forceinline__ void keep_segment(const float (&c)[32 * Shape::kSlabs],
                                               int group) const {
    float4* to = segment_state(segment, group);
#pragma unroll
    for (int x = 0; x < 8 * Shape::kSlabs; ++x) {
      to[x * 128] = make_float4(c[4 * x], c[4 * x + 1], c[4 * x + 2], c[4 * x + 3]);
    }
  }

  // Between a caller's C and registers, 32 rows of C at a time through the warpgroup's output tile.
  template <bool kIn>
  __device__ __forceinline__ void move_state(float (&c)[32 * Shape::kSlabs], const Tensor& tensor,
                                             int group) const {
#pragma unroll
    for (int h = 0; h < 2 * Shape::kSlabs; ++h) {
      // Computed anew each time: there are no registers to keep it in.
      const uint32_t tile = opaque(static_cast<int>(output(group)));
      const int tid = opaque(static_cast<int>(threadIdx.x % 128));
      const uint32_t own = tile + ((tid & 3) * 128 + (tid >> 5) * 16 + (tid >> 2 & 7)) * 4;
      const int column = (slab0 + group) * 64 + tid % 64;
      const int64_t origin = row * tensor.stride_b + head * tensor.stride_h + column;
      if constexpr (!kIn) {
#pragma unroll
        for (int x = 0; x < 16; ++x) {
          store_shared(own + (x / 4 * 512 + (x & 1) * 64 + (x >> 1 & 1) * 8) * 4, c[16 * h + x]);
        }
        sync_group(group);
      }
#pragma unroll 1
      for (int r = tid / 64; r < 32; r += 2) {
        const int d = h * 32 + r;
        const uint32_t element = tile + (r * 64 + tid % 64) * 4;
        const int64_t index = origin + d * tensor.stride_s;
        const bool inside = d < args.dhqk && column < args.dhhv;
        if constexpr (kIn) {
          store_shared(element,
                       inside ? load_any<float>(tensor.data, index, args.state_dtype) : 0.0f);
        } else if (inside) {
          store_any<float>(tensor.data, index, args.state_dtype, load_shared(element));
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
