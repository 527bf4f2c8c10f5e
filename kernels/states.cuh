// The recurrence over chunks: a block keeps a kM x kN tile of the state in registers, walks the
// chunks of one sequence in order, stores the state before each, and adds
//   forward:  C <- g C + sum_y a_y k_y v_y^T,               n <- g n + sum_y a_y k_y
//   reverse:  dC <- g dC + sum_x w_x s inv_x q_x dh_x^T,    dn <- g dn + sum_x w_x delta_x q_x
// The weight is applied to v (dh) in the accumulator type and rounded once; n is summed from
// unrounded weights. The reverse also takes the inner products E of dC with the stored C.
#pragma once

#include "tile.cuh"

namespace mlstm {

// kM x kN state tile, kWarpsM x kWarpsN warps, kTokens per step, kStages of loads in flight.
template <typename T, int kM_, int kN_, int kWarpsM_, int kWarpsN_, int kTokens_, int kStages_>
struct StatesShape {
  static constexpr int kM = kM_, kN = kN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kTokens = kTokens_, kStages = kStages_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kKeyBytes = kTokens * kM * static_cast<int>(sizeof(T));
  static constexpr int kValueBytes = kTokens * kN * static_cast<int>(sizeof(T));
  static constexpr int kVectorBytes = (3 * kTokens + 16) * static_cast<int>(sizeof(Acc<T>));
  static constexpr int kStage = kKeyBytes + kValueBytes + kVectorBytes;
  static constexpr int kGroups = kThreads / (kM / 2);  // token groups of the n sum
  static constexpr int kScratch = (kGroups * kM + 32) * static_cast<int>(sizeof(Acc<T>));
  // 8 rows of each warp's tile on their way out.
  static constexpr int kRowBytes = kN / kWarpsN * static_cast<int>(sizeof(T));
  static constexpr int kOutBytes = kWarpsM * kWarpsN * 8 * kRowBytes;
  static constexpr int kBytes = kStages * kStage + kScratch + kOutBytes;
  // The reverse also stages the tile of C for E.
  static constexpr int kReverseBytes = kBytes + kM * kN * static_cast<int>(sizeof(T));
};

// What every thread knows but seldom needs: kept in shared memory to save registers.
struct Cold {
  int64_t first, last;  // the sequence's chunks
  int row, head, batch, m0, n0, tile_index, tiles, dhqk_p, dhhv_p;
};

// Position in a sequence: token tile `tile` of its i-th chunk in the order of the sweep.
struct Cursor {
  int i, tile, len;
  int64_t start;
};

template <typename T, typename Shape, bool kReverse, bool kFast>
struct States {
  using A = Acc<T>;
  static constexpr int kMt = Shape::kM / Shape::kWarpsM / 16, kNt = Shape::kN / Shape::kWarpsN / 8;

  const Args& args;
  unsigned char* smem;
  uint32_t base;
  int warp_m, warp_n;
  A acc[kMt][kNt][4];
  A n_part[2];

  // [kGroups][kM] partial sums of n, then a sum per warp, then Cold.
  __device__ __forceinline__ A* scratch() const {
    return reinterpret_cast<A*>(smem + Shape::kStages * Shape::kStage);
  }
  __device__ __forceinline__ Cold& cold() const {
    return *reinterpret_cast<Cold*>(scratch() + Shape::kGroups * Shape::kM + 16);
  }
  __device__ __forceinline__ static int thread() { return opaque(static_cast<int>(threadIdx.x)); }
  // Thread's part of the n sum: two rows of the tile, a share of the tokens.
  __device__ __forceinline__ static int pair() { return thread() % (Shape::kM / 2); }
  __device__ __forceinline__ static int group() { return thread() / (Shape::kM / 2); }
  __device__ __forceinline__ int lane_row(int m, int half) const {
    return cold().m0 + warp_m + m * 16 + half * 8 + ((thread() & 31) >> 2);
  }
  __device__ __forceinline__ int lane_col() const {
    return cold().n0 + warp_n + 2 * (thread() & 3);
  }
  __device__ __forceinline__ int64_t chunk_of(const Cursor& cursor) const {
    return kReverse ? cold().last - 1 - cursor.i : cold().first + cursor.i;
  }
  __device__ __forceinline__ bool done(const Cursor& cursor) const {
    return cursor.i >= static_cast<int>(cold().last - cold().first);
  }
  __device__ __forceinline__ void enter(Cursor& cursor) const {
    if (done(cursor)) return;
    if (args.chunks != nullptr) {
      Chunk chunk = args.chunks[chunk_of(cursor)];
      cursor.len = chunk.len;
      cursor.start = chunk.start;
    } else {
      cursor.start = (chunk_of(cursor) - cold().first) * args.chunk_len;
      int64_t left = args.s - cursor.start;
      cursor.len = static_cast<int>(left < args.chunk_len ? left : args.chunk_len);
    }
  }
  __device__ __forceinline__ void advance(Cursor& cursor) const {
    if (++cursor.tile * Shape::kTokens < cursor.len) return;
    cursor.tile = 0;
    ++cursor.i;
    enter(cursor);
  }

