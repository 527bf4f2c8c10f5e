// One kernel for h, dv, dq and dk: per block of tokens ("rows") of a chunk,
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

// kRows rows, kCols output columns, chunks of at most kTiles * 64 tokens, kStages of loads.
template <typename T, int kRows_, int kCols_, int kTiles_, int kStages_>
struct SweepShape {
  static constexpr int kRows = kRows_, kCols = kCols_, kTiles = kTiles_, kStages = kStages_;
  static constexpr int kBlock = 64 * 128;  // bytes of 64 tokens x one slab
  static constexpr int kRowBlock = kRows * 128;
  static constexpr int kValues = 64 * kCols * static_cast<int>(sizeof(T));
  static constexpr int kPass1 = kRowBlock + kBlock * kTiles;
  static constexpr int kPass2 = kRowBlock + kCols * 128;
  static constexpr int kLarger = kPass1 > kPass2 ? kPass1 : kPass2;
  static constexpr int kOut = kRows * kCols * static_cast<int>(sizeof(T));
  static constexpr int kWidest = kOut > kValues ? kOut : kValues;
  static constexpr int kTile = kLarger > kWidest ? kLarger : kWidest;
  static constexpr int kStage = kTile + kSlab<T> * static_cast<int>(sizeof(Acc<T>));  // + n
  static constexpr int kWeights = kRows * 64 * kTiles * static_cast<int>(sizeof(T));
  static constexpr int kVectors =
      (kRows * 11 + 64 * kTiles * 4 + 32) * static_cast<int>(sizeof(Acc<T>));
  static constexpr int kBytes = kStages * kStage + kWeights + kVectors;
};

// What every thread knows but seldom needs: kept in shared memory to save registers. Pointers are
// to the block's first row and column.
template <typename T>
struct Block {
  const T *q, *k, *v, *state, *own;
  T* out;
  const Acc<T>* state_n;
  Acc<T>* n;
  int64_t token0;  // token index of the chunk's first token
};

