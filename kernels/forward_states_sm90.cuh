// How a block of the Hopper forward sums n, and how its states start and end. forward_sm90.cuh has the
// overview.
#pragma once

#include "forward_block_sm90.cuh"

namespace mlstm {

template <typename T, typename Shape>
struct Block : BlockTiles<T, Shape> {
  using Tiles = BlockTiles<T, Shape>;
  using Tiles::Tiles;
  using Tiles::args, Tiles::base, Tiles::row, Tiles::head, Tiles::slab0, Tiles::segment, Tiles::ends;
  using Tiles::key, Tiles::output, Tiles::vectors, Tiles::is_first_slice;
  using Tiles::ahead_decay, Tiles::ahead_key, Tiles::ahead_pitch;

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

  // The initial state, then what the segments before this one make of it, unless the block catches up.
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
