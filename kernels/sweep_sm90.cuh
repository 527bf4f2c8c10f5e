// What the sweeps of the Hopper forward and backward share: tiles, and how two warpgroups with halves of a
// state put their outputs together.
#pragma once

#include "params.cuh"
#include "ptx_sm90.cuh"
#include "tile.cuh"
#include "wgmma_sm90.cuh"

namespace mlstm {

constexpr int kTileBytes = 64 * 128;  // 64 tokens x 64 dims of 16 bits

constexpr int kScoreBarrier = 3;  // named: the warpgroup that makes scores

// A 16-byte piece of a row in a tile of 128-byte rows.
__device__ __forceinline__ uint32_t swizzled(uint32_t tile, int row, int piece) {
  return tile + row * 128 + ((piece ^ (row & 7)) << 4);
}

// Where two warpgroups hold halves of a state's columns, the second gives its part of a chunk's outputs
// (the i-th) through shared memory to the first, which adds it. All threads arrive at both barriers.
__device__ __forceinline__ void give_outputs(const float (&o)[32], int i, uint32_t exchange,
                                             uint32_t full, uint32_t empty) {
  barrier_wait(empty, (i & 1) ^ 1);
  const uint32_t to = exchange + threadIdx.x % 128 * 16;
#pragma unroll
  for (int x = 0; x < 8; ++x) {
    store_shared_4(to + x * 2048, o[4 * x], o[4 * x + 1], o[4 * x + 2], o[4 * x + 3]);
  }
  barrier_arrive(full);
}
__device__ __forceinline__ void take_outputs(float (&o)[32], int i, uint32_t exchange,
                                             uint32_t full, uint32_t empty) {
  barrier_wait(full, i & 1);
  const uint32_t from = exchange + threadIdx.x % 128 * 16;
#pragma unroll
  for (int x = 0; x < 8; ++x) {
    const float4 part = load_shared_4(from + x * 2048);
    o[4 * x] += part.x;
    o[4 * x + 1] += part.y;
    o[4 * x + 2] += part.z;
    o[4 * x + 3] += part.w;
  }
  barrier_arrive(empty);
}

}  // namespace mlstm
