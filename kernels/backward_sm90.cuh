// The chunkwise backward on Hopper: sweeps along the chunks of a sequence with the state in
// registers, like the forward's. A sweep is
//   O_x = alpha_x (S q'_x + e beta_x) + sum_y P_xy v'_y
//   S  <- g S + sum_y c_y v'_y k'_y^T     e <- g e + sum_y b_y v'_y
// with, in the terms of params.cuh (L = 64) and wsi = w s inv,
//         q'  k'  v'  S     alpha  alpha beta  c    b        P            order
//   dv    k   q   dh  dC^T  a                  wsi           D s inv q.k  backward
//   dq    dh  v   k   C     wsi    w delta     a    a        G            forward
//   dk    v   dh  q   dC    a      a           wsi  w delta  G            backward
//   c         v   k   C                        a    a                     forward
//   dc        dh  q   dC                       wsi                        backward
// where e is n or dn; c and dc leave the states that segments of long sequences add from zero.
// What each leaves for the next:
//   dv    rho = dh.h of each token, in parts
//   dq    for dk, delta, also times w, and where the state is split G; and C and n at boundaries, every
//         kGroupChunks chunks, to make <dC, C> + <dn, n> of; dm
//   both dq and dk the sums q.dq and k.dk of each token, for the gates' gradients
//
// Blocks of dq and dk hold all columns of DHHV, at most 512. Of a larger DHHV parts take turns, each at a
// dq and a dk of its own: delta is of rho over its columns, and O, dm, dn and E are sums over parts, while
// n is that of all. Each part but the last leaves its sum of O to the next.
//
// A block owns some columns of v' of one sequence and head, over one segment of its chunks. Each of
// its state warpgroups (backward_sweep_sm90.cuh) holds S for 64 of them, as rows, and O alike, so that
// S and c v' are A operands in registers. A warpgroup of its own makes P from the tiles of q' and k'
// (backward_scores_sm90.cuh; dk's split state gets it from memory), and the warps of another one bring
// one kind of tiles each.
#pragma once

#include "overlap.cuh"
#include "sweep_sm90.cuh"

namespace mlstm {

enum class Sweep { kDv, kDq, kDk, kC, kDc };

// Passed by value to the sweeps: copy descriptors as in HopperArgs, of G as (64, 64 tokens of each chunk
// and head), and of the sweep's part of a chunk's vectors and of all parts of its rho as rows.
struct BackwardArgs {
  TensorMap queries, keys, values, own, out, scores, vectors, rho;
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
  // Reads one more tensor: for dq and dk what its outputs are the gradients of, for dv h.
  static constexpr bool kOwn = kOutputs;

  // As in HopperShape.
  static constexpr int kSlabs = kSlabs_;
  static constexpr int kWgs = kWgs_;
  static constexpr int kDim = 64 * kSlabs;
  static constexpr bool kSplit = kSlabs > 4;
  static constexpr int kColumns = 64 * (kSplit ? 1 : kWgs);
  static constexpr int kStateSlabs = kSplit ? kSlabs / 2 : kSlabs;
  // Makes P itself. For dk's split state, which has enough to do, dq leaves it.
  static constexpr bool kScored =
      kSweep == Sweep::kDv || kSweep == Sweep::kDq || (kSweep == Sweep::kDk && !kSplit);
  static constexpr bool kLeavesScores = kSweep == Sweep::kDq && kSplit;
  static constexpr int kFirstState = kScored ? 2 : 1;  // warpgroups before those with the state
  static constexpr int kThreads = 128 * (kWgs + kFirstState);
  // Two states need more registers than an even share.
  static constexpr bool kUneven = kWgs == 2;
  static constexpr bool kLarge = kStateSlabs == 4;
  static constexpr int kStateRegisters = kScored ? (kLarge ? 208 : 184) : 232;
  static constexpr int kScoreRegisters = kLarge ? 64 : 80;
  static constexpr int kLoadRegisters = kScored ? (kLarge ? 32 : 64) : 40;
  using State = float[32 * kStateSlabs];

