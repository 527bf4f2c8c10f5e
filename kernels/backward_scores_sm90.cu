// The products of queries and keys of each chunk that the backward's sweeps (backward_sm90.cuh)
// multiply by values, rows of queries:
//   D s inv (q k^T)           for dv
//   D (s inv (dh v^T) + delta)   for dq and dk: G of params.cuh
// and delta itself with rho = dh.h, for they read the same tiles. One block per chunk and head: a warp
// that loads slabs of 64 columns (dh, v and h, then q and k) and a warpgroup that multiplies.
#include "overlap.cuh"
#include "sweep_sm90.cuh"

namespace mlstm {
namespace {

struct ScoreArgs {
  TensorMap q, k, v, dh, h, qk_scores, hv_scores;
  Args args;
};

constexpr int kRing = 4;  // slabs on their way
constexpr int kScoreThreads = 160;
constexpr int kRingBytes = 3 * kTileBytes;
constexpr int kTileAt = kRing * kRingBytes;
constexpr int kRhoAt = kTileAt + kTileBytes;
constexpr int kFullAt = kRhoAt + 2 * 256;
constexpr int kEmptyAt = kFullAt + kRing * 8;
constexpr int kScoresBytes = kEmptyAt + kRing * 8 + 1024;

template <typename T>
struct ChunkScores {
  const ScoreArgs& maps;
  const Args& args;
  uint32_t base;
  int64_t index;  // of chunk and head
  int head, batch, start, length;

  __device__ __forceinline__ uint32_t tile(int stage, int which) const {
    return base + stage * kRingBytes + which * kTileBytes;
  }
  __device__ __forceinline__ uint32_t full(int stage) const { return base + kFullAt + stage * 8; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return base + kEmptyAt + stage * 8; }
  __device__ __forceinline__ bool needs_rho() const {
    return (args.flags & kNormalize) != 0 && (args.flags & kDetach) == 0;
  }

  __device__ __forceinline__ void load() const {
    const int hv = args.dhhv / 64, steps = hv + args.dhqk / 64;
    for (int i = 0; i < steps; ++i) {
      const int stage = i % kRing;
      barrier_wait(empty(stage), (i / kRing & 1) ^ 1);
      if (i < hv) {
        const int tiles = needs_rho() ? 3 : 2;
        barrier_expect(full(stage), tiles * kTileBytes);
        load_box(tile(stage, 0), &maps.dh, full(stage), start, i, head, batch);
        load_box(tile(stage, 1), &maps.v, full(stage), start, i, head, batch);
        if (tiles == 3) load_box(tile(stage, 2), &maps.h, full(stage), start, i, head, batch);
      } else {
        barrier_expect(full(stage), 2 * kTileBytes);
        load_box(tile(stage, 0), &maps.q, full(stage), start, i - hv, head, batch);
        load_box(tile(stage, 1), &maps.k, full(stage), start, i - hv, head, batch);
      }
    }
  }

  // x += a b^T of one slab, after which f(stage) and the stage's release.
  template <typename F>
  __device__ __forceinline__ void multiply(float (&x)[32], int i, bool add, F meanwhile) const {
    const int stage = i % kRing;
    barrier_wait(full(stage), i / kRing & 1);
    const uint64_t a = operand(tile(stage, 0), 16, 1024), b = operand(tile(stage, 1), 16, 1024);
    pin<32>(x);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) wgmma<0, 0>(x, a + 2 * j, b + 2 * j, add || j > 0, T{});
    wgmma_commit();
    meanwhile(stage);
    wgmma_wait<0>();
    pin<32>(x);
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(empty(stage));
  }

  // A token's part of rho, half of the columns of a slab each for two threads.
  __device__ __forceinline__ float dot(int stage) const {
    const int row = threadIdx.x & 63, piece = threadIdx.x >> 6 << 2;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint4 x = load_shared_16(swizzled(tile(stage, 0), row, piece + j));
      const uint4 y = load_shared_16(swizzled(tile(stage, 2), row, piece + j));
      const uint32_t words[8] = {x.x, y.x, x.y, y.y, x.z, y.z, x.w, y.w};
#pragma unroll
      for (int z = 0; z < 8; z += 2) {
        float x0, x1, y0, y1;
        unpack<T>(words[z], x0, x1);
        unpack<T>(words[z + 1], y0, y1);
        sum += x0 * y0;
        sum += x1 * y1;
      }
    }
    return sum;
  }

