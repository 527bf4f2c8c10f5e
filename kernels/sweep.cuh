// One kernel for h, dv, dq and dk: per 64 tokens ("rows") of a chunk,
//   O_r = alpha_r (q'_r . X) + beta_r e + sum_c P_rc v'_c,   P_rc = D (mu_r nu_c q'_r.k'_c + eta)
// over the chunk's tokens c ("columns") on one side of the diagonal. With x the query token:
//         q'  k'  v'  X      alpha       beta, e           mu       nu       eta      columns
//   h     q   k   v   C      s w                           s        1        0        c <= r
//   dv    k   q   dh  dC     a                             1        s inv    0        c >= r
//   dq    dh  v   k   C^T    s w inv     w delta, n        s inv_r  1        delta_r  c <= r
//   dk    v   dh  q   dC^T   a           a, dn             1        s inv_c  delta_c  c >= r
// Three passes share one two-stage pipeline: q' k'^T into P (rounded to T in shared memory, its
// row sums taken before rounding), q' X, then P v'.
#pragma once

#include "tile.cuh"

namespace mlstm {

enum Mode { kH, kDv, kDq, kDk };

// kCols blocks of 64 output columns; chunks of at most kTiles blocks of 64 tokens.
template <typename T, int kCols_, int kTiles_>
struct SweepShape {
  static constexpr int kCols = kCols_, kTiles = kTiles_;
  static constexpr int kThreads = 256;
  static constexpr int kBlock = 64 * 128;  // bytes of 64 tokens x one slab
  static constexpr int kValues = 64 * 64 * kCols * static_cast<int>(sizeof(T));
  static constexpr int kPass1 = kBlock * (1 + kTiles), kPass2 = kBlock * (1 + kCols);
  static constexpr int kLarger = kPass1 > kPass2 ? kPass1 : kPass2;
  static constexpr int kStage = kLarger > kValues ? kLarger : kValues;
  static constexpr int kWeights = 64 * 64 * kTiles * static_cast<int>(sizeof(T));
  static constexpr int kVectors = (64 * 6 + 64 * kTiles * 4 + 64 * 6) * sizeof(Acc<T>);
  static constexpr int kBytes = 2 * kStage + kWeights + kVectors;
};

template <typename T, typename Shape, Mode kMode>
__device__ __forceinline__ void sweep(const Args& args, unsigned char* smem) {
  using A = Acc<T>;
  constexpr bool kReverse = kMode == kDv || kMode == kDk;
  constexpr bool kFlip = kMode == kDq || kMode == kDk;
  constexpr int kDepth = kSlab<T>, kTiles = Shape::kTiles, kWidth = 64 * Shape::kCols;
  constexpr int kNt = 2 * Shape::kCols;  // blocks of 8 output columns per warp
  constexpr int kBlock = Shape::kBlock;

  const Tensor& tensor_q = kMode == kH ? args.q : kMode == kDv ? args.k : kMode == kDq ? args.dh
                                                                                       : args.v;
  const Tensor& tensor_k = kMode == kH ? args.k : kMode == kDv ? args.q : kMode == kDq ? args.v
                                                                                       : args.dh;
  const Tensor& tensor_v = kMode == kH ? args.v : kMode == kDv ? args.dh : kMode == kDq ? args.k
                                                                                        : args.q;
  const Tensor& tensor_o = kMode == kH ? args.h : kMode == kDv ? args.dv : kMode == kDq ? args.dq
                                                                                        : args.dk;
  const int inner = kFlip ? args.dhhv : args.dhqk, outer = kFlip ? args.dhqk : args.dhhv;
  const int dhqk_p = padded(args.dhqk), dhhv_p = padded(args.dhhv);
  const bool vector = args.vector_ok;

  // Which block: output columns fastest, then rows, so that neighbours share a chunk.
  uint32_t id = blockIdx.x;
  const int col_tiles = div_up(outer, kWidth), row_tiles = args.chunk_len / 64;
  const int col_tile = id % col_tiles;
  id /= col_tiles;
  const int row_tile = id % row_tiles;
  id /= row_tiles;
  const int head = id % args.nh;
  const int64_t c = id / args.nh;
  const Chunk chunk = chunk_at(args, c);
  const int row0 = row_tile * 64;
  if (row0 >= chunk.len) return;
  const int batch = batch_of(args, chunk.row);
  const int rows = min(64, chunk.len - row0);
  const int first = kReverse ? row_tile : 0;  // first column tile
  const int tiles = kReverse ? div_up(chunk.len, 64) - row_tile : row_tile + 1;
  const int col0 = first * 64, out0 = col_tile * kWidth;
  const int64_t token0 = token_index(args, batch, head, chunk.start);

  const T* q = at<T>(tensor_q, batch, head, chunk.start + row0);
  const T* k = at<T>(tensor_k, batch, head, chunk.start + col0);
  const T* v = at<T>(tensor_v, batch, head, chunk.start + col0) + out0;
  const int64_t slot = slot_index(args, c + (kReverse ? 1 : 0), chunk.row, head);
  const T* state = static_cast<const T*>(kReverse ? args.dc_states : args.c_states) +
                   slot * dhqk_p * dhhv_p;
  const A* state_n = static_cast<const A*>(kReverse ? args.dn_states : args.n_states) +
                     slot * dhqk_p;

  const uint32_t base = shared_address(smem);
  const uint32_t weights = base + 2 * Shape::kStage;
  A* const row_hi = reinterpret_cast<A*>(smem + 2 * Shape::kStage + Shape::kWeights);
  A* const row_lo = row_hi + 64;
  A* const row_mul = row_lo + 64;
  A* const row_add = row_mul + 64;
  A* const row_alpha = row_add + 64;
  A* const row_beta = row_alpha + 64;
  A* const col_hi = row_beta + 64;
  A* const col_lo = col_hi + 64 * kTiles;
  A* const col_mul = col_lo + 64 * kTiles;
  A* const col_add = col_mul + 64 * kTiles;
  A* const sums = col_add + 64 * kTiles;  // [4][64], per column group of warps
  A* const row_sum = sums + 4 * 64;       // [64]

  const int steps_in = div_up(inner, kDepth), steps = 2 * steps_in + tiles;
  auto issue = [&](int step) {
    uint32_t stage = base + (step & 1) * Shape::kStage;
    if (step < steps_in) {
      int d = step * kDepth;
      load_tile<T, 64, kDepth, 256>(stage, q + d, tensor_q.stride_s, rows, inner - d, vector);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j < tiles) {
          load_tile<T, 64, kDepth, 256>(stage + (1 + j) * kBlock,
                                        k + j * 64 * tensor_k.stride_s + d, tensor_k.stride_s,
                                        chunk.len - col0 - j * 64, inner - d, vector);
        }
      }
    } else if (step < 2 * steps_in) {
      int d = (step - steps_in) * kDepth;
      load_tile<T, 64, kDepth, 256>(stage, q + d, tensor_q.stride_s, rows, inner - d, vector);
      if constexpr (kFlip) {
        load_tile<T, kWidth, kDepth, 256>(stage + kBlock,
                                          state + static_cast<int64_t>(out0) * dhhv_p + d, dhhv_p,
                                          dhqk_p - out0, kDepth, true);
      } else {
        load_tile<T, kDepth, kWidth, 256>(stage + kBlock,
                                          state + static_cast<int64_t>(d) * dhhv_p + out0, dhhv_p,
                                          kDepth, dhhv_p - out0, true);
      }
    } else if (step < steps) {
      int j = step - 2 * steps_in;
      load_tile<T, 64, kWidth, 256>(stage, v + j * 64 * tensor_v.stride_s, tensor_v.stride_s,
                                    chunk.len - col0 - j * 64, outer - out0, vector);
    }
    copy_commit();
  };
  issue(0);

  const int tid = threadIdx.x, lane = tid & 31, g = lane >> 2, t = lane & 3;
  const int warp_row = (tid >> 7) * 32, warp_col = (tid >> 5) & 3;
  const A scale = static_cast<A>(args.qk_scale);
  const bool with_n = kMode == kH && ((args.flags & kNormalize) || args.n.data != nullptr);

  // Vectors of the rows and columns; anything beyond the chunk's end is zero.
  const Pair<A>* row_exponents = static_cast<const Pair<A>*>(kReverse ? args.col : args.row);
  const Pair<A>* col_exponents = static_cast<const Pair<A>*>(kReverse ? args.row : args.col);
  if (tid < 64) {
    int64_t token = token0 + row0 + tid;
    bool inside = tid < rows;
    Pair<A> e{A(0), A(0)};
    A mul = A(1), add = A(0), alpha = A(0), beta = A(0);
    if (inside) {
      e = row_exponents[token];
      if constexpr (kReverse) {
        alpha = beta = static_cast<const A*>(args.a)[token];
      } else {
        A w = static_cast<const A*>(args.w)[token];
        mul = scale;
        if constexpr (kMode == kDq) {
          mul = scale * static_cast<const A*>(args.inv)[token];
          add = static_cast<const A*>(args.delta)[token];
          beta = w * add;
        }
        alpha = w * mul;
      }
    }
    row_hi[tid] = e.hi;
    row_lo[tid] = e.lo;
    row_mul[tid] = mul;
    row_add[tid] = add;
    row_alpha[tid] = alpha;
    row_beta[tid] = beta;
  }
  for (int i = tid; i < 64 * tiles; i += 256) {
    int64_t token = token0 + col0 + i;
    bool inside = col0 + i < chunk.len;
    Pair<A> e{A(0), A(0)};
    A mul = A(1), add = A(0);
    if (inside) {
      e = col_exponents[token];
      if constexpr (kReverse) mul = scale * static_cast<const A*>(args.inv)[token];
      if constexpr (kMode == kDk) add = static_cast<const A*>(args.delta)[token];
    }
    col_hi[i] = e.hi;
    col_lo[i] = e.lo;
    col_mul[i] = mul;
    col_add[i] = add;
  }

  // Pass 1: q' k'^T, weighted and masked.
  {
    A acc[kTiles][2][2][4] = {};
#pragma unroll 1
    for (int step = 0; step < steps_in; ++step) {
      copy_wait<0>();
      __syncthreads();
      issue(step + 1);
      uint32_t stage = base + (step & 1) * Shape::kStage;
#pragma unroll
      for (int d = 0; d < kDepth; d += 16) {
        FragA<T> a[2];
        load_a<T, false>(a[0], stage, 64, warp_row, d);
        load_a<T, false>(a[1], stage, 64, warp_row + 16, d);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          if (j < tiles) {
            FragB<T> b[2];
            load_b<T, false>(b, stage + (1 + j) * kBlock, 64, d, warp_col * 16);
#pragma unroll
            for (int m = 0; m < 2; ++m) {
              mma(acc[j][m][0], a[m], b[0]);
              mma(acc[j][m][1], a[m], b[1]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int r = warp_row + m * 16 + half * 8 + g;
        A sum = A(0);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          if (j < tiles) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              A p[2];
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                int i = j * 64 + warp_col * 16 + n * 8 + 2 * t + e;
                bool inside = kReverse ? col0 + i >= row0 + r && col0 + i < chunk.len
                                       : col0 + i <= row0 + r;
                A decay = exp2_fast((row_hi[r] + col_hi[i]) + (row_lo[r] + col_lo[i]));
                A value = acc[j][m][n][2 * half + e];
                if constexpr (kReverse) value *= col_mul[i];
                if constexpr (!kReverse) value *= row_mul[r];
                if constexpr (kMode == kDq) value += row_add[r];
                if constexpr (kMode == kDk) value += col_add[i];
                p[e] = inside ? decay * value : A(0);
                sum += p[e];
              }
              sts_two(tile_address<T>(weights, 64, r, j * 64 + warp_col * 16 + n * 8 + 2 * t),
                      pack<T>(p[0], p[1]));
            }
          }
        }
        if constexpr (kMode == kH) {
          sum = quad_sum(sum);
          if (t == 0) sums[warp_col * 64 + r] = sum;
        }
      }
    }
  }

  // Pass 2: q' X, and q.n on the side.
  A acc[2][kNt][4] = {};
  A dot_n = A(0);
