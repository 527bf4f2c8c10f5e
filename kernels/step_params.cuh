// What the host passes to the step kernels; src/cuda/params.rs mirrors it.
#pragma once

#include "params.cuh"

namespace mlstm {

// One number per row: int32, int64 or (flags) uint8.
struct RowIndex {
  const void* data;  // null if absent
  int64_t stride;
  int64_t size;  // bytes of one element
};

struct StepArgs {
  int64_t num_slots;
  int32_t b;
  int32_t nh;
  int32_t tokens;  // S, 1 to 16
  int32_t dhqk;
  int32_t dhhv;
  int32_t flags;
  int32_t dtype;  // of q, k, v, h
  int32_t gate_dtype;
  double qk_scale;
  double eps;
  Tensor q, k, v, i, f, h;
  // Pools: b = slot, h = head, s = DHQK row of C. n and m are Acc.
  Tensor c, n, m, c_dst, n_dst, m_dst;
  RowIndex src_slots, dst_slots, has_state, num_tokens;
  // Workspace: [B * NH][S] of {decay, gain, scale} in Acc.
  void* scalars;
};

static_assert(sizeof(StepArgs) == 544, "src/cuda/params.rs has the same size");

}  // namespace mlstm
