// The warpgroup that makes the scores P of the backward's sweeps, with rows x and
// columns y of their table (backward_sm90.cuh):
//   dv    rows are keys, which see the queries from their own on; and rho = dh.h
//   dq    rows are queries; and delta of rho, in time for the state warpgroups
//   dk    rows are keys again
#pragma once

#include "backward_sm90.cuh"

namespace mlstm {

template <typename T, typename Shape>
struct Scorer {
  const BackwardBlock<T, Shape>& block;

  using Stages = Ring<Shape::kStages>;
  using Units = Ring<Shape::kKeyUnits>;
  using Slots = Ring<Shape::kQuerySlots>;
  using ScoreStages = Ring<Shape::kScoreStages>;
  static constexpr bool kForDq = Shape::kSweep == Sweep::kDq;
  static constexpr bool kForDk = Shape::kSweep == Sweep::kDk;

  // q' k'^T; tiles are released on the way.
  __device__ __forceinline__ void multiply(float (&x)[32], int i) const {
    const bool leader = threadIdx.x % 128 == 0;
    const int first = i * Shape::kSlabs;
#pragma unroll
    for (int j = 0; j < Shape::kSlabs; ++j) {
      const int slot = Slots::slot(first + j);
      const int unit = block.unit_of(i, j / Shape::kStateSlabs);
      if (j % Shape::kStateSlabs == 0) {
        barrier_wait(block.bar(kKeysFull, Units::slot(unit)), Units::phase(unit));
      }
      barrier_wait(block.bar(kQueriesFull, slot), Slots::phase(first + j));
      const uint64_t a = operand(block.query(slot), 16, 1024);
      const uint64_t b = operand(
          block.key(Units::slot(unit)) + j % Shape::kStateSlabs * kTileBytes, 16, 1024);
      pin<32>(x);
      wgmma_fence();
#pragma unroll
      for (int z = 0; z < 4; ++z) wgmma<0, 0>(x, a + 2 * z, b + 2 * z, j + z > 0, T{});
      wgmma_commit();
      if (j > 0) {
        wgmma_wait<1>();
        if (leader) barrier_arrive(block.bar(kQueriesEmpty, Slots::slot(first + j - 1)));
        if (j % Shape::kStateSlabs == 0 && leader) {
          barrier_arrive(block.bar(kKeysEmpty, Units::slot(block.unit_of(i, 0))));
        }
      }
    }
  }
  __device__ __forceinline__ void finish(float (&x)[32], int i) const {
    wgmma_wait<0>();
    pin<32>(x);
    if (threadIdx.x % 128 == 0) {
      const int unit = block.unit_of(i, Shape::kSplit ? 1 : 0);
      barrier_arrive(block.bar(kQueriesEmpty, Slots::slot((i + 1) * Shape::kSlabs - 1)));
      barrier_arrive(block.bar(kKeysEmpty, Units::slot(unit)));
    }
  }