template <typename T, typename Shape, Mode kMode, bool kFast>
__device__ __forceinline__ void sweep(const Args& args, unsigned char* smem) {
  using A = Acc<T>;
  constexpr bool kReverse = kMode == kDv || kMode == kDk;
  constexpr bool kFlip = kMode == kDq || kMode == kDk;
  constexpr int kDepth = kSlab<T>, kTiles = Shape::kTiles, kRows = Shape::kRows;
  constexpr int kWidth = Shape::kCols, kBlock = Shape::kBlock, kStages = Shape::kStages;
  // Warps form 2 x 4: blocks of 16 rows and of 8 output columns per warp.
  constexpr int kMt = kRows / 32, kNt = kWidth / 32;
  constexpr int kEighths = kMt == 1 ? 2 : 4;  // groups of 8 rows that are weighted together

  const Tensor& tensor_q = kMode == kH    ? args.q
                           : kMode == kDv ? args.k
                           : kMode == kDq ? args.dh
                                          : args.v;
  const Tensor& tensor_k = kMode == kH    ? args.k
                           : kMode == kDv ? args.q
                           : kMode == kDq ? args.v
                                          : args.dh;
  const Tensor& tensor_v = kMode == kH    ? args.v
                           : kMode == kDv ? args.dh
                           : kMode == kDq ? args.k
                                          : args.q;
  const Tensor& tensor_o = kMode == kH    ? args.h
                           : kMode == kDv ? args.dv
                           : kMode == kDq ? args.dq
                                          : args.dk;
  const int inner = kFlip ? args.dhhv : args.dhqk, outer = kFlip ? args.dhqk : args.dhhv;
  const int dhqk_p = padded(args.dhqk), dhhv_p = padded(args.dhhv);
  const bool vector = args.vector_ok;

  // Which block: output columns fastest, then rows, so that neighbours share a chunk.
  uint32_t id = blockIdx.x;
  const int col_tiles = div_up(outer, kWidth), row_tiles = div_up(args.chunk_len, kRows);
  const int col_tile = id % col_tiles;
  id /= col_tiles;
  const int row_tile = id % row_tiles;
  id /= row_tiles;
  const int head = id % args.nh;
  const int64_t c = id / args.nh;
  const Chunk chunk = chunk_at(args, c);
  const int row0 = row_tile * kRows;
  if (row0 >= chunk.len) return;
  const int batch = batch_of(args, chunk.row);
  const int rows = min(kRows, chunk.len - row0);
  const int first = kReverse ? row0 / 64 : 0;  // first column tile
  const int tiles = div_up(kReverse ? chunk.len : row0 + rows, 64) - first;
  const int col0 = first * 64, out0 = col_tile * kWidth;
  const uint32_t base = shared_address(smem);
  const uint32_t weights = base + kStages * Shape::kStage;
  A* const row_hi = reinterpret_cast<A*>(smem + kStages * Shape::kStage + Shape::kWeights);
  A* const row_lo = row_hi + kRows;
  A* const row_mul = row_lo + kRows;
  A* const row_add = row_mul + kRows;
  A* const row_alpha = row_add + kRows;
  A* const row_beta = row_alpha + kRows;
  A* const col_hi = row_beta + kRows;
  A* const col_lo = col_hi + 64 * kTiles;
  A* const col_mul = col_lo + 64 * kTiles;
  A* const col_add = col_mul + 64 * kTiles;
  A* const sums = col_add + 64 * kTiles;  // [4][kRows], per column group of warps
  A* const row_sum = sums + 4 * kRows;    // [kRows]
  Block<T>& block = *reinterpret_cast<Block<T>*>(row_sum + kRows);
  if (threadIdx.x == 0) {
    const int64_t slot = slot_index(args, c + (kReverse ? 1 : 0), chunk.row, head);
    const T* states = static_cast<const T*>(kReverse ? args.dc_states : args.c_states);
    const A* states_n = static_cast<const A*>(kReverse ? args.dn_states : args.n_states);
    const Tensor& own = kMode == kDq ? args.q : args.k;
    const int64_t start = chunk.start + row0;
    block.q = at<T>(tensor_q, batch, head, start);
    block.k = at<T>(tensor_k, batch, head, chunk.start + col0);
    block.v = at<T>(tensor_v, batch, head, chunk.start + col0) + out0;
    block.own = at<T>(own, batch, head, start) + out0;
    block.out = at<T>(tensor_o, batch, head, start) + out0;
    block.state = states + slot * dhqk_p * dhhv_p +
                  (kFlip ? static_cast<int64_t>(out0) * dhhv_p : static_cast<int64_t>(out0));
    block.state_n = states_n + slot * dhqk_p;
    block.n = kMode == kH && args.n.data != nullptr ? at<A>(args.n, batch, head, start) : nullptr;
    block.token0 = token_index(args, batch, head, chunk.start);
  }
  const int len = chunk.len;
  __syncthreads();

  // Steps of the pipeline: pass 1 and 2 over the inner dim, pass 3 over column tiles, then (dq,
  // dk) the rows of q or k for q.dq and k.dk.
  const int steps_in = div_up(inner, kDepth), last = 2 * steps_in + tiles;
  const int steps = kFlip ? last + 1 : last;
  auto stage_of = [&](int step) { return base + step % kStages * Shape::kStage; };
  auto issue = [&](int step) {
    const uint32_t stage = stage_of(step);
    if (step < steps_in) {
      int d = step * kDepth;
      load_tile<T, kRows, kDepth, 256>(stage, block.q + d, tensor_q.stride_s, rows, inner - d,
                                       vector);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j < tiles) {
          load_tile<T, 64, kDepth, 256>(stage + Shape::kRowBlock + j * kBlock,
                                        block.k + j * 64 * tensor_k.stride_s + d, tensor_k.stride_s,
                                        len - col0 - j * 64, inner - d, vector);
        }
      }
    } else if (step < 2 * steps_in) {
      int d = (step - steps_in) * kDepth;
      constexpr int kVec = 16 / sizeof(A);
      if (kMode == kH && threadIdx.x < kDepth / kVec) {
        copy_16(stage + Shape::kTile + threadIdx.x * 16, block.state_n + d + threadIdx.x * kVec);
      }
      load_tile<T, kRows, kDepth, 256>(stage, block.q + d, tensor_q.stride_s, rows, inner - d,
                                       vector);
      if constexpr (kFlip) {
        load_tile<T, kWidth, kDepth, 256>(stage + Shape::kRowBlock, block.state + d, dhhv_p,
                                          dhqk_p - out0, kDepth, true);
      } else {
        load_tile<T, kDepth, kWidth, 256>(stage + Shape::kRowBlock,
                                          block.state + static_cast<int64_t>(d) * dhhv_p, dhhv_p,
                                          kDepth, dhhv_p - out0, true);
      }
    } else if (step < last) {
      int j = step - 2 * steps_in;
      load_tile<T, 64, kWidth, 256>(stage, block.v + j * 64 * tensor_v.stride_s, tensor_v.stride_s,
                                    len - col0 - j * 64, outer - out0, vector);
    } else if (kFlip && step == last) {
      load_tile<T, kRows, kWidth, 256>(stage, block.own,
                                       kMode == kDq ? args.q.stride_s : args.k.stride_s, rows,
                                       outer - out0, vector);
    }
    copy_commit();
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) issue(step);

  const int tid = threadIdx.x;
  const A scale = static_cast<A>(args.qk_scale);
  const bool with_n = kMode == kH && ((args.flags & kNormalize) || args.n.data != nullptr);

  // Vectors of the rows and columns; anything beyond the chunk's end is zero.
  const Pair<A>* row_exponents = static_cast<const Pair<A>*>(kReverse ? args.col : args.row);
  const Pair<A>* col_exponents = static_cast<const Pair<A>*>(kReverse ? args.row : args.col);
  if (tid < kRows) {
    int64_t token = block.token0 + row0 + tid;
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
    row_sum[tid] = A(0);
  }
  for (int i = tid; i < 64 * tiles; i += 256) {
    int64_t token = block.token0 + col0 + i;
    bool inside = col0 + i < len;
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

  // Whether column tile j reaches the warp's rows at all.
  auto reaches = [&](int j, int warp_row) {
    if (j >= tiles) return false;
    return kReverse ? col0 + j * 64 + 64 > row0 + warp_row
                    : col0 + j * 64 < row0 + warp_row + kRows / 2;
  };

  // Pass 1 accumulates column tile j in blocks 2j and 2j + 1 of the same registers.
  constexpr int kNa = kNt > 2 * kTiles ? kNt : 2 * kTiles;
  constexpr int kPerRow = 256 / kRows;  // threads that share the dot product q.n of a row
  A acc[kMt][kNa][4] = {};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int thread = opaque(tid), lane = thread & 31, g = lane >> 2, t = lane & 3;
    const int warp_row = (thread >> 7) * (kRows / 2), warp_col = (thread >> 5) & 3;
    const int warp_out = warp_col * kNt * 8;
    copy_wait<kStages - 2>();
    __syncthreads();
    issue(step + kStages - 1);
    const uint32_t stage = stage_of(step);
    if (step < steps_in) {
      constexpr int kUnrolled = kUnroll<T>;
#pragma unroll kUnrolled
      for (int d = 0; d < kDepth; d += 16) {
        FragA<T> a[kMt];
#pragma unroll
        for (int m = 0; m < kMt; ++m) {
          load_a<T, false>(a[m], lane, stage, kRows, warp_row + m * 16, d);
        }
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          if (reaches(j, warp_row)) {
            FragB<T> b[2];
            load_b<T, false>(b, lane, stage + Shape::kRowBlock + j * kBlock, 64, d, warp_col * 16);
#pragma unroll
            for (int m = 0; m < kMt; ++m) {
              mma<kFast>(acc[m][2 * j], a[m], b[0]);
              mma<kFast>(acc[m][2 * j + 1], a[m], b[1]);
            }
          }
        }
      }
      if (step == steps_in - 1) {
        // Weight and mask; P goes to shared memory, its row sums stay exact.
        const int base_row = warp_row + g;
#pragma unroll
        for (int m0 = 0; m0 < kMt; m0 += kEighths / 2) {
          const int row = base_row + m0 * 16;
          A hi[kEighths], lo[kEighths], mul[kEighths], sum[kEighths];
#pragma unroll
          for (int q = 0; q < kEighths; ++q) {
            hi[q] = row_hi[row + 8 * q];
            lo[q] = row_lo[row + 8 * q];
            if constexpr (!kReverse) mul[q] = row_mul[row + 8 * q];
            sum[q] = A(0);
          }
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            if (reaches(j, warp_row)) {
#pragma unroll
              for (int n = 0; n < 2; ++n) {
                const int i = j * 64 + warp_col * 16 + n * 8 + 2 * t;
                // Row minus column, for the first of each.
                const int ahead = row0 + row - col0 - i;
#pragma unroll
                for (int q = 0; q < kEighths; ++q) {
                  A p[2];
#pragma unroll
                  for (int e = 0; e < 2; ++e) {
                    bool inside = kReverse ? ahead + 8 * q - e <= 0 && col0 + i + e < len
                                           : ahead + 8 * q - e >= 0;
                    A decay = exp2_fast((hi[q] + col_hi[i + e]) + (lo[q] + col_lo[i + e]));
                    A value = acc[m0 + q / 2][2 * j + n][2 * (q & 1) + e];
                    value *= kReverse ? col_mul[i + e] : mul[q];
                    if constexpr (kMode == kDq) value += row_add[row + 8 * q];
                    if constexpr (kMode == kDk) value += col_add[i + e];
                    p[e] = inside ? decay * value : A(0);
                    sum[q] += p[e];
                  }
                  sts_two(tile_address<T>(weights, kRows, row + 8 * q, i), pack<T>(p[0], p[1]));
                }
              }
            }
          }
          if constexpr (kMode == kH) {
#pragma unroll
            for (int q = 0; q < kEighths; ++q) {
              sum[q] = quad_sum(sum[q]);
              if (t == 0) sums[warp_col * kRows + row + 8 * q] = sum[q];
            }
          }
        }
#pragma unroll
        for (int m = 0; m < kMt; ++m) {
#pragma unroll
          for (int n = 0; n < kNa; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[m][n][e] = A(0);
          }
        }
      }
    } else if (step < 2 * steps_in) {
      if (with_n) {
        constexpr int kShare = kDepth / kPerRow;
        const int r = thread / kPerRow, from = thread % kPerRow * kShare;
        A dot_n = A(0);
#pragma unroll 8
        for (int i = 0; i < kShare; i += 2) {
          A x, y, u, v;
          unpack<T>(lds_two<T>(tile_address<T>(stage, kRows, r, from + i)), x, y);
          unpack<A>(lds_two<A>(stage + Shape::kTile + (from + i) * static_cast<int>(sizeof(A))), u,
                    v);
          dot_n += x * u + y * v;
        }
#pragma unroll
        for (int bit = 1; bit < kPerRow; bit <<= 1) {
          dot_n += __shfl_xor_sync(0xffffffffu, dot_n, bit);
        }
        if (thread % kPerRow == 0) row_sum[r] += dot_n;
      }
      warp_product<T, kFast, kMt, kNt, kNa, kDepth, !kFlip>(
          acc, stage, kRows, warp_row, 0, stage + Shape::kRowBlock, kFlip ? kWidth : kDepth, 0,
          warp_out, lane);
      if (step == 2 * steps_in - 1) {
        // A weight of zero forgets the state, NaN included.
        const int base_row = warp_row + g;
#pragma unroll
        for (int m = 0; m < kMt; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            int r = base_row + m * 16 + half * 8;
            A alpha = row_alpha[r], beta = row_beta[r];
#pragma unroll
            for (int n = 0; n < kNt; ++n) {
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                A& x = acc[m][n][2 * half + e];
                x = alpha == A(0) ? A(0) : alpha * x;
                if constexpr (kFlip) {
                  int d = out0 + warp_out + n * 8 + 2 * t + e;
                  if (beta != A(0) && d < dhqk_p) x += beta * block.state_n[d];
                }
              }
            }
          }
        }
      }
    } else if (!kFlip || step < last) {
      int j = step - 2 * steps_in;
      if (reaches(j, warp_row)) {
        warp_product<T, kFast, kMt, kNt, kNa, 64, true>(acc, weights, kRows, warp_row, j * 64,
                                                        stage, 64, 0, warp_out, lane);
      }
    } else {
      // q.dq or k.dk from the unrounded accumulators.
      const int base_row = warp_row + g;
#pragma unroll
      for (int m = 0; m < kMt; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int r = base_row + m * 16 + half * 8;
          A dot = A(0);
#pragma unroll
          for (int n = 0; n < kNt; ++n) {
            A x, y;
            unpack<T>(lds_two<T>(tile_address<T>(stage, kRows, r, warp_out + n * 8 + 2 * t)), x, y);
            dot += acc[m][n][2 * half] * x + acc[m][n][2 * half + 1] * y;
          }
          dot = quad_sum(dot);
          if (t == 0) sums[warp_col * kRows + r] = dot;
        }
      }
    }
  }

  if constexpr (kMode == kH) {
    __syncthreads();
    if (tid < rows) {
      A alpha = row_alpha[tid];
      A n = alpha == A(0) ? A(0) : alpha * row_sum[tid];
      n += (sums[tid] + sums[kRows + tid]) + (sums[2 * kRows + tid] + sums[3 * kRows + tid]);
      if (out0 == 0 && block.n != nullptr) block.n[tid * args.n.stride_s] = n;
      A inv = A(1);
      if (args.flags & kNormalize) {
        A floor = static_cast<const A*>(args.floor)[block.token0 + row0 + tid];
        n = n < A(0) ? -n : n;
        inv = A(1) / ((n < floor ? floor : n) + static_cast<A>(args.eps));
      }
      row_mul[tid] = inv;
    }
    __syncthreads();
  }

  // Out through the pipeline's next stage, which no warp reads any more.
  const uint32_t stage = stage_of(steps);
  const int g = (tid & 31) >> 2, t = tid & 3, warp_out = ((tid >> 5) & 3) * kNt * 8;
  const int warp_row = (tid >> 7) * (kRows / 2);
