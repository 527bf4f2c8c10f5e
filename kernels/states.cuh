// The recurrence over chunks: a block keeps a kM x kN tile of the state in registers, walks the
// chunks of one sequence in order, stores the state before each, and adds
//   forward:  C <- g C + sum_y a_y k_y v_y^T,               n <- g n + sum_y a_y k_y
//   reverse:  dC <- g dC + sum_x w_x s inv_x q_x dh_x^T,    dn <- g dn + sum_x w_x delta_x q_x
// The weight is applied to v (dh) in the accumulator type and rounded once; n is summed from
// unrounded weights. The reverse also takes the inner products E of dC with the stored C.
#pragma once

#include "tile.cuh"

namespace mlstm {

template <typename T>
struct StateOf {
  using Type = T;
};
template <typename T>
using State = typename StateOf<T>::Type;

// cp.async of one accumulator; zero unless `inside`.
template <typename A>
__device__ __forceinline__ void copy_one(uint32_t dst, const A* src, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(dst), "l"(src),
               "n"(static_cast<int>(sizeof(A))), "r"(inside ? static_cast<int>(sizeof(A)) : 0)
               : "memory");
}

template <typename A>
__device__ __forceinline__ A load_any(const void* data, int64_t index, int dtype) {
  switch (dtype) {
    case kF32: return static_cast<const float*>(data)[index];
    case kF64: return static_cast<A>(static_cast<const double*>(data)[index]);
    case kBf16: return to_acc(static_cast<const bf16*>(data)[index]);
    default: return to_acc(static_cast<const f16*>(data)[index]);
  }
}

template <typename A>
__device__ __forceinline__ void store_any(void* data, int64_t index, int dtype, A value) {
  switch (dtype) {
    case kF32: static_cast<float*>(data)[index] = static_cast<float>(value); break;
    case kF64: static_cast<double*>(data)[index] = value; break;
    case kBf16:
      static_cast<bf16*>(data)[index] = from_acc<bf16>(static_cast<float>(value));
      break;
    default: static_cast<f16*>(data)[index] = from_acc<f16>(static_cast<float>(value));
  }
}

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
  static constexpr int kBytes = kStages * kStage + kScratch;
};

// Position in a sequence: token tile `tile` of chunk c.
template <bool kReverse, int kTokens>
struct Cursor {
  int64_t c, end;
  int tile;
  Chunk chunk;

  __device__ __forceinline__ bool done() const { return c == end; }
  __device__ __forceinline__ void start(const Args& args, int64_t first, int64_t last) {
    c = kReverse ? last - 1 : first;
    end = kReverse ? first - 1 : last;
    tile = 0;
    if (!done()) chunk = chunk_at(args, c);
  }
  __device__ __forceinline__ void advance(const Args& args) {
    ++tile;
    if (tile * kTokens < chunk.len) return;
    tile = 0;
    c += kReverse ? -1 : 1;
    if (!done()) chunk = chunk_at(args, c);
  }
};

template <typename T, typename Shape, bool kReverse>
struct States {
  using A = Acc<T>;
  static constexpr int kMt = Shape::kM / Shape::kWarpsM / 16, kNt = Shape::kN / Shape::kWarpsN / 8;

  const Args& args;
  int row, head, batch, m0, n0, tile_index, tiles;
  int dhqk_p, dhhv_p;
  int warp_m, warp_n, pair, group;
  bool owns_n;
  unsigned char* smem;
  uint32_t base;
  A acc[kMt][kNt][4];
  A n_part[2];

  __device__ __forceinline__ A* scratch() {
    return reinterpret_cast<A*>(smem + Shape::kStages * Shape::kStage);
  }
  __device__ __forceinline__ int lane_row(int m, int half) const {
    return m0 + warp_m + m * 16 + half * 8 + ((threadIdx.x & 31) >> 2);
  }
  __device__ __forceinline__ int lane_col(int n) const {
    return n0 + warp_n + n * 8 + 2 * (threadIdx.x & 3);
  }