  // P = D (x + delta) to shared memory, and zero where rows or columns are beyond the chunk's end.
  __device__ __forceinline__ void put(float (&x)[32], const float (&delta)[2], uint32_t tile,
                                      uint32_t vectors, int length) const {
    const int lane = opaque(static_cast<int>(threadIdx.x & 31));
    const int warp = opaque(static_cast<int>(threadIdx.x >> 5 & 3));
    const int r = warp * 16 + (lane >> 2), own = (lane & 3) * 2;
    const uint32_t rows = vectors + (kForDq ? kQueryRowAt : kKeyRowAt) + r * 4;
    const uint32_t columns = vectors + (kForDq ? kKeyColumnAt : kQueryColumnAt) + (lane & 3) * 64;
    const float row[2] = {load_shared(rows), load_shared(rows + 32)};
    // What a row sees ends, or for dv starts, at this column, counted from the thread's first one.
    int end[2];
#pragma unroll
    for (int z = 0; z < 2; ++z) {
      end[z] = r + 8 * z - own;
      if (kForDq && r + 8 * z >= length) end[z] = -64;
    }
    if (!kForDq && length < 64) {
      // The next sequence's queries do not count, whatever they are.
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        if (j / 4 * 8 + own + (j & 1) >= length) x[j] = 0.0f;
      }
    }
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const float4 col = load_shared_4(columns + j * 8);
      float4 shift = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (kForDk) shift = load_shared_4(vectors + kColumnDeltaAt + (lane & 3) * 64 + j * 8);
      uint32_t packed[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int y = (j + half) * 8;
        const float u0 = half == 0 ? col.x : col.z, u1 = half == 0 ? col.y : col.w;
#pragma unroll
        for (int z = 0; z < 2; ++z) {
          const float* product = x + 4 * (j + half) + 2 * z;
          const float add0 = kForDq ? delta[z] : half == 0 ? shift.x : shift.z;
          const float add1 = kForDq ? delta[z] : half == 0 ? shift.y : shift.w;
          constexpr bool kShifts = kForDq || kForDk;
          const float first = (kShifts ? product[0] + add0 : product[0]) * exp2_approx(row[z] + u0);
          const float second = (kShifts ? product[1] + add1 : product[1]) * exp2_approx(row[z] + u1);
          const bool sees_first = kForDq ? y <= end[z] : y >= end[z];
          const bool sees_second = kForDq ? y + 1 <= end[z] : y + 1 >= end[z];
          packed[2 * half + z] =
              pack_operand<T>(sees_first ? first : 0.0f, sees_second ? second : 0.0f);
        }
      }
      store_matrices(swizzled(tile, warp * 16 + (lane & 15), j + (lane >> 4)), packed);
    }
  }

  // ---- dv: rho

  // The block's part of dh.h of each token, by two threads.
  __device__ __forceinline__ void put_rho(int i, int chunk) const {
    using Owns = Ring<Shape::kOwnStages>;
    const int stage = Owns::slot(i);
    barrier_wait(block.bar(kOwnFull, stage), Owns::phase(i));
    const int thread = threadIdx.x % 128, t = thread >> 1, half = thread & 1;
    constexpr int kTiles = Shape::kColumns / 64;
    const int tile = kTiles == 2 ? half : 0;
    const uint32_t x = block.value(Stages::slot(i), tile), y = block.own(stage, tile);
    float sum = 0.0f;
    // Beyond the chunk's end others may be at work.
    const bool inside = t < block.length(chunk);
#pragma unroll
    for (int j = 0; inside && j < 4 * kTiles; ++j) {
      // Neighbours take different pieces at a time.
      const uint32_t at = swizzled(0, t, j ^ half << 2);
      const uint4 a = load_shared_16(x + at), b = load_shared_16(y + at);
      const uint32_t words[8] = {a.x, b.x, a.y, b.y, a.z, b.z, a.w, b.w};
#pragma unroll
      for (int z = 0; z < 8; z += 2) {
        float a0, a1, b0, b1;
        unpack<T>(words[z], a0, a1);
        unpack<T>(words[z + 1], b0, b1);
        sum += a0 * b0;
        sum += a1 * b1;
      }
    }
    __syncwarp();
    if ((thread & 31) == 0) barrier_arrive(block.bar(kOwnEmpty, stage));
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    if (half == 0) {
      const Args& args = block.args;
      const int64_t index = chunk_index(args, block.first + chunk, block.head);
      args.rho[(index * args.rho_parts + block.slab0 * 64 / Shape::kColumns) * 64 + t] = sum;
    }
  }

  // ---- dq: delta

  struct Delta {
    float delta, w_delta, dm;
  };

  // delta of each token for this warpgroup and, times w, for the others; by two threads.
  __device__ __forceinline__ Delta put_delta(int i) const {
    const int stage = Stages::slot(i), t = threadIdx.x % 128 >> 1;
    const uint32_t vectors = block.vectors(stage);
    const bool wanted = block.needs_rho();
    float rho = 0.0f;
#pragma unroll 1
    for (int part = threadIdx.x & 1; wanted && part < block.args.rho_parts; part += 2) {
      rho += load_shared(block.w_delta(stage) + part * 256 + t * 4);
    }
    rho += __shfl_xor_sync(0xffffffffu, rho, 1);
    const float sign = load_shared(vectors + kSignAt + t * 4);
    const float delta = sign == 0.0f ? 0.0f : sign * rho;
    const int column = column_order(t) * 4;
    const float w_delta = load_shared(vectors + kWsiAt + column) * delta;
    // All parts have been read before w delta takes their place.
    named_sync<kScoreBarrier, 128>();
    if ((threadIdx.x & 1) == 0) {
      store_shared(block.delta(stage) + t * 4, delta);
    } else {
      store_shared(block.w_delta(stage) + column, w_delta);
      barrier_arrive(block.bar(kDeltasFull, stage));
    }
    named_sync<kScoreBarrier, 128>();
    const float inv = load_shared(vectors + kInvAt + t * 4);
    return {delta, w_delta, -rho * static_cast<float>(block.args.eps) * inv};
  }
  // w delta for dk, and the gradient of m; in one of the head's blocks.
  __device__ __forceinline__ void leave_delta(const Delta& delta, int chunk) const {
    const Args& args = block.args;
    const int t = threadIdx.x % 128 >> 1;
    if (!block.is_first_slice() || !block.needs_rho() || t >= block.length(chunk)) return;
    if ((threadIdx.x & 1) == 0) {
      float* record =
          args.packed + chunk_index(args, block.first + chunk, block.head) * kBackwardFloats;
      record[kWDeltaAt / 4 + column_order(t)] = delta.w_delta;
      record[kColumnDeltaAt / 4 + column_order(t)] = delta.delta;
    } else if ((args.flags & kExponential) != 0) {
      float* dm = static_cast<float*>(args.dm) +
                  token_index(args, block.batch, block.head, block.start(chunk) + t);
      *dm = (args.parts_before != 0 ? *dm : 0.0f) + delta.dm;
    }
  }

  __device__ __forceinline__ void run() const {
    const bool rho = Shape::kSweep == Sweep::kDv && block.needs_rho();
    const int count = block.count;
    for (int i = 0; i < count; ++i) {
      const int chunk = block.chunk(i), stage = Stages::slot(i), to = ScoreStages::slot(i);
      barrier_wait(block.bar(kValuesFull, stage), Stages::phase(i));
      const uint32_t vectors = block.vectors(stage);
      float delta[2] = {0.0f, 0.0f};
      Delta left = {};
      if constexpr (kForDq) left = put_delta(i);
      float x[32];
      multiply(x, i);
      if constexpr (kForDq) {
        const int r = (threadIdx.x >> 5 & 3) * 16 + (threadIdx.x >> 2 & 7);
        delta[0] = load_shared(block.delta(stage) + r * 4);
        delta[1] = load_shared(block.delta(stage) + r * 4 + 32);
      }
      finish(x, i);
      barrier_wait(block.bar(kScoresEmpty, to), ScoreStages::phase(i) ^ 1);
      put(x, delta, block.score(to), vectors, block.length(chunk));
      async_proxy_fence();
      barrier_arrive(block.bar(kScoresFull, to));
      if constexpr (Shape::kSweep == Sweep::kDv) {
        if (rho) put_rho(i, chunk);
      }
      // Not before the fence, which would wait for it.
      if constexpr (kForDq) leave_delta(left, chunk);
      __syncwarp();
      if ((threadIdx.x & 31) == 0) barrier_arrive(block.bar(kValuesEmpty, stage));
    }
  }
};

}  // namespace mlstm
