// The warps of the Hopper forward that make the chunks' vectors from the gates on the way, where there are
// registers for them: see forward_sm90.cuh. Elsewhere gates_sm90.cu makes all vectors beforehand.
#pragma once

#include "gates_sm90.cuh"
#include "sweep_sm90.cuh"

namespace mlstm {

// A chunk takes a warp longer than the block. So they take turns, and hand on only m.
template <typename T, typename Shape>
struct GateVectors {
  const Block<T, Shape>& block;
  int warp;  // which of them

  static constexpr int kGateWarps = Shape::kGateWarps;

  // Chunks are counted from the first one that the block takes.
  __device__ __forceinline__ int chunk(int turn) const { return turn - block.before; }
  __device__ __forceinline__ LanePair load(const HeadGates& gates, int turn, int lane) const {
    const int i = chunk(turn);
    return load_pair(block.args, {block.start(i), block.row, block.length(i)}, gates, lane);
  }

  // m before a chunk, and what is done with it on the way to the next one's warp.
  __device__ __forceinline__ double receive(double initial, int turn, int lane) const {
    if (turn == 0) return initial;
    const int from = (turn - 1) % kGateWarps;
    barrier_wait(block.bar(kStabilized, from), (turn - 1) / kGateWarps & 1);
    return __shfl_sync(kFullWarp, lane == 0 ? *block.stabilizer(from) : 0.0, 0);
  }
  __device__ __forceinline__ void hand_on(double m, int turn, int lane) const {
    if (lane != 0) return;
    *block.stabilizer(turn % kGateWarps) = m;
    barrier_arrive(block.bar(kStabilized, turn % kGateWarps));
  }

  // Every kGateWarps-th chunk's, in order; and m.
  __device__ __forceinline__ void run() const {
    const Args& args = block.args;
    const int lane = threadIdx.x & 31;
    const bool exponential = (args.flags & kExponential) != 0;
    const bool writes_m = args.write_m != 0 && block.is_first_slice();
    const int turns = block.before + block.count;
    const double initial = exponential ? initial_m(args, block.row, block.head, kF32) : 0.0;
    HeadGates gates;
    LanePair next;
    if (warp < turns) {
      gates = head_gates(args, block.batch, block.head, block.start(chunk(warp)));
      next = load(gates, warp, lane);
    }
    for (int turn = warp; turn < turns; turn += kGateWarps) {
      const int i = chunk(turn), stage = Shape::stage(i);
      LanePair pair = next;
      take_logarithms(pair);
      float before = 0.0f;
      if (exponential) {
        const MaxPlusOf<float> effects = lane_effects(pair, lane);
        const MaxPlus all = {__shfl_sync(kFullWarp, effects.decay, 31),
                             __shfl_sync(kFullWarp, effects.floor, 31)};
        const double m = receive(initial, turn, lane);
        hand_on(apply(all, m), turn, lane);
        before = lane_m(effects, static_cast<float>(m), lane);
        if (turn + 1 == turns) finish(apply(all, m), lane);
      }
      const FastVectors x = fast_vectors(pair, before, exponential, lane);
      block.await_key(i);
      put_vectors(*static_cast<Packed<T>*>(__cvta_shared_to_generic(block.vectors(stage))), pair, x,
                  exponential, lane);
      if (lane == 0) store_shared(block.vectors(stage) + kDecayAt, exp2_approx(x.total));
      async_proxy_fence();
      barrier_arrive(block.bar(kKeyFull, stage));
      // Not before the fence, which would wait for them.
      gates.i.first += kGateWarps * 64 * gates.i.step;
      gates.f.first += kGateWarps * 64 * gates.f.step;
      if (turn + kGateWarps < turns) next = load(gates, turn + kGateWarps, lane);
      if (i >= 0 && writes_m) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int t = block.start(i) + 2 * lane + j;
          if (j < pair.count) at<float>(args.m, block.batch, block.head, t)[0] = x.m[j];
        }
      }
    }
    if (exponential && turns == 0 && warp == 0) finish(initial, lane);
  }

  __device__ __forceinline__ void finish(double m, int lane) const {
    if (!block.ends || !block.is_first_slice() || lane != 0) return;
    store_last_m<float>(block.args, block.row, block.head, m);
  }
};

}  // namespace mlstm