#pragma unroll 1
  for (int step = steps_in; step < 2 * steps_in; ++step) {
    copy_wait<0>();
    __syncthreads();
    issue(step + 1);
    uint32_t stage = base + (step & 1) * Shape::kStage;
    if (with_n) {
      constexpr int kShare = kDepth / 4;
      const A* n = state_n + (step - steps_in) * kDepth + t * kShare;
      int r = tid >> 2;
#pragma unroll 2
      for (int i = 0; i < kShare; i += 2) {
        A x, y;
        unpack<T>(lds_two<T>(tile_address<T>(stage, 64, r, t * kShare + i)), x, y);
        dot_n += x * n[i] + y * n[i + 1];
      }
    }
    warp_product<T, 2, kNt, kDepth, !kFlip>(acc, stage, 64, warp_row, 0, stage + kBlock,
                                            kFlip ? kWidth : kDepth, 0, warp_col * kNt * 8);
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int r = warp_row + m * 16 + half * 8 + g;
      A alpha = row_alpha[r], beta = row_beta[r];
      // A weight of zero forgets the state, NaN included.
#pragma unroll
      for (int n = 0; n < kNt; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          A& x = acc[m][n][2 * half + e];
          x = alpha == A(0) ? A(0) : alpha * x;
          if constexpr (kFlip) {
            int d = out0 + warp_col * kNt * 8 + n * 8 + 2 * t + e;
            if (beta != A(0) && d < dhqk_p) x += beta * state_n[d];
          }
        }
      }
    }
  }

  // Pass 3: P v'.