  // A caller's state as the starting point; zero where absent.
  __device__ __forceinline__ void read(const Tensor& c, const Tensor& n) {
#pragma unroll
    for (int m = 0; m < kMt; ++m) {
#pragma unroll
      for (int i = 0; i < kNt; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          int d = lane_row(m, e >> 1), x = lane_col(i) + (e & 1);
          bool inside = c.data != nullptr && d < args.dhqk && x < args.dhhv;
          int64_t index = row * c.stride_b + head * c.stride_h + d * c.stride_s + x;
          acc[m][i][e] = inside ? load_any<A>(c.data, index, args.state_dtype) : A(0);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      int d = m0 + 2 * pair + e;
      bool inside = n.data != nullptr && group == 0 && d < args.dhqk;
      n_part[e] = inside ? at<A>(n, row, head, 0)[d] : A(0);
    }
  }

  __device__ __forceinline__ void write(const Tensor& c, const Tensor& n, const A* n_sum) {
    if (c.data == nullptr) return;
#pragma unroll
    for (int m = 0; m < kMt; ++m) {
#pragma unroll
      for (int i = 0; i < kNt; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          int d = lane_row(m, e >> 1), x = lane_col(i) + (e & 1);
          int64_t index = row * c.stride_b + head * c.stride_h + d * c.stride_s + x;
          if (d < args.dhqk && x < args.dhhv) {
            store_any<A>(c.data, index, args.state_dtype, acc[m][i][e]);
          }
        }
      }
    }
    int d = m0 + threadIdx.x;
    if (owns_n && threadIdx.x < Shape::kM && d < args.dhqk) {
      at<A>(n, row, head, 0)[d] = n_sum[threadIdx.x];
    }
  }

  // Stores the state in slot `c` (before chunk c, or after the last). The reverse writes E to *e.
  // On return the first kM entries of scratch() hold n.
  __device__ __forceinline__ void store(int64_t c, A* e) {
    int64_t slot = slot_index(args, c, row, head);
    State<T>* out = static_cast<State<T>*>(kReverse ? args.dc_states : args.c_states) +
                    slot * dhqk_p * dhhv_p;
    const State<T>* other = static_cast<const State<T>*>(args.c_states) + slot * dhqk_p * dhhv_p;
    A product = A(0);
    int col0 = n0 + warp_n;
#pragma unroll
    for (int m = 0; m < kMt; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int d = lane_row(m, half);
        bool inside = d < dhqk_p;
        int64_t offset = static_cast<int64_t>(d) * dhhv_p + col0;
        if constexpr (kReverse) {
#pragma unroll
          for (int i = 0; i < kNt; ++i) {
            A x, y;
            load_two<State<T>>(other + offset, i * 8 + 2 * (threadIdx.x & 3), dhhv_p - col0,
                               inside, true, x, y);
            product += acc[m][i][2 * half] * x + acc[m][i][2 * half + 1] * y;
          }
        }
        A value[kNt][2];
#pragma unroll
        for (int i = 0; i < kNt; ++i) {
          value[i][0] = acc[m][i][2 * half];
          value[i][1] = acc[m][i][2 * half + 1];
        }
        store_row<State<T>, kNt>(out + offset, value, dhhv_p - col0, inside, true);
      }
    }
    A* n_sum = scratch();
    if (owns_n) {
      n_sum[group * Shape::kM + 2 * pair] = n_part[0];
      n_sum[group * Shape::kM + 2 * pair + 1] = n_part[1];
      __syncthreads();
      int d = m0 + threadIdx.x;
      A sum = A(0);
      if (threadIdx.x < Shape::kM) {
#pragma unroll
        for (int i = 0; i < Shape::kGroups; ++i) sum += n_sum[i * Shape::kM + threadIdx.x];
        n_sum[threadIdx.x] = sum;
        if (d < dhqk_p) {
          static_cast<A*>(kReverse ? args.dn_states : args.n_states)[slot * dhqk_p + d] = sum;
          if constexpr (kReverse) {
            product += sum * static_cast<const A*>(args.n_states)[slot * dhqk_p + d];
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

  template <typename C>
  __device__ __forceinline__ void issue(const C& cursor, int stage) {
    const Tensor& key = kReverse ? args.q : args.k;
    const Tensor& value = kReverse ? args.dh : args.v;
    int t0 = cursor.tile * Shape::kTokens;
    int left = cursor.chunk.len - t0;
    int64_t start = cursor.chunk.start + t0;
    uint32_t at_stage = base + stage * Shape::kStage;
    load_tile<T, Shape::kTokens, Shape::kM, Shape::kThreads>(
        at_stage, at<T>(key, batch, head, start) + m0, key.stride_s, left, args.dhqk - m0,
        args.vector_ok);
    load_tile<T, Shape::kTokens, Shape::kN, Shape::kThreads>(
        at_stage + Shape::kKeyBytes, at<T>(value, batch, head, start) + n0, value.stride_s, left,
        args.dhhv - n0, args.vector_ok);
    uint32_t vectors = at_stage + Shape::kKeyBytes + Shape::kValueBytes;
    int64_t token = token_index(args, batch, head, start);
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
               static_cast<const A*>(args.g) + chunk_index(args, cursor.c, head), true);
    }
  }

  __device__ __forceinline__ const A* stage_vectors(int stage) const {
    return reinterpret_cast<const A*>(smem + stage * Shape::kStage + Shape::kKeyBytes +
                                      Shape::kValueBytes);
  }

  __device__ __forceinline__ void decay(A g) {
    bool forget = g == A(0);
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
    const A* vector = stage_vectors(stage);
    const A scale = static_cast<A>(args.qk_scale);
    uint32_t keys = base + stage * Shape::kStage, values = keys + Shape::kKeyBytes;
    int t = threadIdx.x & 3;
#pragma unroll
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
        load_a<T, true>(a[m], keys, Shape::kTokens, warp_m + m * 16, k);
      }
#pragma unroll
      for (int i = 0; i < kNt; i += 2) {
        FragB<T> b[2];
        load_b<T, true>(b, values, Shape::kTokens, k, warp_n + i * 8);
        scale_rows<T>(b[0], w);
        scale_rows<T>(b[1], w);
#pragma unroll
        for (int m = 0; m < kMt; ++m) {
          mma(acc[m][i], a[m], b[0]);
          mma(acc[m][i + 1], a[m], b[1]);
        }
      }
    }
    if (owns_n) {
      constexpr int kShare = Shape::kTokens / Shape::kGroups;
#pragma unroll 4
      for (int i = 0; i < kShare; ++i) {
        int token = group * kShare + i;
        A weight = vector[token];
        if constexpr (kReverse) weight *= vector[2 * Shape::kTokens + token];
        A x, y;
        unpack<T>(lds_two<T>(tile_address<T>(keys, Shape::kTokens, token, 2 * pair)), x, y);
        n_part[0] += weight * x;
        n_part[1] += weight * y;
      }
    }
  }

