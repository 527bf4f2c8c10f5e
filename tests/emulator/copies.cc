#include "copies.h"

#include <algorithm>
#include <functional>
#include <vector>

#include <cstring>

#include "barriers.h"
#include "fibers.h"
#include "races.h"
#include "report.h"
#include "shared.h"

namespace emu {
namespace {

constexpr uint64_t kMark = 0x7e4504a90000;
constexpr uint64_t kLoadTurns = 6, kNever = ~uint64_t{0};

struct Copy {
  bool load;
  uint64_t due;
  int thread;
  std::function<void()> run;
};
std::vector<Copy> copies;

struct Storer {
  int agent = -1;
  uint32_t time = 0;
  int uncommitted = 0;
};
std::vector<Storer> storers;  // by thread

// Loads come after some turns, stores only where somebody waits for them; or at random.
void enqueue(bool load, std::function<void()> run) {
  uint64_t due = load ? turn + 1 + kLoadTurns : kNever;
  if (schedule != 0) due = turn + (random(4) == 0 ? 0 : 1 + random(40));
  if (due == turn) {
    run();
  } else {
    copies.push_back({load, due, current, std::move(run)});
  }
}

template <typename F>
bool run_copies(F which) {
  bool any = false;
  for (size_t i = 0; i < copies.size();) {
    if (!which(copies[i])) {
      ++i;
      continue;
    }
    const auto run = std::move(copies[i].run);
    copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(i));
    run();
    any = true;
  }
  return any;
}

const Map& map_at(const void* pointer) {
  const Map& map = *static_cast<const Map*>(pointer);
  if (reinterpret_cast<uintptr_t>(pointer) % 64 != 0) fail("a tensor map not aligned to 64 bytes");
  if (map.mark != kMark) fail(text("no tensor map at %p", pointer));
  return map;
}

uint32_t box_bytes(const Map& map) {
  uint32_t bytes = map.element;
  for (int i = 0; i < map.rank; ++i) bytes *= map.boxes[i];
  return bytes;
}

unsigned char* tile(uint32_t address, const Map& map) {
  return shared_pointer(address, box_bytes(map), map.swizzled ? 1024 : 128, "the copy engine");
}

// Calls f(16 bytes of a box in shared memory, where they are in memory) in order; null beyond the
// tensor.
template <typename F>
void each_piece(const Map& map, uint32_t shared, const Place& at, F f) {
  const uint32_t row = map.boxes[0] * map.element;
  for (uint32_t linear = 0; linear < box_bytes(map); linear += 16) {
    const int64_t first = at[0] * map.element + linear % row;
    bool inside = first < static_cast<int64_t>(map.sizes[0] * map.element);
    unsigned char* memory = map.data + first;
    uint32_t rest = linear / row;
    for (int i = 1; i < map.rank; ++i) {
      const int64_t index = at[i] + rest % map.boxes[i];
      rest /= map.boxes[i];
      inside = inside && index >= 0 && index < static_cast<int64_t>(map.sizes[i]);
      memory += index * static_cast<int64_t>(map.strides[i - 1]);
    }
    uint32_t address = shared + linear;
    if (map.swizzled) address ^= (address >> 7 & 7) << 4;
    f(shared_pointer(address, 16, 16, "the copy engine"), inside ? memory : nullptr);
  }
}

}  // namespace

Map checked(Map map) {
  map.mark = kMark;
  if (reinterpret_cast<uintptr_t>(map.data) % 16 != 0) fail("a tensor map of unaligned data");
  for (int i = 0; i < map.rank; ++i) {
    const bool fits = map.sizes[i] > 0 && map.boxes[i] > 0 && map.boxes[i] <= 256;
    if (!fits || (i > 0 && map.strides[i - 1] % 16 != 0)) {
      fail(text("dimension %d of a tensor map", i));
    }
  }
  const int row = map.boxes[0] * map.element;
  if (row % 16 != 0 || (map.swizzled && row != 128)) fail("rows of a tensor map's box");
  return map;
}
void check_map(const void* map) { map_at(map); }

void load_box(uint32_t to, const void* pointer, uint32_t barrier, const Place& at) {
  maybe_yield(EMU_CALLER);
  const Map map = map_at(pointer);
  const uint32_t bytes = box_bytes(map);
  memset(tile(to, map), 0xff, bytes);
  // Those alone know of it who wait for the barrier.
  const int agent = barrier_agent(barrier);
  const Access access = {agent, tick(agent), &known(), nullptr, EMU_CALLER};
  agent_writes(to, bytes, access);
  Clock clock = known();
  clock[agent] = access.time;
  advance();
  enqueue(true, [=] {
    each_piece(map, to, at, [](unsigned char* shared, const unsigned char* memory) {
      memset(shared, 0, 16);
      if (memory != nullptr) memcpy(shared, memory, 16);
    });
    barrier_complete(barrier, bytes, clock);
  });
}

void store_box(const void* pointer, uint32_t from, const Place& at) {
  maybe_yield(EMU_CALLER);
  const Map map = map_at(pointer);
  tile(from, map);
  Storer& own = storers[current];
  if (own.agent < 0) own.agent = new_agent("the copy engine's stores");
  own.time = tick(own.agent);
  agent_reads(from, box_bytes(map), {own.agent, own.time, &known(), &fenced(), EMU_CALLER});
  ++own.uncommitted;
  enqueue(false, [=] {
    each_piece(map, from, at, [](const unsigned char* shared, unsigned char* memory) {
      if (memory != nullptr) memcpy(memory, shared, 16);
    });
  });
}

void store_commit() { storers[current].uncommitted = 0; }

void store_wait() {
  const Storer& own = storers[current];
  if (own.uncommitted > 0) fail("a wait for stores that are not committed");
  if (own.agent < 0) return;
  learn(own.agent, own.time);
  const int thread = current;
  run_copies([=](const Copy& copy) { return !copy.load && copy.thread == thread; });
}

void copies_start() {
  copies.clear();
  storers.assign(threads, {});
}
bool run_due_copies() {
  return run_copies([](const Copy& copy) { return copy.due <= turn; });
}
bool await_next_copy() {
  uint64_t next = kNever;
  for (const Copy& copy : copies) next = std::min(next, copy.due);
  if (next == kNever) return false;
  turn = std::max(turn, next);
  return true;
}
void finish_copies() {
  run_copies([](const Copy&) { return true; });
}
void end_of_thread_copies() {
  if (storers[current].uncommitted > 0) fail("the thread ends with stores that are not committed");
}

}  // namespace emu
