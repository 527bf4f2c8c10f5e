// Shared memory: addresses of 32 bits, of a block's dynamic bytes or of a kernel's __shared__
// variables, which are static variables here.
#ifndef MLSTM_TESTS_EMULATOR_SHARED_H
#define MLSTM_TESTS_EMULATOR_SHARED_H

#include <cstdint>
#include <cstring>

namespace emu {

// Of the blocks to come; each starts with NaN in all of it.
void shared_size(uint32_t bytes);
void shared_start();

// Where the dynamic bytes start.
uint32_t shared_base();
unsigned char* dynamic_shared();
bool is_dynamic(uint32_t address, uint32_t bytes);

// Where an address is, which must be aligned and inside; `what` asks.
unsigned char* shared_pointer(uint32_t address, uint32_t bytes, uint32_t align, const char* what);

uint32_t to_shared(const void* pointer);

// Ordinary accesses by the running thread.
void load_shared(uint32_t from, void* to, uint32_t bytes);
void store_shared(uint32_t to, const void* from, uint32_t bytes);

// The same of some registers, each of kBytes: always inlined, so that the caller is a kernel's
// line.
template <int kBytes, typename... T>
[[gnu::always_inline]] inline void load_registers(uint32_t from, T&... to) {
  static_assert(((sizeof(T) == kBytes) && ...));
  unsigned char all[kBytes * sizeof...(T)];
  load_shared(from, all, sizeof all);
  const unsigned char* next = all;
  ((memcpy(&to, next, kBytes), next += kBytes), ...);
}
template <int kBytes, typename... T>
[[gnu::always_inline]] inline void store_registers(uint32_t to, T... from) {
  static_assert(((sizeof(T) == kBytes) && ...));
  unsigned char all[kBytes * sizeof...(T)];
  unsigned char* next = all;
  ((memcpy(next, &from, kBytes), next += kBytes), ...);
  store_shared(to, all, sizeof all);
}

}  // namespace emu

#endif