  // A caller's state as the starting point; zero where absent.
  __device__ __forceinline__ void read(const Tensor& c, const Tensor& n) {
    const Cold& own = cold();
#pragma unroll
    for (int m = 0; m < kMt; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int d = lane_row(m, half), col = lane_col();
        int64_t index = own.row * c.stride_b + own.head * c.stride_h + d * c.stride_s + col;
#pragma unroll
        for (int i = 0; i < kNt; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            int x = i * 8 + e;
            bool inside = c.data != nullptr && d < args.dhqk && col + x < args.dhhv;
            acc[m][i][2 * half + e] =
                inside ? load_any<A>(c.data, index + x, args.state_dtype) : A(0);
          }
        }
      }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      int d = own.m0 + 2 * pair() + e;
      bool inside = n.data != nullptr && group() == 0 && d < args.dhqk;
      n_part[e] = inside ? at<A>(n, own.row, own.head, 0)[d] : A(0);
    }
  }

  __device__ __forceinline__ void write(const Tensor& c, const Tensor& n, const A* n_sum) {
    const Cold& own = cold();
    if (c.data == nullptr) return;
#pragma unroll
    for (int m = 0; m < kMt; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int d = lane_row(m, half), col = lane_col();
        int64_t index = own.row * c.stride_b + own.head * c.stride_h + d * c.stride_s + col;
#pragma unroll
        for (int i = 0; i < kNt; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            int x = i * 8 + e;
            if (d < args.dhqk && col + x < args.dhhv) {
              A value = opaque(acc[m][i][2 * half + e]);
              store_any<A>(c.data, index + x, args.state_dtype, value);
            }
          }
        }
      }
    }
    int d = own.m0 + threadIdx.x;
    if (own.n0 == 0 && threadIdx.x < Shape::kM && d < args.dhqk) {
      at<A>(n, own.row, own.head, 0)[d] = n_sum[threadIdx.x];
    }
  }

  __device__ __forceinline__ uint32_t forward_tile() const {
    return base + Shape::kBytes;  // the last part
  }

  // The reverse's next tile of C, to be met by store() of the same slot.
  __device__ __forceinline__ void prefetch(int64_t c) {
    const Cold& own = cold();
    const T* c_state = static_cast<const T*>(args.c_states) +
                       slot_index(args, c, own.row, own.head) * own.dhqk_p * own.dhhv_p;
    load_tile<T, Shape::kM, Shape::kN, Shape::kThreads>(
        forward_tile(), c_state + static_cast<int64_t>(own.m0) * own.dhhv_p + own.n0, own.dhhv_p,
        own.dhqk_p - own.m0, own.dhhv_p - own.n0, true);
  }

  // Stores the state in slot `c` (before chunk c, or after the last). The reverse writes E to *e.
  // On return the first kM entries of scratch() hold n.
  __device__ __forceinline__ void store(int64_t c, A* e) {
    const Cold& own = cold();
    int64_t slot = slot_index(args, c, own.row, own.head);
    T* out =
        static_cast<T*>(kReverse ? args.dc_states : args.c_states) + slot * own.dhqk_p * own.dhhv_p;
    A product = A(0);
    const int lane = thread() & 31, g = lane >> 2, t = lane & 3;
    constexpr int kPieces = Shape::kRowBytes / 16, kVec = 16 / sizeof(T);
    const uint32_t rows = base + Shape::kStages * Shape::kStage + Shape::kScratch +
                          (threadIdx.x >> 5) * 8 * Shape::kRowBytes;
#pragma unroll
    for (int m = 0; m < kMt; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < kNt; ++i) {
          A u = opaque(acc[m][i][2 * half]), v = opaque(acc[m][i][2 * half + 1]);
          int byte = (i * 8 + 2 * t) * static_cast<int>(sizeof(T));
          if constexpr (kReverse) {
            A x, y;
            unpack<T>(
                lds_two<T>(tile_address<T>(forward_tile(), Shape::kM,
                                           warp_m + m * 16 + half * 8 + g, warp_n + i * 8 + 2 * t)),
                x, y);
            product += u * x + v * y;
          }
          sts_two(rows + g * Shape::kRowBytes + (((byte >> 4) ^ (g & (kPieces - 1))) << 4) +
                      (byte & 15),
                  pack<T>(u, v));
        }
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 8 * kPieces; j += 32) {
          int r = (lane + j) / kPieces, piece = (lane + j) % kPieces;
          int d = own.m0 + warp_m + m * 16 + half * 8 + r, col = own.n0 + warp_n + piece * kVec;
          uint4 value = lds_16(rows + r * Shape::kRowBytes + ((piece ^ (r & (kPieces - 1))) << 4));
          if (d < own.dhqk_p && col < own.dhhv_p) {
            *reinterpret_cast<uint4*>(out + static_cast<int64_t>(d) * own.dhhv_p + col) = value;
          }
        }
        __syncwarp();
      }
    }
    A* n_sum = scratch();
    if (own.n0 == 0) {
      n_sum[group() * Shape::kM + 2 * pair()] = n_part[0];
      n_sum[group() * Shape::kM + 2 * pair() + 1] = n_part[1];
      __syncthreads();
      int d = own.m0 + threadIdx.x;
      A sum = A(0);
      if (threadIdx.x < Shape::kM) {
#pragma unroll
        for (int i = 0; i < Shape::kGroups; ++i) sum += n_sum[i * Shape::kM + threadIdx.x];
        n_sum[threadIdx.x] = sum;
        if (d < own.dhqk_p) {
          A* n_state = static_cast<A*>(kReverse ? args.dn_states : args.n_states);
          n_state[slot * own.dhqk_p + d] = sum;
          if constexpr (kReverse) {
            product += sum * static_cast<const A*>(args.n_states)[slot * own.dhqk_p + d];
          }
        }
      }
    }
    if constexpr (kReverse) {
      A* sums = scratch() + Shape::kGroups * Shape::kM;
      product = warp_sum(product);
      if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = product;
      __syncthreads();
      if (threadIdx.x == 0) {
        A sum = A(0);
#pragma unroll
        for (int i = 0; i < Shape::kThreads / 32; ++i) sum += sums[i];
        *e = sum;
      }
    }
  }

  __device__ __forceinline__ void issue(const Cursor& cursor, int stage) {
    const Cold& own = cold();
    const Tensor& key = kReverse ? args.q : args.k;
    const Tensor& value = kReverse ? args.dh : args.v;
    int t0 = cursor.tile * Shape::kTokens;
    int left = cursor.len - t0;
    int64_t start = cursor.start + t0;
    uint32_t at_stage = base + stage * Shape::kStage;
    load_tile<T, Shape::kTokens, Shape::kM, Shape::kThreads>(
        at_stage, at<T>(key, own.batch, own.head, start) + own.m0, key.stride_s, left,
        args.dhqk - own.m0, args.vector_ok);
    load_tile<T, Shape::kTokens, Shape::kN, Shape::kThreads>(
        at_stage + Shape::kKeyBytes, at<T>(value, own.batch, own.head, start) + own.n0,
        value.stride_s, left, args.dhhv - own.n0, args.vector_ok);
    uint32_t vectors = at_stage + Shape::kKeyBytes + Shape::kValueBytes;
    int64_t token = token_index(args, own.batch, own.head, start);
    int i = threadIdx.x;
    if (i < Shape::kTokens) {
      bool inside = i < left;
      if (!inside) token -= i;  // stay within the vectors
      uint32_t dst = vectors + i * static_cast<int>(sizeof(A));
      constexpr int kLine = Shape::kTokens * static_cast<int>(sizeof(A));
      copy_one(dst, static_cast<const A*>(kReverse ? args.w : args.a) + token + i, inside);
      if constexpr (kReverse) {
        copy_one(dst + kLine, static_cast<const A*>(args.inv) + token + i, inside);
        copy_one(dst + 2 * kLine, static_cast<const A*>(args.delta) + token + i, inside);
      }
    }
    if (i == Shape::kThreads - 1) {
      copy_one(vectors + 3 * Shape::kTokens * static_cast<int>(sizeof(A)),
               static_cast<const A*>(args.g) + chunk_index(args, chunk_of(cursor), own.head), true);
    }
  }

  __device__ __forceinline__ const A* stage_vectors(int stage) const {
    return reinterpret_cast<const A*>(smem + stage * Shape::kStage + Shape::kKeyBytes +
                                      Shape::kValueBytes);
  }

  __device__ __forceinline__ void decay(A g) {
    const bool forget = g == A(0);
#pragma unroll
    for (int m = 0; m < kMt; ++m) {
#pragma unroll
      for (int i = 0; i < kNt; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[m][i][e] = forget ? A(0) : acc[m][i][e] * g;
      }
    }
    n_part[0] = forget ? A(0) : n_part[0] * g;
    n_part[1] = forget ? A(0) : n_part[1] * g;
  }

  __device__ __forceinline__ void accumulate(int stage) {
    const Cold& own = cold();
    const A* vector = stage_vectors(stage);
    const A scale = static_cast<A>(args.qk_scale);
    uint32_t keys = base + stage * Shape::kStage, values = keys + Shape::kKeyBytes;
    const int lane = thread() & 31, t = lane & 3;
    constexpr int kUnrolled = kUnroll<T>;
#pragma unroll kUnrolled
    for (int k = 0; k < Shape::kTokens; k += 16) {
      A w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        int token = k + 2 * t + (j & 1) + (j >> 1) * 8;
        w[j] = vector[token];
        if constexpr (kReverse) w[j] *= vector[Shape::kTokens + token] * scale;
      }
      FragA<T> a[kMt];
#pragma unroll
      for (int m = 0; m < kMt; ++m) {
        load_a<T, true>(a[m], lane, keys, Shape::kTokens, warp_m + m * 16, k);
      }
#pragma unroll
      for (int i = 0; i < kNt; i += 2) {
        FragB<T> b[2];
        load_b<T, true>(b, lane, values, Shape::kTokens, k, warp_n + i * 8);
        scale_rows<T>(b[0], w);
        scale_rows<T>(b[1], w);
#pragma unroll
        for (int m = 0; m < kMt; ++m) {
          mma<kFast>(acc[m][i], a[m], b[0]);
          mma<kFast>(acc[m][i + 1], a[m], b[1]);
        }
      }
    }
    if (own.n0 == 0) {
      constexpr int kShare = Shape::kTokens / Shape::kGroups;
      const int from = group() * kShare, row = 2 * pair();
#pragma unroll 8
      for (int i = 0; i < kShare; ++i) {
        A weight = vector[from + i];
        if constexpr (kReverse) weight *= vector[2 * Shape::kTokens + from + i];
        A x, y;
        unpack<T>(lds_two<T>(tile_address<T>(keys, Shape::kTokens, from + i, row)), x, y);
        n_part[0] += weight * x;
        n_part[1] += weight * y;
      }
    }
  }

  __device__ __forceinline__ void run() {
    base = shared_address(smem);
    int warp = threadIdx.x >> 5;
    warp_m = warp / Shape::kWarpsN * (kMt * 16);
    warp_n = warp % Shape::kWarpsN * (kNt * 8);
    Cold& own = cold();
    if (threadIdx.x == 0) {
      int tiles_n = div_up(args.dhhv, Shape::kN);
      own.tiles = div_up(args.dhqk, Shape::kM) * tiles_n;
      own.tile_index = blockIdx.x % own.tiles;
      uint32_t lane = blockIdx.x / own.tiles;
      own.head = lane % args.nh;
      own.row = lane / args.nh;
      own.batch = batch_of(args, own.row);
      own.m0 = own.tile_index / tiles_n * Shape::kM;
      own.n0 = own.tile_index % tiles_n * Shape::kN;
      own.dhqk_p = padded(args.dhqk);
      own.dhhv_p = padded(args.dhhv);
      own.first = first_chunk(args, own.row);
      own.last = first_chunk(args, own.row + 1);
    }
    __syncthreads();

    Cursor load{0, 0, 0, 0}, now{0, 0, 0, 0};
    enter(load);
    enter(now);
    constexpr int kAhead = Shape::kStages - 1;
#pragma unroll 1
    for (int i = 0; i < kAhead; ++i) {
      if (!done(load)) {
        issue(load, i);
        advance(load);
      }
      copy_commit();
    }
    if constexpr (kReverse) {
      prefetch(own.last);
      copy_commit();
      read(args.dc_last, args.dn_last);
    } else {
      read(args.c_initial, args.n_initial);
    }
    // A chunk of one step leaves no time for the pipeline to bring the tile of C on its own.
    bool hurry = true;
    int stage = 0, next = kAhead;
#pragma unroll 1
    for (; !done(now); advance(now)) {
      if (kReverse && hurry) {
        copy_wait<0>();
      } else {
        copy_wait<kAhead - 1>();
      }
      __syncthreads();
      if (now.tile == 0) {
        int64_t c = chunk_of(now);
        if constexpr (kReverse) {
          store(c + 1, static_cast<A*>(args.e) + chunk_index(args, c, own.head) * own.tiles +
                           own.tile_index);
          prefetch(c);
          hurry = now.len <= Shape::kTokens * (kAhead - 1);
        } else {
          store(c, nullptr);
        }
        decay(stage_vectors(stage)[3 * Shape::kTokens]);
      }
      if (!done(load)) {
        issue(load, next);
        advance(load);
      }
      copy_commit();
      next = next + 1 == Shape::kStages ? 0 : next + 1;
      accumulate(stage);
      stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
    }
    copy_wait<0>();
    __syncthreads();
    if constexpr (kReverse) {
      store(own.first, static_cast<A*>(args.e_first) +
                           (static_cast<int64_t>(own.row) * args.nh + own.head) * own.tiles +
                           own.tile_index);
      write(args.dc_initial, args.dn_initial, scratch());
    } else {
      store(own.last, nullptr);
      write(args.c_last, args.n_last, scratch());
    }
  }
};

