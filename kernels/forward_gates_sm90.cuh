// The warps of the Hopper forward that make the chunks' vectors from the gates on the way, where there are
// registers for them: see forward_sm90.cuh. Elsewhere gates_sm90.cu makes all vectors beforehand.
#pragma once

#include "forward_states_sm90.cuh"
#include "gates_sm90.cuh"

namespace mlstm {

// A chunk takes a warp longer than the block. So warps take turns, and hand on m.
template <typename T, typename Shape>
struct GateVectors {
  const Block<T, Shape>& block;
  int warp;  // which of them

  static constexpr int kTurns = Shape::kGateWarps;

  __device__ __forceinline__ LanePair load(const HeadGates& gates, int i, int lane) const {
    return load_pair(block.args, {block.start(i), block.row, block.length(i)}, gates, lane);
  }

  // m before a chunk.
  __device__ __forceinline__ double receive(double initial, int i, int lane) const {
    if (i == 0) return initial;
    const int from = (i - 1) % kTurns;
    barrier_wait(block.bar(kStabilized, from), (i - 1) / kTurns & 1);
    return __shfl_sync(kFullWarp, lane == 0 ? *block.stabilizer(from) : 0.0, 0);
  }
  // m after it.
  __device__ __forceinline__ void hand_on(double m, int i, int lane) const {
    if (lane != 0) return;
    *block.stabilizer(i % kTurns) = m;
    barrier_arrive(block.bar(kStabilized, i % kTurns));
    if (i + 1 == block.count) finish(m);
  }
  __device__ __forceinline__ void finish(double m) const {
    if (block.is_first_slice()) store_last_m<float>(block.args, block.row, block.head, m);
  }

  // Every kTurns-th chunk's, in order; and m.
  __device__ __forceinline__ void run() const {
    const Args& args = block.args;
    const int lane = threadIdx.x & 31;
    const bool exponential = (args.flags & kExponential) != 0;
    const bool writes_m = args.write_m != 0 && block.is_first_slice();
    const double initial = exponential ? initial_m(args, block.row, block.head, kF32) : 0.0;
    if (block.count == 0 && exponential && warp == 0 && lane == 0) finish(initial);
    if (warp >= block.count) return;
    HeadGates gates = head_gates(args, block.batch, block.head, block.start(warp));
    LanePair next = load(gates, warp, lane);
    for (int i = warp; i < block.count; i += kTurns) {
      const int stage = Shape::stage(i);
      LanePair pair = next;
      take_logarithms(pair);
      float m = 0.0f;
      if (exponential) {
        const MaxPlusOf<float> upto = lane_effects(pair, lane);
        const MaxPlus all = {__shfl_sync(kFullWarp, upto.decay, 31),
                             __shfl_sync(kFullWarp, upto.floor, 31)};
        const double before = receive(initial, i, lane);
        hand_on(apply(all, before), i, lane);
        m = lane_m(upto, static_cast<float>(before), lane);
      }
      const FastVectors x = fast_vectors(pair, m, exponential, lane);
      block.await_key(i);
      put_vectors(*static_cast<Packed<T>*>(__cvta_shared_to_generic(block.vectors(stage))), pair, x,
                  exponential, lane);
      if (lane == 0) store_shared(block.vectors(stage) + kDecayAt, exp2_approx(x.total));
      async_proxy_fence();
      barrier_arrive(block.bar(kKeyFull, stage));
      // Not before the fence, which would wait for them.
      gates.i.first += kTurns * 64 * gates.i.step;
      gates.f.first += kTurns * 64 * gates.f.step;
      if (i + kTurns < block.count) next = load(gates, i + kTurns, lane);
      if (!writes_m) continue;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int t = block.start(i) + 2 * lane + j;
        if (j < pair.count) at<float>(args.m, block.batch, block.head, t)[0] = x.m[j];
      }
    }
  }
};

}  // namespace mlstm
