// The chunkwise backward on Hopper: sweeps along the chunks of a sequence with the state in
// registers, like the forward's, but with the products of queries and keys made before, for all
// chunks side by side (backward_scores_sm90.cu). A sweep is
//   O_x = alpha_x (S q'_x + e beta_x) + sum_y P_xy v'_y
//   S  <- g S + sum_y c_y v'_y k'_y^T     e <- g e + sum_y b_y v'_y
// with, in the terms of params.cuh (L = 64) and wsi = w s inv,
//         q'  k'  v'  S     alpha  alpha beta  c    b          P            order
//   dv    k   q   dh  dC^T  a      -           wsi  -          D s inv q.k  backward
//   dq    dh  v   k   C     wsi    w delta     a    a          G            forward
//   dk    v   dh  q   dC    a      a           wsi  w delta    G            backward
//   c         v   k   C                        a    a                       forward
//   dc        dh  q   dC                       wsi  w delta                 backward
// where e is n or dn; c and dc leave the states that segments of long sequences add from zero.
// dq also leaves C and n at boundaries, every kGroupChunks chunks, for dk to make <dC, C> + <dn, n>
// of, and both the sums q.dq and k.dk of each token, for the gates' gradients.
//
// A block owns some columns of v' of one sequence and head, over one segment of its chunks. Each of
// its state warpgroups holds S for 64 of them, as rows, and O alike, so that S and c v' are A
// operands in registers; a fourth of the other warpgroup's warps each bring one kind of tiles.
#pragma once

#include "overlap.cuh"
#include "sweep_sm90.cuh"

namespace mlstm {

enum class Sweep { kDv, kDq, kDk, kC, kDc };

// Passed by value to the sweeps: copy descriptors as in HopperArgs, of both score tensors as
// (64, 64 tokens of each chunk and head).
struct BackwardArgs {
  TensorMap queries, keys, values, own, out, scores, vectors;
  Args args;
};

template <int kSlabs_, int kWgs_, Sweep kSweep_>
struct BackwardShape {
  static constexpr Sweep kSweep = kSweep_;
  static constexpr bool kOutputs =
      kSweep == Sweep::kDv || kSweep == Sweep::kDq || kSweep == Sweep::kDk;
  static constexpr bool kReverse =
      kSweep == Sweep::kDv || kSweep == Sweep::kDk || kSweep == Sweep::kDc;
  // Rows of S are columns of DHQK, and n is beside it.
  static constexpr bool kAlongQk = kSweep != Sweep::kDv;
  // Reads the tile (q or k) that its outputs are the gradients of.
  static constexpr bool kOwn = kSweep == Sweep::kDq || kSweep == Sweep::kDk;

  // As in HopperShape.
  static constexpr int kSlabs = kSlabs_;
  static constexpr int kWgs = kWgs_;
  static constexpr int kDim = 64 * kSlabs;
  static constexpr bool kSplit = kSlabs > 4;
  static constexpr int kColumns = 64 * (kSplit ? 1 : kWgs);
  static constexpr int kStateSlabs = kSplit ? kSlabs / 2 : kSlabs;
  static constexpr int kThreads = 128 * (kWgs + 1);
  static constexpr bool kUneven = kWgs == 2;
  static constexpr int kStateRegisters = 232;
  static constexpr int kLoadRegisters = 40;
  using State = float[32 * kStateSlabs];

  // Rings of tiles: queries come by slabs, keys by what a warpgroup takes of them.
  static constexpr int kStages = kOutputs ? 2 : 3;
  static constexpr int kQuerySlots = !kOutputs ? 0 : kSplit ? kSlabs : kSlabs * kStages;
  static constexpr int kKeyUnits = kSplit ? 3 : kStages;
  static constexpr int kScoreStages = !kOutputs ? 0 : kSplit ? 1 : 2;
  static constexpr int kOwnStages = !kOwn ? 0 : kStateSlabs == 4 ? 1 : 2;
  static constexpr int kUnitBytes = kStateSlabs * kTileBytes;
  static constexpr int kValueBytes = kColumns / 64 * kTileBytes;
  static constexpr int kVectorBytes = kSweepFloats * 4;
  static constexpr int kVectorStage = 1024;

