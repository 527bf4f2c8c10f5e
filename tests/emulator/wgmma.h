// Products of a warpgroup: D (64 x N, float) = A (64 x 16) B (16 x N) or D + A B, of bf16 or f16 in
// tiles with the 128-byte swizzle. One is done, which is when it reads shared memory and writes D,
// only when the warpgroup waits for it; with a random schedule perhaps before. A's registers are
// read when it is issued.
#ifndef MLSTM_TESTS_EMULATOR_WGMMA_H
#define MLSTM_TESTS_EMULATOR_WGMMA_H

#include <compare>
#include <cstdint>

namespace emu {

void wgmma_start();

// What all threads of the warpgroup must agree on.
struct Product {
  int n;
  bool half;  // f16, not bf16
  bool a_in_registers, a_transposed, b_transposed;
  uint64_t a, b;  // descriptors
  bool add;

  bool operator==(const Product&) const = default;
};
void wgmma(const Product& product, float* d, const uint32_t* a);
void wgmma_commit();
void wgmma_wait(int pending);

}  // namespace emu

#endif
