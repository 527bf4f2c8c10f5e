#include "shared.h"

#include "fibers.h"
#include "races.h"
#include "report.h"

// Static variables lie between them.
extern "C" char __data_start, _end;

namespace emu {
namespace {

constexpr uint32_t kWindow = 1 << 18;
alignas(1 << 12) unsigned char window[kWindow];  // what is at the addresses from 0 on
uint32_t base = 0, size = 0;

bool is_static(const void* pointer, uint32_t bytes) {
  const auto p = static_cast<const char*>(pointer);
  return p >= &__data_start && p + bytes <= &_end;
}

}  // namespace

void shared_size(uint32_t bytes) { size = bytes; }

void shared_start() {
  // Dynamic bytes are aligned to 16, no more.
  base = 1024 + (schedule != 0 ? 16 * static_cast<uint32_t>(random(64)) : 0);
  memset(window, 0xff, sizeof window);
}

uint32_t shared_base() { return base; }
unsigned char* dynamic_shared() { return window + base; }
bool is_dynamic(uint32_t address, uint32_t bytes) {
  return address >= base && address + bytes <= base + size;
}

unsigned char* shared_pointer(uint32_t address, uint32_t bytes, uint32_t align, const char* what) {
  if (address % align != 0) {
    fail(text("%s: %s is not aligned to %u", what, shared_name(address).c_str(), align));
  }
  if (is_dynamic(address, bytes)) return window + address;
  const auto pointer = reinterpret_cast<unsigned char*>(static_cast<uintptr_t>(address));
  if (address >= kWindow && is_static(pointer, bytes)) return pointer;
  fail(text("%s: %s + %u is out of the block's %u bytes of shared memory", what,
            shared_name(address).c_str(), bytes, size));
}

uint32_t to_shared(const void* pointer) {
  const auto p = static_cast<const unsigned char*>(pointer);
  if (p >= window && p < window + kWindow) return static_cast<uint32_t>(p - window);
  // The program is linked at low addresses.
  if (!is_static(p, 1)) fail(text("%p does not point to shared memory", pointer));
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p));
}

void load_shared(uint32_t from, void* to, uint32_t bytes) {
  const unsigned char* pointer = shared_pointer(from, bytes, bytes, "ld.shared");
  thread_reads(from, bytes, EMU_CALLER);
  memcpy(to, pointer, bytes);
}

void store_shared(uint32_t to, const void* from, uint32_t bytes) {
  unsigned char* pointer = shared_pointer(to, bytes, bytes, "st.shared");
  thread_writes(to, bytes, EMU_CALLER);
  memcpy(pointer, from, bytes);
}

}  // namespace emu