  __device__ __forceinline__ void run() {
    int tiles_n = div_up(args.dhhv, Shape::kN);
    tiles = div_up(args.dhqk, Shape::kM) * tiles_n;
    uint32_t id = blockIdx.x;
    tile_index = id % tiles;
    id /= tiles;
    head = id % args.nh;
    row = id / args.nh;
    batch = batch_of(args, row);
    m0 = tile_index / tiles_n * Shape::kM;
    n0 = tile_index % tiles_n * Shape::kN;
    owns_n = n0 == 0;
    dhqk_p = padded(args.dhqk);
    dhhv_p = padded(args.dhhv);
    int warp = threadIdx.x >> 5;
    warp_m = warp / Shape::kWarpsN * (kMt * 16);
    warp_n = warp % Shape::kWarpsN * (kNt * 8);
    pair = threadIdx.x % (Shape::kM / 2);
    group = threadIdx.x / (Shape::kM / 2);
    base = shared_address(smem);

    int64_t first = first_chunk(args, row), last = first_chunk(args, row + 1);
    Cursor<kReverse, Shape::kTokens> load, now;
    load.start(args, first, last);
    now.start(args, first, last);
    constexpr int kAhead = Shape::kStages - 1;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (!load.done()) {
        issue(load, i);
        load.advance(args);
      }
      copy_commit();
    }
    if constexpr (kReverse) {
      read(args.dc_last, args.dn_last);
    } else {
      read(args.c_initial, args.n_initial);
    }
    int stage = 0, next = kAhead;
    for (; !now.done(); now.advance(args)) {
      copy_wait<kAhead - 1>();
      __syncthreads();
      if (!load.done()) {
        issue(load, next);
        load.advance(args);
      }
      copy_commit();
      next = next + 1 == Shape::kStages ? 0 : next + 1;
      if (now.tile == 0) {
        A* e = nullptr;
        if constexpr (kReverse) {
          e = static_cast<A*>(args.e) + chunk_index(args, now.c, head) * tiles + tile_index;
        }
        store(now.c + (kReverse ? 1 : 0), e);
        decay(stage_vectors(stage)[3 * Shape::kTokens]);
      }
      accumulate(stage);
      stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
    }
    __syncthreads();
    A* e = nullptr;
    if constexpr (kReverse) {
      e = static_cast<A*>(args.e_first) + (static_cast<int64_t>(row) * args.nh + head) * tiles +
          tile_index;
    }
    store(kReverse ? first : last, e);
    if constexpr (kReverse) {
      write(args.dc_initial, args.dn_initial, scratch());
    } else {
      write(args.c_last, args.n_last, scratch());
    }
  }
};

template <typename T, typename Shape, bool kReverse>
__device__ __forceinline__ void run_states(const Args& args) {
  extern __shared__ __align__(128) unsigned char smem[];
  States<T, Shape, kReverse> states{args};
  states.smem = smem;
  states.run();
}

template <typename T>
using BigStates = StatesShape<T, 128, 128, 2, 4, 64, 3>;
template <typename T>
using SmallStates = StatesShape<T, 64, 64, 2, 2, sizeof(T) == 8 ? 32 : 64, sizeof(T) == 2 ? 4 : 2>;

}  // namespace mlstm