#pragma unroll
  for (int m = 0; m < kMt; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int r = warp_row + m * 16 + half * 8 + g;
      A factor = kMode == kH ? row_mul[r] : A(1);
#pragma unroll
      for (int n = 0; n < kNt; ++n) {
        sts_two(tile_address<T>(stage, kRows, r, warp_out + n * 8 + 2 * t),
                pack<T>(acc[m][n][2 * half] * factor, acc[m][n][2 * half + 1] * factor));
      }
    }
  }
  __syncthreads();
  store_tile<T, kRows, kWidth, 256>(stage, block.out, tensor_o.stride_s, rows, outer - out0,
                                    vector);
  if constexpr (kFlip) {
    if (tid < rows) {
      int64_t tokens = static_cast<int64_t>(args.b) * args.nh * args.s;
      A* dots = static_cast<A*>(kMode == kDq ? args.q_dq : args.k_dk) + out0 / kWidth * tokens;
      dots[block.token0 + row0 + tid] =
          (sums[tid] + sums[kRows + tid]) + (sums[2 * kRows + tid] + sums[3 * kRows + tid]);
    }
  }
}

// 64 rows (float64: 32) and 64 columns, for any data type and device. The wide ones (16-bit types,
// about 100 KB of shared memory) run two blocks per multiprocessor: on an H200 one block of
// 128 x 256 took 1.5 times as long, and 64 x 256 beat 128 x 128 for head dims above 128.
template <typename T>
using SmallSweep = SweepShape<T, sizeof(T) == 8 ? 32 : 64, 64, sizeof(T) == 2 ? 2 : 1, 2>;
static_assert(SmallSweep<double>::kBytes <= kSharedEverywhere);
template <typename T, int kCols>
using WideSweep = SweepShape<T, kCols == 256 ? 64 : 128, kCols, 2, 2>;