#pragma unroll 1
  for (int step = 2 * steps_in; step < steps; ++step) {
    copy_wait<0>();
    __syncthreads();
    issue(step + 1);
    warp_product<T, 2, kNt, 64, true>(acc, weights, 64, warp_row, (step - 2 * steps_in) * 64,
                                      base + (step & 1) * Shape::kStage, 64, 0,
                                      warp_col * kNt * 8);
  }

  if constexpr (kMode == kH) {
    dot_n = quad_sum(dot_n);
    if (t == 0) row_sum[tid >> 2] = dot_n;
    __syncthreads();
    if (tid < rows) {
      int64_t token = token0 + row0 + tid;
      A alpha = row_alpha[tid];
      A n = alpha == A(0) ? A(0) : alpha * row_sum[tid];
      n += (sums[tid] + sums[64 + tid]) + (sums[128 + tid] + sums[192 + tid]);
      if (col_tile == 0 && args.n.data != nullptr) {
        *at<A>(args.n, batch, head, chunk.start + row0 + tid) = n;
      }
      A inv = A(1);
      if (args.flags & kNormalize) {
        A floor = static_cast<const A*>(args.floor)[token];
        n = n < A(0) ? -n : n;
        inv = A(1) / ((n < floor ? floor : n) + static_cast<A>(args.eps));
      }
      row_mul[tid] = inv;
    }
    __syncthreads();
  }

  // Out, with q.dq or k.dk from the unrounded accumulators.
  T* out = at<T>(tensor_o, batch, head, chunk.start + row0);
  const int warp_out = out0 + warp_col * kNt * 8;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int r = warp_row + m * 16 + half * 8 + g;
      bool inside = r < rows;
      A value[kNt][2];
      A factor = kMode == kH ? row_mul[r] : A(1);