  static constexpr int kQueryAt = 0;
  static constexpr int kKeyAt = kQueryAt + kQuerySlots * kTileBytes;
  static constexpr int kValueAt = kKeyAt + kKeyUnits * kUnitBytes;
  static constexpr int kScoreAt = kValueAt + kStages * kValueBytes;
  static constexpr int kOwnAt = kScoreAt + kScoreStages * kTileBytes;
  static constexpr int kOutputAt = kOwnAt + kOwnStages * kValueBytes;
  static constexpr int kExchangeAt = kOutputAt + (kOutputs ? kValueBytes : 0);
  static constexpr int kVectorAt = kExchangeAt + (kSplit && kOutputs ? 2 * kTileBytes : 0);
  static constexpr int kSumAt = kVectorAt + kStages * kVectorStage;  // [group][warp][64 tokens]
  static constexpr int kBarrierAt = kSumAt + (kOwn ? kWgs * 1024 : 0);
  static constexpr int kBytes = kBarrierAt + 320 + 1024;
};

// Where each kind of barriers starts, counted in barriers.
enum BackwardBarrier : int {
  kQueriesFull = 0,
  kQueriesEmpty = 8,
  kKeysFull = 16,
  kKeysEmpty = 19,
  kValuesFull = 22,  // vectors too
  kValuesEmpty = 25,
  kScoresFull = 28,
  kScoresEmpty = 30,
  kOwnFull = 32,
  kOwnEmpty = 34,
};
constexpr int kCleanBarrier = 3;  // named: all state warpgroups

// One of a ring's places, for the i-th tile.
template <int kCount>
struct Ring {
  static __device__ __forceinline__ int slot(int i) { return i % kCount; }
  static __device__ __forceinline__ uint32_t phase(int i) { return i / kCount & 1; }
};

template <typename T, typename Shape>
struct BackwardBlock {
  const BackwardArgs& maps;
  const Args& args;
  uint32_t base;
  int row, head, batch;
  int slab0;  // first of the block's 64-column slabs of v'
  int segment;
  int count;      // chunks of the segment
  int from;       // its first chunk, counted in the sequence
  int total;      // chunks of the sequence
  int64_t first;  // its first chunk, counted in all
  bool ends;      // the sequence ends with it

  __device__ __forceinline__ BackwardBlock(const BackwardArgs& passed, unsigned char* smem)
      : maps(passed), args(passed.args), base((shared_address(smem) + 1023) & ~1023u) {
    uint32_t id = blockIdx.x;
    const uint32_t slices = div_up(Shape::kAlongQk ? args.dhqk : args.dhhv, Shape::kColumns);
    slab0 = static_cast<int>(id % slices) * (Shape::kColumns / 64);
    id /= slices;
    const uint32_t segments = args.segments - (Shape::kOutputs ? 0 : 1);
    segment = id % segments + (Shape::kSweep == Sweep::kDc ? 1 : 0);
    id /= segments;
    head = id % args.nh;
    row = id / args.nh;
    batch = batch_of(args, row);
  }

  __device__ __forceinline__ void locate() {
    const int64_t begin = first_chunk(args, row);
    total = static_cast<int>(first_chunk(args, row + 1) - begin);
    const int per = chunks_per_segment(args, total);
    from = min(segment * per, total);
    count = min(per, total - from);
    first = begin + from;
    ends = total == 0 ? segment == 0 : count > 0 && from + count == total;
  }

  // ---- chunks, in the order of the sweep

  __device__ __forceinline__ int chunk(int i) const {
    return Shape::kReverse ? count - 1 - i : i;
  }
  __device__ __forceinline__ int start(int chunk) const {
    return args.chunks != nullptr ? static_cast<int>(args.chunks[first + chunk].start)
                                  : (from + chunk) * 64;
  }
  __device__ __forceinline__ int length(int chunk) const {
    if (args.chunks != nullptr) return args.chunks[first + chunk].len;
    return min(static_cast<int>(args.s) - start(chunk), 64);
  }
  __device__ __forceinline__ bool unclean(int chunk) const {
    return args.chunks != nullptr && length(chunk) < 64;
  }

  // ---- shared memory

  __device__ __forceinline__ uint32_t query(int slot) const {
    return base + Shape::kQueryAt + slot * kTileBytes;
  }
  __device__ __forceinline__ uint32_t key(int unit) const {
    return base + Shape::kKeyAt + unit * Shape::kUnitBytes;
  }
  __device__ __forceinline__ uint32_t value(int stage, int group) const {
    return base + Shape::kValueAt + stage * Shape::kValueBytes + tile_of(group);
  }
  __device__ __forceinline__ uint32_t score(int stage) const {
    return base + Shape::kScoreAt + stage * kTileBytes;
  }
  __device__ __forceinline__ uint32_t own(int stage, int group) const {
    return base + Shape::kOwnAt + stage * Shape::kValueBytes + tile_of(group);
  }
  __device__ __forceinline__ uint32_t output(int group) const {
    return base + Shape::kOutputAt + tile_of(group);
  }
  __device__ __forceinline__ uint32_t exchange() const { return base + Shape::kExchangeAt; }
  __device__ __forceinline__ uint32_t vectors(int stage) const {
    return base + Shape::kVectorAt + stage * Shape::kVectorStage;
  }
  __device__ __forceinline__ uint32_t sums(int group) const {
    return base + Shape::kSumAt + (Shape::kSplit ? 0 : group) * 1024;
  }
  __device__ __forceinline__ uint32_t bar(BackwardBarrier which, int place) const {
    return base + Shape::kBarrierAt + (which + place) * 8;
  }
  static __device__ __forceinline__ int tile_of(int group) {
    return Shape::kSplit ? 0 : group * kTileBytes;
  }
  // A warpgroup's tile of k' in the i-th chunk.
  static __device__ __forceinline__ int unit_of(int i, int group) {
    return Shape::kSplit ? 2 * i + group : i;
  }