#define MLSTM_SWEEP(name, T, shape, mode, fast, blocks)     \
  extern "C" __global__ void __launch_bounds__(256, blocks) \
      name(const __grid_constant__ mlstm::Args args) {      \
    extern __shared__ __align__(128) unsigned char smem[];  \
    mlstm::sweep<T, shape, mlstm::mode, fast>(args, smem);  \
  }                                                         \
  MLSTM_GEOMETRY(name, (shape::kRows), (shape::kCols), 256, (shape::kBytes))
#define MLSTM_SMALL_SWEEP(name, T, mode, fast) \
  MLSTM_SWEEP(name##_small, T, mlstm::SmallSweep<T>, mode, fast, (sizeof(T) == 2 ? 2 : 1))
#define MLSTM_WIDE_SWEEP(name, T, cols, mode) \
  MLSTM_SWEEP(name##_##cols, T, MLSTM_COMMA(mlstm::WideSweep<T, cols>), mode, false, 2)
#define MLSTM_COMMA(...) __VA_ARGS__
// All of a base name; the _tf32 kernel rounds the products of float32 data.
#define MLSTM_ALL_SWEEPS(base, mode)                       \
  MLSTM_SMALL_SWEEP(base##_bf16, mlstm::bf16, mode, false) \
  MLSTM_SMALL_SWEEP(base##_f16, mlstm::f16, mode, false)   \
  MLSTM_SMALL_SWEEP(base##_f32, float, mode, false)        \
  MLSTM_SMALL_SWEEP(base##_tf32, float, mode, true)        \
  MLSTM_SMALL_SWEEP(base##_f64, double, mode, false)       \
  MLSTM_WIDE_SWEEP(base##_bf16, mlstm::bf16, 64, mode)     \
  MLSTM_WIDE_SWEEP(base##_bf16, mlstm::bf16, 128, mode)    \
  MLSTM_WIDE_SWEEP(base##_bf16, mlstm::bf16, 256, mode)    \
  MLSTM_WIDE_SWEEP(base##_f16, mlstm::f16, 64, mode)       \
  MLSTM_WIDE_SWEEP(base##_f16, mlstm::f16, 128, mode)      \
  MLSTM_WIDE_SWEEP(base##_f16, mlstm::f16, 256, mode)

}  // namespace mlstm