  // Rings of tiles: queries come by slabs, keys by what a warpgroup takes of them.
  static constexpr int kStages = kOutputs ? 2 : 3;
  static constexpr int kQuerySlots = !kOutputs ? 0 : kSplit ? kSlabs : kSlabs * kStages;
  static constexpr int kKeyUnits = kSplit ? 3 : kStages;
  static constexpr int kScoreStages = !kOutputs ? 0 : kSplit ? 1 : 2;
  static constexpr int kOwnStages = !kOwn ? 0 : kStateSlabs == 4 ? 1 : 2;
  static constexpr int kUnitBytes = kStateSlabs * kTileBytes;
  static constexpr int kValueBytes = kColumns / 64 * kTileBytes;
  // The part of a chunk's vectors that the sweep needs; src/cuda/hopper_backward.rs has the same.
  static constexpr int kVectorFrom = kSweep == Sweep::kDq ? kInvAt : kSourceAt;
  static constexpr int kVectorTo = kSweep == Sweep::kDv   ? kWDeltaAt
                                   : kSweep == Sweep::kDk ? kColumnDeltaAt + 256
                                                          : kKeyRowAt;
  static constexpr int kVectorBytes = kVectorTo - kVectorFrom;
  // In a stage after them, for dq, up to kMaxRho parts of rho for each token.
  static constexpr int kRhoAt = 1664;
  static constexpr int kMaxRho = 8;
  static constexpr int kVectorStage = kSweep == Sweep::kDq ? kRhoAt + kMaxRho * 256 : 1664;

  static constexpr int kQueryAt = 0;
  static constexpr int kKeyAt = kQueryAt + kQuerySlots * kTileBytes;
  static constexpr int kValueAt = kKeyAt + kKeyUnits * kUnitBytes;
  static constexpr int kScoreAt = kValueAt + kStages * kValueBytes;
  static constexpr int kOwnAt = kScoreAt + kScoreStages * kTileBytes;
  static constexpr int kOutputAt = kOwnAt + kOwnStages * kValueBytes;
  static constexpr int kExchangeAt = kOutputAt + (kOutputs ? kValueBytes : 0);
  static constexpr int kVectorAt = kExchangeAt + (kSplit && kOutputs ? 2 * kTileBytes : 0);
  static constexpr int kSumAt = kVectorAt + kStages * kVectorStage;  // [group][warp][64 tokens]
  static constexpr int kEntryAt = kSumAt + (kAlongQk && kOutputs ? (kSplit ? 1 : kWgs) * 1024 : 0);
  static constexpr int kBarrierAt = kEntryAt + kWgs * 256;
  static constexpr int kForgottenAt = kBarrierAt + 360;
  static constexpr int kBytes = kBarrierAt + 384 + 1024;
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
  kDeltasFull = 36,
  kOutputsFull = 39,  // by state warpgroup
  kOutputsEmpty = 41,
  kExchanged = 43,  // halves of outputs, of split states
  kExchangeFree = 44,
};
constexpr int kCleanBarrier = 6;  // named: all state warpgroups

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
  int key0;   // and of k', of which blocks of sweeps with outputs take all
  int segment;
  int count;      // chunks of the segment
  int from;       // its first chunk, counted in the sequence
  int total;      // chunks of the sequence
  int64_t first;  // its first chunk, counted in all
  bool ends;      // the sequence ends with it

  __device__ __forceinline__ BackwardBlock(const BackwardArgs& passed, uint32_t id, uint32_t smem)
      : maps(passed), args(passed.args), base(smem) {
    const uint32_t slices = div_up(Shape::kAlongQk ? args.dhqk : args.dhhv, Shape::kColumns);
    slab0 = static_cast<int>(id % slices) * (Shape::kColumns / 64);
    id /= slices;
    key0 = 0;
    if constexpr (!Shape::kOutputs) {
      const uint32_t parts = div_up(args.dhhv, Shape::kDim);
      key0 = static_cast<int>(id % parts) * Shape::kSlabs;
      id /= parts;
    }
    const uint32_t segments = args.segments - (Shape::kOutputs ? 0 : 1);
    segment = id % segments + (Shape::kSweep == Sweep::kDc ? 1 : 0);
    id /= segments;
    head = id % args.nh;
    row = id / args.nh;
    batch = batch_of(args, row);
  }