  __device__ __forceinline__ void prepare() const {
    if (threadIdx.x == 0) {
      constexpr int kWgs = Shape::kWgs;
      constexpr int kFinal = Shape::kSplit ? 1 : kWgs;  // warpgroups that finish outputs
      for (int i = 0; i < 8; ++i) {
        barrier_init(bar(kQueriesFull, i), 1);
        barrier_init(bar(kQueriesEmpty, i), kFinal);
      }
      for (int i = 0; i < 3; ++i) {
        barrier_init(bar(kKeysFull, i), 1);
        barrier_init(bar(kKeysEmpty, i), kFinal);
        barrier_init(bar(kValuesFull, i), 1);
        barrier_init(bar(kValuesEmpty, i), 4 * kWgs);
      }
      for (int i = 0; i < 2; ++i) {
        barrier_init(bar(kScoresFull, i), 1);
        barrier_init(bar(kScoresEmpty, i), kFinal);
        barrier_init(bar(kOwnFull, i), 1);
        barrier_init(bar(kOwnEmpty, i), 4 * kFinal);
      }
      barrier_init_fence();
    }
    __syncthreads();
  }

  // ---- loads: each of the warps brings one kind of tiles

  __device__ __forceinline__ void load(int warp) const {
    if (!elect_one()) return;
    if (warp == 0 && Shape::kOutputs) {
      for (int i = 0; i < count; ++i) {
        const int token = start(chunk(i));
#pragma unroll 1
        for (int j = 0; j < Shape::kSlabs; ++j) {
          using Slots = Ring<Shape::kOutputs ? Shape::kQuerySlots : 1>;
          const int x = i * Shape::kSlabs + j;
          const uint32_t full = bar(kQueriesFull, Slots::slot(x));
          barrier_wait(bar(kQueriesEmpty, Slots::slot(x)), Slots::phase(x) ^ 1);
          barrier_expect(full, kTileBytes);
          load_box(query(Slots::slot(x)), &maps.queries, full, token, j, head, batch);
        }
      }
    } else if (warp == 1) {
      constexpr int kParts = Shape::kSplit ? 2 : 1;
      for (int i = 0; i < count; ++i) {
        const int token = start(chunk(i));
#pragma unroll
        for (int j = 0; j < kParts; ++j) {
          using Units = Ring<Shape::kKeyUnits>;
          const int x = i * kParts + j;
          const uint32_t full = bar(kKeysFull, Units::slot(x));
          barrier_wait(bar(kKeysEmpty, Units::slot(x)), Units::phase(x) ^ 1);
          barrier_expect(full, Shape::kUnitBytes);
          load_box(key(Units::slot(x)), &maps.keys, full, token, j * Shape::kStateSlabs, head,
                   batch);
        }
      }
    } else if (warp == 2) {
      for (int i = 0; i < count; ++i) {
        using Stages = Ring<Shape::kStages>;
        using Scores = Ring<Shape::kOutputs ? Shape::kScoreStages : 1>;
        const int stage = Stages::slot(i);
        const uint32_t full = bar(kValuesFull, stage);
        const int64_t index = chunk_index(args, first + chunk(i), head);
        barrier_wait(bar(kValuesEmpty, stage), Stages::phase(i) ^ 1);
        barrier_expect(full, Shape::kValueBytes + Shape::kVectorBytes);
        load_bytes(vectors(stage), args.packed + index * kBackwardFloats, Shape::kVectorBytes, full);
        load_box(value(stage, 0), &maps.values, full, start(chunk(i)), slab0, head, batch);
        if (Shape::kOutputs) {
          const uint32_t scores = bar(kScoresFull, Scores::slot(i));
          barrier_wait(bar(kScoresEmpty, Scores::slot(i)), Scores::phase(i) ^ 1);
          barrier_expect(scores, kTileBytes);
          load_box(score(Scores::slot(i)), &maps.scores, scores, static_cast<int>(index * 64), 0, 0,
                   0);
        }
      }
    } else if (Shape::kOwn) {
      for (int i = 0; i < count; ++i) {
        using Owns = Ring<Shape::kOwn ? Shape::kOwnStages : 1>;
        const uint32_t full = bar(kOwnFull, Owns::slot(i));
        barrier_wait(bar(kOwnEmpty, Owns::slot(i)), Owns::phase(i) ^ 1);
        barrier_expect(full, Shape::kValueBytes);
        load_box(own(Owns::slot(i), 0), &maps.own, full, start(chunk(i)), slab0, head, batch);
      }
    }
  }

  // A state warpgroup's first column of v' and of k'.
  __device__ __forceinline__ int column_of(int group) const {
    return (slab0 + (Shape::kSplit ? 0 : group)) * 64;
  }
  static __device__ __forceinline__ int dim_of(int group) {
    return Shape::kSplit ? group * Shape::kDim / 2 : 0;
  }

  static __device__ __forceinline__ void sync_group(int group) {
    if (group == 0) {
      named_sync<1, 128>();
    } else {
      named_sync<2, 128>();
    }
  }
};

}  // namespace mlstm