  // D (x + extra) as a tile, and on to memory.
  __device__ __forceinline__ void put(const float (&x)[32], const float (&extra)[2],
                                      const float (&row)[2], const float4 (&col)[4],
                                      const TensorMap* map) const {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int r = warp * 16 + (lane >> 2), own = (lane & 3) * 2;
    // How far a row sees from the thread's first column on; rows beyond the chunk's end nothing.
    const int reach[2] = {r < length ? r - own : -64, r + 8 < length ? r + 8 - own : -64};
    const uint32_t out = base + kTileAt;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      uint32_t packed[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int y = (j + half) * 8;
        const float u0 = half == 0 ? col[j / 2].x : col[j / 2].z;
        const float u1 = half == 0 ? col[j / 2].y : col[j / 2].w;
#pragma unroll
        for (int z = 0; z < 2; ++z) {
          const float* own_x = x + 4 * (j + half) + 2 * z;
          const float first = (own_x[0] + extra[z]) * exp2_approx(row[z] + u0);
          const float second = (own_x[1] + extra[z]) * exp2_approx(row[z] + u1);
          packed[2 * half + z] = pack_operand<T>(reach[z] >= y ? first : 0.0f,
                                                 reach[z] >= y + 1 ? second : 0.0f);
        }
      }
      store_matrices(swizzled(out, warp * 16 + (lane & 15), j + (lane >> 4)), packed);
    }
    async_proxy_fence();
    named_sync<1, 128>();
    if (threadIdx.x == 0) {
      store_box(map, out, static_cast<int>(index * 64), 0, 0, 0);
      store_commit();
    }
  }

  __device__ __forceinline__ void run() const {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int r = warp * 16 + (lane >> 2);
    float* record = args.packed + index * kBackwardFloats;
    const float row[2] = {record[kScoreRowAt / 4 + r], record[kScoreRowAt / 4 + r + 8]};
    float4 col[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      col[j] = *reinterpret_cast<const float4*>(record + kScoreColAt / 4 + (lane & 3) * 16 + j * 4);
    }
    const int hv = args.dhhv / 64, qk = args.dhqk / 64;
    const bool rho_wanted = needs_rho();
    float x[32];
    float rho = 0.0f;
    for (int i = 0; i < hv; ++i) {
      multiply(x, i, i > 0, [&](int stage) {
        if (rho_wanted) rho += dot(stage);
      });
    }
    float delta[2] = {0.0f, 0.0f};
    if (rho_wanted) {
      store_shared(base + kRhoAt + threadIdx.x * 4, rho);
      named_sync<1, 128>();
#pragma unroll
      for (int z = 0; z < 2; ++z) {
        const uint32_t at_row = base + kRhoAt + (r + 8 * z) * 4;
        const float sign = record[kSignAt / 4 + r + 8 * z];
        if (sign != 0.0f) delta[z] = sign * (load_shared(at_row) + load_shared(at_row + 256));
      }
    }
    put_vectors(record, rho_wanted);
    put(x, delta, row, col, &maps.hv_scores);
    for (int i = 0; i < qk; ++i) multiply(x, hv + i, i > 0, [](int) {});
    if (threadIdx.x == 0) store_wait_read();
    named_sync<1, 128>();
    const float none[2] = {0.0f, 0.0f};
    put(x, none, row, col, &maps.qk_scores);
    if (threadIdx.x == 0) store_wait();
  }

  // w delta, and dm per token.
  __device__ __forceinline__ void put_vectors(float* record, bool rho_wanted) const {
    const int t = threadIdx.x;
    if (t >= length) return;
    const int column = column_order(t);
    float rho = 0.0f;
    if (rho_wanted) {
      rho = load_shared(base + kRhoAt + t * 4) + load_shared(base + kRhoAt + t * 4 + 256);
      const float sign = record[kSignAt / 4 + t];
      if (sign != 0.0f) record[kWDeltaAt / 4 + column] = record[kWsiAt / 4 + column] * sign * rho;
    }
    if ((args.flags & kExponential) != 0) {
      const float dm = -rho * static_cast<float>(args.eps) * record[kInvAt / 4 + t];
      static_cast<float*>(args.dm)[token_index(args, batch, head, start + t)] = dm;
    }
  }
};

template <typename T>
__device__ __forceinline__ void chunk_scores(const ScoreArgs& maps, unsigned char* smem) {
  const Args& args = maps.args;
  const uint32_t base = (shared_address(smem) + 1023) & ~1023u;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kRing; ++i) {
      barrier_init(base + kFullAt + i * 8, 1);
      barrier_init(base + kEmptyAt + i * 8, 4);
    }
    barrier_init_fence();
  }
  __syncthreads();
  wait_for_previous();
  start_dependents();
  const int64_t c = blockIdx.x / args.nh;
  const int head = static_cast<int>(blockIdx.x % args.nh);
  const Chunk chunk = chunk_at(args, c);
  if (chunk.len == 0) return;
  const ChunkScores<T> scores{maps,
                              args,
                              base,
                              chunk_index(args, c, head),
                              head,
                              batch_of(args, chunk.row),
                              static_cast<int>(chunk.start),
                              chunk.len};
  if (__shfl_sync(0xffffffffu, threadIdx.x >> 5, 0) == 4) {
    if (elect_one()) scores.load();
  } else {
    scores.run();
  }
}

}  // namespace
}  // namespace mlstm

#define MLSTM_SCORES(NAME, T)                                       \
  extern "C" __global__ void __launch_bounds__(mlstm::kScoreThreads, 2) \
      NAME(const __grid_constant__ mlstm::ScoreArgs args) {         \
    extern __shared__ unsigned char smem[];                         \
    mlstm::chunk_scores<T>(args, smem);                             \
  }                                                                 \
  MLSTM_GEOMETRY(NAME, 1, 1, mlstm::kScoreThreads, mlstm::kScoresBytes)
MLSTM_SCORES(backward_scores_bf16, mlstm::bf16)
MLSTM_SCORES(backward_scores_f16, mlstm::f16)