template <typename T, typename Shape, bool kReverse, bool kFast>
__device__ __forceinline__ void run_states(const Args& args) {
  extern __shared__ __align__(128) unsigned char smem[];
  States<T, Shape, kReverse, kFast> states{args};
  states.smem = smem;
  states.run();
}

// Any data type and device.
template <typename T>
using SmallStates = StatesShape<T, 64, 64, 2, 2, sizeof(T) == 8 ? 16 : 64, sizeof(T) == 2 ? 4 : 2>;
static_assert(SmallStates<double>::kReverseBytes <= kSharedEverywhere);
// 16-bit types where shared memory and the number of blocks allow.
template <typename T>
struct BigStatesOf {
  using Type = StatesShape<T, 128, 128, 2, 4, 64, 2>;
};
template <>
struct BigStatesOf<f16> {
  // Keeping f16 in range takes registers.
  using Type = StatesShape<f16, 64, 128, 2, 4, 64, 3>;
};
template <typename T>
using BigStates = typename BigStatesOf<T>::Type;

#define MLSTM_STATES(name, T, shape, reverse, fast, blocks)             \
  extern "C" __global__ void __launch_bounds__(shape::kThreads, blocks) \
      name(const __grid_constant__ Args args) {                         \
    run_states<T, shape, reverse, fast>(args);                          \
  }                                                                     \
  MLSTM_GEOMETRY(name, shape::kM, shape::kN, shape::kThreads,           \
                 (reverse ? shape::kReverseBytes : shape::kBytes))
#define MLSTM_SMALL_STATES(name, T, reverse, fast) \
  MLSTM_STATES(name, T, SmallStates<T>, reverse, fast, (sizeof(T) == 2 ? 4 : 1))
#define MLSTM_BIG_STATES(name, T, reverse) MLSTM_STATES(name, T, BigStates<T>, reverse, false, 2)
// All of a base name; the _tf32 kernels round the products of float32 data.
#define MLSTM_ALL_STATES(base, reverse)                  \
  MLSTM_SMALL_STATES(base##_bf16, bf16, reverse, false)  \
  MLSTM_SMALL_STATES(base##_f16, f16, reverse, false)    \
  MLSTM_SMALL_STATES(base##_f32, float, reverse, false)  \
  MLSTM_SMALL_STATES(base##_tf32, float, reverse, true)  \
  MLSTM_SMALL_STATES(base##_f64, double, reverse, false) \
  MLSTM_BIG_STATES(base##_bf16_big, bf16, reverse)       \
  MLSTM_BIG_STATES(base##_f16_big, f16, reverse)

}  // namespace mlstm
