#include "warps.h"

#include <list>
#include <string>
#include <vector>

#include "fibers.h"
#include "races.h"
#include "report.h"
#include "shared.h"

namespace emu {
namespace {

struct Meeting {
  const char* what;
  uint32_t mask, arrived = 0, left = 0;
  unsigned char lanes[32][kLaneBytes] = {};
  Clock clock = {};

  unsigned char* own() { return lanes[current % 32]; }
};
std::vector<std::list<Meeting>> meetings;  // by warp

struct AllLanes : Condition {
  const Meeting& meeting;

  explicit AllLanes(const Meeting& m) : meeting(m) {}
  bool met() const override { return meeting.arrived == meeting.mask; }
  std::string description() const override {
    return text("wait in %s of lanes %#x: %#x are missing", meeting.what, meeting.mask,
                meeting.mask & ~meeting.arrived);
  }
};

uint32_t own_bit() { return 1u << current % 32; }

// That which others wait in for this lane, or a new one.
Meeting& meeting_of(const char* what, uint32_t mask) {
  if ((mask & own_bit()) == 0) {
    fail(text("%s: lane %d is not in its mask %#x", what, current % 32, mask));
  }
  auto& open = meetings[current / 32];
  for (Meeting& m : open) {
    if (m.mask == mask && (m.arrived & own_bit()) == 0 && strcmp(m.what, what) == 0) return m;
  }
  return open.emplace_back(what, mask);
}
// Whether the lane is the last one.
bool arrive(Meeting& m) {
  m.arrived |= own_bit();
  return m.arrived == m.mask;
}
void leave(Meeting& m) {
  m.left |= own_bit();
  if (m.left != m.mask) return;
  meetings[current / 32].remove_if([&](const Meeting& other) { return &other == &m; });
}

// Calls f(a lane's two bytes of a matrix, where that element is in shared memory) for all.
template <typename F>
void each_element(Meeting& m, bool transposed, F f) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int e = 0; e < 2; ++e) {
        const int x = lane / 4, y = lane % 4 * 2 + e;
        const int row = transposed ? y : x, column = transposed ? x : y;
        uint32_t address;
        memcpy(&address, m.lanes[matrix * 8 + row], sizeof address);
        f(m.lanes[lane] + 4 + 4 * matrix + 2 * e,
          shared_pointer(address, 16, 16, "a row of a matrix") + column * 2);
      }
    }
  }
}

}  // namespace

void warps_start() { meetings.assign((threads + 31) / 32, {}); }

void exchange(const char* what, uint32_t mask, const void* own, int from, void* other, int bytes) {
  Meeting& m = meeting_of(what, mask);
  if ((mask >> from & 1) == 0) fail(text("%s: lane %d is not in the mask %#x", what, from, mask));
  memcpy(m.own(), own, bytes);
  arrive(m);
  wait_for(AllLanes(m), EMU_CALLER);
  memcpy(other, m.lanes[from], bytes);
  leave(m);
}

uint32_t ballot(uint32_t mask, bool predicate) {
  Meeting& m = meeting_of("vote.ballot", mask);
  m.own()[0] = predicate ? 1 : 0;
  arrive(m);
  wait_for(AllLanes(m), EMU_CALLER);
  uint32_t lanes = 0;
  for (int lane = 0; lane < 32; ++lane) lanes |= static_cast<uint32_t>(m.lanes[lane][0]) << lane;
  leave(m);
  return lanes;
}

void sync_warp(uint32_t mask) {
  Meeting& m = meeting_of("__syncwarp", mask);
  release(m.clock);
  arrive(m);
  wait_for(AllLanes(m), EMU_CALLER);
  acquire(m.clock);
  leave(m);
}

void load_matrices_transposed(uint32_t from, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  thread_reads(from, 16, EMU_CALLER);
  Meeting& m = meeting_of("ldmatrix", kAllLanes);
  memcpy(m.own(), &from, sizeof from);
  if (arrive(m)) {
    each_element(m, true, [](void* own, const void* shared) { memcpy(own, shared, 2); });
  }
  wait_for(AllLanes(m), EMU_CALLER);
  uint32_t* const to[4] = {&a, &b, &c, &d};
  for (int matrix = 0; matrix < 4; ++matrix) memcpy(to[matrix], m.own() + 4 + 4 * matrix, 4);
  leave(m);
}

void store_matrices(bool transposed, uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  Meeting& m = meeting_of("stmatrix", kAllLanes);
  const uint32_t own[5] = {to, a, b, c, d};
  memcpy(m.own(), own, sizeof own);
  if (arrive(m)) {
    each_element(m, transposed, [](const void* own_, void* shared) { memcpy(shared, own_, 2); });
  }
  wait_for(AllLanes(m), EMU_CALLER);
  leave(m);
  thread_writes(to, 16, EMU_CALLER);
}

}  // namespace emu
