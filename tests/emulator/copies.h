// The copy engine (TMA): loads, whose target is NaN until they are there, some turns later; and
// stores, which read shared memory when their thread waits for that.
#ifndef MLSTM_TESTS_EMULATOR_COPIES_H
#define MLSTM_TESTS_EMULATOR_COPIES_H

#include <array>
#include <cstdint>

namespace emu {

void copies_start();
bool run_due_copies();   // whether there were any
bool await_next_copy();  // whether there is one that comes by itself
void finish_copies();
void end_of_thread_copies();

// What stands in for the 128 bytes that cuTensorMapEncodeTiled makes.
struct Map {
  uint64_t mark;
  unsigned char* data;
  uint64_t sizes[5];
  uint64_t strides[4];  // bytes, of all dimensions but the first
  uint16_t boxes[5];
  uint8_t rank, element;
  bool swizzled;  // by 128 bytes
  uint8_t unused[27];
};
static_assert(sizeof(Map) == 128);

// Fills in the mark, and refuses what the driver would.
Map checked(Map map);
void check_map(const void* map);

using Place = std::array<int64_t, 5>;
void load_box(uint32_t to, const void* map, uint32_t barrier, const Place& at);
void store_box(const void* map, uint32_t from, const Place& at);
void store_commit();
void store_wait();

}  // namespace emu

#endif