  // Computed anew, for those who seldom need it and have no registers to keep it in.
  __device__ __forceinline__ BackwardBlock again() const {
    BackwardBlock block(maps, opaque(static_cast<int>(blockIdx.x)), base);
    block.locate();
    return block;
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
    // What segments add is summed from its end on.
    return Shape::kReverse == Shape::kOutputs ? count - 1 - i : i;
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
    return base + Shape::kVectorAt + stage * Shape::kVectorStage - Shape::kVectorFrom;
  }
  // delta, in the order of rows, where its sign was, and w delta, in the order of columns, where rho
  // was.
  __device__ __forceinline__ uint32_t delta(int stage) const { return vectors(stage) + kSignAt; }
  __device__ __forceinline__ uint32_t w_delta(int stage) const {
    return vectors(stage) + Shape::kRhoAt;
  }
  // e of a state warpgroup's rows, of which this thread has two, with those of its lane modulo 4.
  __device__ __forceinline__ uint32_t entry(int group) const {
    const int thread = opaque(static_cast<int>(threadIdx.x));
    return base + Shape::kEntryAt + group * 256 + (thread >> 5 & 3) * 64 + (thread >> 2 & 7) * 4;
  }
  __device__ __forceinline__ uint32_t sums(int group) const {
    return base + Shape::kSumAt + (Shape::kSplit ? 0 : group) * 1024;
  }
  __device__ __forceinline__ uint32_t bar(BackwardBarrier which, int place) const {
    return base + Shape::kBarrierAt + (which + place) * 8;
  }
  // Whether what segments add is forgotten from the chunk in this stage on: state warpgroups stop, and so
  // do loads.
  __device__ __forceinline__ bool is_forgotten(int stage) const {
    return load_shared(base + Shape::kForgottenAt + stage * 4) != 0.0f;
  }
  __device__ __forceinline__ void set_forgotten(int stage, float x) const {
    store_shared(base + Shape::kForgottenAt + stage * 4, x);
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
      for (int stage = 0; stage < 3; ++stage) set_forgotten(stage, 0.0f);
      constexpr int kScored = Shape::kScored ? 1 : 0;
      constexpr int kFinal = Shape::kSplit ? 1 : Shape::kWgs;  // warpgroups that finish outputs
      for (int i = 0; i < 8; ++i) {
        barrier_init(bar(kQueriesFull, i), 1);
        barrier_init(bar(kQueriesEmpty, i), kFinal + kScored);
      }
      for (int i = 0; i < 3; ++i) {
        barrier_init(bar(kKeysFull, i), 1);
        barrier_init(bar(kKeysEmpty, i), kFinal + kScored);
        barrier_init(bar(kValuesFull, i), 1);
        barrier_init(bar(kValuesEmpty, i), 4 * (Shape::kWgs + kScored));
        barrier_init(bar(kDeltasFull, i), 64);
      }
      for (int i = 0; i < 2; ++i) {
        barrier_init(bar(kScoresFull, i), Shape::kScored ? 128 : 1);
        const bool leaves = Shape::kLeavesScores && is_first_slice();
        barrier_init(bar(kScoresEmpty, i), kFinal + (leaves ? 1 : 0));
        barrier_init(bar(kOutputsFull, i), 128);
        barrier_init(bar(kOutputsEmpty, i), 32);
        barrier_init(bar(kOwnFull, i), 1);
        barrier_init(bar(kOwnEmpty, i), 4 * (Shape::kAlongQk ? kFinal : 1));
      }
      barrier_init(bar(kExchanged, 0), 128);
      barrier_init(bar(kExchangeFree, 0), 128);
      barrier_init_fence();
    }
    __syncthreads();
  }

  // ---- loads and stores: each of the warps is for some kinds of tiles

  __device__ __forceinline__ void serve(int warp) const {
    if (warp == 3) {
      if constexpr (Shape::kOutputs) {
        if (args.parts_after == 0) store_outputs();
      }
    } else if (elect_one()) {
      if (warp == 0) {
        if constexpr (Shape::kOutputs) load_queries();
      } else if (warp == 1) {
        load_keys();
      } else {
        load_values();
      }
    }
  }

  __device__ __forceinline__ void load_queries() const {
    using Slots = Ring<Shape::kQuerySlots>;
    for (int i = 0; i < count; ++i) {
      const int token = start(chunk(i));
#pragma unroll 1
      for (int j = 0; j < Shape::kSlabs; ++j) {
        const int x = i * Shape::kSlabs + j;
        const uint32_t full = bar(kQueriesFull, Slots::slot(x));
        barrier_wait(bar(kQueriesEmpty, Slots::slot(x)), Slots::phase(x) ^ 1);
        barrier_expect(full, kTileBytes);
        load_box(query(Slots::slot(x)), &maps.queries, full, token, j, head, batch);
      }
    }
  }

  // And own tiles, where outputs are finished.
  __device__ __forceinline__ void load_keys() const {
    using Units = Ring<Shape::kKeyUnits>;
    constexpr int kParts = Shape::kSplit ? 2 : 1;
    for (int i = 0; i < count; ++i) {
      const int token = start(chunk(i));
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        const int x = i * kParts + j;
        const uint32_t full = bar(kKeysFull, Units::slot(x));
        barrier_wait(bar(kKeysEmpty, Units::slot(x)), Units::phase(x) ^ 1);
        if (!Shape::kOutputs && is_forgotten(Units::slot(x))) return await_loads(kKeysFull, i);
        barrier_expect(full, Shape::kUnitBytes);
        load_box(key(Units::slot(x)), &maps.keys, full, token, key0 + j * Shape::kStateSlabs, head,
                 batch);
      }
      if constexpr (Shape::kOwn) {
        using Owns = Ring<Shape::kOwnStages>;
        if constexpr (Shape::kAlongQk && Shape::kSplit) {
          // For the state warpgroups, which have no registers to load it early.
          if (args.parts_before != 0) prefetch(part_sums(i, 0), kPartBytes);
        }
        if (Shape::kAlongQk ? args.parts_after != 0 : !needs_rho()) continue;
        const uint32_t full = bar(kOwnFull, Owns::slot(i));
        barrier_wait(bar(kOwnEmpty, Owns::slot(i)), Owns::phase(i) ^ 1);
        barrier_expect(full, Shape::kValueBytes);
        load_box(own(Owns::slot(i), 0), &maps.own, full, token, slab0, head, batch);
      }
    }
    if constexpr (!Shape::kOutputs) await_loads(kKeysFull, count);
  }
  // The loads of the last stages: a block that stops early must not end before them.
  __device__ __forceinline__ void await_loads(BackwardBarrier full, int issued) const {
    using Stages = Ring<Shape::kStages>;
    for (int i = max(issued - Shape::kStages, 0); i < issued; ++i) {
      barrier_wait(bar(full, Stages::slot(i)), Stages::phase(i));
    }
  }

  // And scores, to or from memory.
  __device__ __forceinline__ void load_values() const {
    using Stages = Ring<Shape::kStages>;
    const bool leaves = Shape::kLeavesScores && is_first_slice();
    for (int i = 0; i < count; ++i) {
      const int stage = Stages::slot(i);
      const uint32_t full = bar(kValuesFull, stage);
      const int index = static_cast<int>(chunk_index(args, first + chunk(i), head));
      if (leaves && i >= Shape::kStages) leave_scores(i - Shape::kStages);
      barrier_wait(bar(kValuesEmpty, stage), Stages::phase(i) ^ 1);
      if (!Shape::kOutputs && is_forgotten(stage)) return await_loads(kValuesFull, i);
      const int rho = Shape::kSweep == Sweep::kDq && needs_rho() ? args.rho_parts * 256 : 0;
      barrier_expect(full, Shape::kValueBytes + Shape::kVectorBytes + rho);
      if (rho != 0) load_row(w_delta(stage), &maps.rho, full, index);
      load_row(vectors(stage) + Shape::kVectorFrom, &maps.vectors, full, index);
      load_box(value(stage, 0), &maps.values, full, start(chunk(i)), slab0, head, batch);
      if constexpr (Shape::kOutputs && !Shape::kScored) {
        using Scores = Ring<Shape::kScoreStages>;
        const uint32_t scores = bar(kScoresFull, Scores::slot(i));
        barrier_wait(bar(kScoresEmpty, Scores::slot(i)), Scores::phase(i) ^ 1);
        barrier_expect(scores, kTileBytes);
        load_box(score(Scores::slot(i)), &maps.scores, scores, index * 64, 0, 0, 0);
      }
    }
    if constexpr (!Shape::kOutputs) await_loads(kValuesFull, count);
    if (leaves) {
      for (int i = max(count - Shape::kStages, 0); i < count; ++i) leave_scores(i);
    }
  }
  __device__ __forceinline__ void leave_scores(int i) const {
    using Scores = Ring<Shape::kOutputs ? Shape::kScoreStages : 1>;
    const int64_t index = chunk_index(args, first + chunk(i), head);
    barrier_wait(bar(kScoresFull, Scores::slot(i)), Scores::phase(i));
    store_box(&maps.scores, score(Scores::slot(i)), static_cast<int>(index * 64), 0, 0, 0);
    store_commit();
    store_wait_read();
    barrier_arrive(bar(kScoresEmpty, Scores::slot(i)));
  }

  // By a warp. Finished tiles go to memory by the copy engine, unless the chunk ends within them and
  // the next sequence's tokens follow; and with dq and dk the sums q.dq and k.dk.
  __device__ __forceinline__ void store_outputs() const {
    constexpr int kTiles = Shape::kColumns / 64;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
#pragma unroll 1
      for (int j = 0; j < kTiles; ++j) {
        barrier_wait(bar(kOutputsFull, j), i & 1);
        const bool first_lane = (opaque(static_cast<int>(threadIdx.x)) & 31) == 0;
        if (unclean(chunk(i))) {
          again().store_rows(j, chunk(i));
        } else if (first_lane) {
          store_box(&maps.out, output(j), start(chunk(i)), slab0 + j, head, batch);
          store_commit();
        }
        if constexpr (Shape::kAlongQk) {
          if ((slab0 + j) * 64 < args.dhqk) again().store_sums(j, chunk(i));
        }
      }
      if ((opaque(static_cast<int>(threadIdx.x)) & 31) == 0) store_wait_read();
      for (int j = 0; j < kTiles; ++j) barrier_arrive(bar(kOutputsEmpty, j));
    }
  }
  __device__ __forceinline__ void store_rows(int j, int chunk) const {
    const int column = (slab0 + j) * 64, len = length(chunk);
    if (column >= (Shape::kAlongQk ? args.dhqk : args.dhhv)) return;
    const Tensor& out = Shape::kSweep == Sweep::kDv   ? args.dv
                        : Shape::kSweep == Sweep::kDq ? args.dq
                                                      : args.dk;
    const int piece = threadIdx.x & 7;
#pragma unroll 1
    for (int r = threadIdx.x / 8 % 4; r < len; r += 4) {
      T* row = at<T>(out, batch, head, start(chunk) + r) + column;
      reinterpret_cast<uint4*>(row)[piece] = load_shared_16(swizzled(output(j), r, piece));
    }
  }
  __device__ __forceinline__ void store_sums(int j, int chunk) const {
    const int64_t part = static_cast<int64_t>(slab0 + j) * args.b * args.nh * args.s;
    float* to = static_cast<float*>(Shape::kSweep == Sweep::kDq ? args.q_dq : args.k_dk) + part +
                token_index(args, batch, head, start(chunk));
    const int len = length(chunk);
#pragma unroll 1
    for (int t = threadIdx.x & 31; t < len; t += 32) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < 4; ++w) sum += load_shared(sums(j) + w * 256 + t * 4);
      to[t] = sum;
    }
  }

  // Where parts of DHHV leave their sum of the i-th chunk's O, of a state warpgroup's columns.
  static constexpr int kPartBytes = 64 * 64 * 4;
  __device__ __forceinline__ float4* part_sums(int i, int group) const {
    const int64_t side = Shape::kReverse ? args.num_chunks : 0;
    const int64_t index = chunk_index(args, side + first + chunk(i), head);
    return reinterpret_cast<float4*>(args.part_sums) +
           (index * (args.dhqk / 64) + column_of(group) / 64) * (kPartBytes / 16);
  }

  __device__ __forceinline__ bool needs_rho() const {
    return (args.flags & kNormalize) != 0 && (args.flags & kDetach) == 0;
  }
  // Whether it writes what all blocks of the head have alike.
  __device__ __forceinline__ bool is_first_slice() const { return slab0 == 0; }

  // A state warpgroup's first column of v' and of k'.
  __device__ __forceinline__ int column_of(int group) const {
    return (slab0 + (Shape::kSplit ? 0 : group)) * 64;
  }
  __device__ __forceinline__ int dim_of(int group) const {
    return key0 * 64 + (Shape::kSplit ? group * Shape::kDim / 2 : 0);
  }
};

}  // namespace mlstm
