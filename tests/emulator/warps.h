// What the lanes of a warp do together: exchanges, and 8 x 8 matrices to and from shared memory.
#ifndef MLSTM_TESTS_EMULATOR_WARPS_H
#define MLSTM_TESTS_EMULATOR_WARPS_H

#include <cstdint>
#include <cstring>

namespace emu {

void warps_start();

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kLaneBytes = 32;

// Gives `own` to the other lanes of the mask, which call it too, and takes `other` from one of
// them.
void exchange(const char* what, uint32_t mask, const void* own, int from, void* other, int bytes);

template <typename T>
[[gnu::always_inline]] inline T exchange(const char* what, uint32_t mask, T own, int from) {
  static_assert(sizeof(T) <= kLaneBytes);
  T other;
  exchange(what, mask, &own, from, &other, sizeof(T));
  return other;
}

// The lanes for which a predicate holds.
uint32_t ballot(uint32_t mask, bool predicate);

// What lanes did before has happened before what they do after. (Exchanges say nothing of memory.)
void sync_warp(uint32_t mask);

// Four 8 x 8 matrices of 16-bit elements.
void load_matrices_transposed(uint32_t from, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d);
void store_matrices(bool transposed, uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d);

}  // namespace emu

#endif