#pragma unroll
      for (int n = 0; n < kNt; ++n) {
        value[n][0] = acc[m][n][2 * half] * factor;
        value[n][1] = acc[m][n][2 * half + 1] * factor;
      }
      if constexpr (kFlip) {
        const T* own = at<T>(tensor_v, batch, head, chunk.start + row0 + r);
        A dot = A(0);
        own = kMode == kDq ? at<T>(args.q, batch, head, chunk.start + row0 + r)
                           : at<T>(args.k, batch, head, chunk.start + row0 + r);
#pragma unroll
        for (int n = 0; n < kNt; ++n) {
          A x, y;
          load_two<T>(own + warp_out, n * 8 + 2 * t, outer - warp_out, inside, vector, x, y);
          dot += value[n][0] * x + value[n][1] * y;
        }
        dot = quad_sum(dot);
        if (t == 0) sums[warp_col * 64 + r] = dot;
      }
      store_row<T, kNt>(out + r * tensor_o.stride_s + warp_out, value, outer - warp_out, inside,
                        vector);
    }
  }
  if constexpr (kFlip) {
    __syncthreads();
    if (tid < rows) {
      int64_t tokens = static_cast<int64_t>(args.b) * args.nh * args.s;
      A* dots = static_cast<A*>(kMode == kDq ? args.q_dq : args.k_dk) + col_tile * tokens;
      dots[token0 + row0 + tid] =
          (sums[tid] + sums[64 + tid]) + (sums[128 + tid] + sums[192 + tid]);
    }
  }
}

// 16-bit types: chunks up to 128 tokens; f32 and f64: 64.
template <typename T, int kCols>
using SweepOf = SweepShape<T, kCols, sizeof(T) == 2 ? 2 : 1>;

#define MLSTM_SWEEP(name, T, cols, mode, blocks)                          \
  extern "C" __global__ void __launch_bounds__(256, blocks)               \
      name(const __grid_constant__ mlstm::Args args) {                    \
    extern __shared__ __align__(128) unsigned char smem[];                \
    mlstm::sweep<T, mlstm::SweepOf<T, cols>, mlstm::mode>(args, smem);    \
  }

#define MLSTM_SWEEPS(name, mode)                     \
  MLSTM_SWEEP(name##_bf16_1, mlstm::bf16, 1, mode, 2) \
  MLSTM_SWEEP(name##_bf16_2, mlstm::bf16, 2, mode, 2) \
  MLSTM_SWEEP(name##_bf16_4, mlstm::bf16, 4, mode, 2) \
  MLSTM_SWEEP(name##_f16_1, mlstm::f16, 1, mode, 2)   \
  MLSTM_SWEEP(name##_f16_2, mlstm::f16, 2, mode, 2)   \
  MLSTM_SWEEP(name##_f16_4, mlstm::f16, 4, mode, 2)   \
  MLSTM_SWEEP(name##_f32_1, float, 1, mode, 1)        \
  MLSTM_SWEEP(name##_f64_1, double, 1, mode, 1)

}  // namespace mlstm
