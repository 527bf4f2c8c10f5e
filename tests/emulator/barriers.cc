#include "barriers.h"

#include <map>
#include <utility>

#include <cstring>

#include "fibers.h"
#include "report.h"
#include "shared.h"

namespace emu {
namespace {

struct Mbarrier {
  int64_t arrivals = 0;  // of a phase
  int64_t pending = 0, bytes = 0;
  uint64_t phase = 0;
  int agent = -1;
  Clock now = {}, last = {};  // what arrivals of this phase, and of the last one, release
};
std::map<uint32_t, Mbarrier> mbarriers;

uint64_t mark_of(uint32_t address) { return 0xba44000000000000u | address; }

Mbarrier& mbarrier(uint32_t address, const char* what) {
  const unsigned char* pointer = shared_pointer(address, 8, 8, what);
  const auto found = mbarriers.find(address);
  const auto refuse = [&](const char* why) {
    fail(text("%s: %s the barrier at %s", what, why, shared_name(address).c_str()));
  };
  if (found == mbarriers.end()) refuse("nothing has made");
  const uint64_t mark = mark_of(address);
  if (memcmp(pointer, &mark, sizeof mark) != 0) refuse("something has written over");
  return found->second;
}

std::string state(const Mbarrier& m) {
  return text("phase %llu, %lld of %lld arrivals and %lld bytes to come",
              static_cast<unsigned long long>(m.phase), static_cast<long long>(m.pending),
              static_cast<long long>(m.arrivals), static_cast<long long>(m.bytes));
}

void end_phase(Clock& now, Clock& last) {
  last = std::move(now);
  now.clear();
}
void check_phase(Mbarrier& m) {
  if (m.pending != 0 || m.bytes != 0) return;
  ++m.phase;
  m.pending = m.arrivals;
  end_phase(m.now, m.last);
}

void arrive(uint32_t address, Mbarrier& m) {
  if (m.pending == 0) {
    fail(text("more arrivals than the barrier at %s expects: %s", shared_name(address).c_str(),
              state(m).c_str()));
  }
  --m.pending;
  release(m.now);
  check_phase(m);
}

struct PhaseOver : Condition {
  uint32_t address;
  uint32_t parity;

  PhaseOver(uint32_t a, uint32_t p) : address(a), parity(p) {}
  bool met() const override { return (mbarriers[address].phase & 1) != parity; }
  std::string description() const override {
    return text("wait for the barrier at %s, parity %u: %s", shared_name(address).c_str(), parity,
                state(mbarriers[address]).c_str());
  }
};

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
  Clock now = {}, last = {};
};
constexpr int kNamed = 16;
Barrier named[kNamed], whole_block;

void go_on(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.generation;
  end_phase(barrier.now, barrier.last);
}

struct AllArrived : Condition {
  const Barrier& barrier;
  const char* name;
  const uint64_t generation;

  AllArrived(const Barrier& b, const char* n) : barrier(b), name(n), generation(b.generation) {}
  bool met() const override { return barrier.generation != generation; }
  std::string description() const override {
    return text("wait in %s: %d of %d threads are there", name, barrier.arrived, barrier.expected);
  }
};

// The running thread's arrival, and its wait for the others.
void sync(Barrier& barrier, int count, const char* name, void* pc) {
  barrier.expected = count;
  const AllArrived all(barrier, name);
  release(barrier.now);
  if (++barrier.arrived >= count) go_on(barrier);
  wait_for(all, pc);
  acquire(barrier.last);
}

}  // namespace

void barriers_start() {
  mbarriers.clear();
  for (Barrier& barrier : named) barrier = {};
  whole_block = {};
}

// Threads that have ended are not waited for.
void end_of_thread_barriers() {
  if (whole_block.arrived > 0 && whole_block.arrived >= alive) go_on(whole_block);
}

void barrier_init(uint32_t barrier, int arrivals) {
  unsigned char* pointer = shared_pointer(barrier, 8, 8, "mbarrier.init");
  if (arrivals < 1) fail(text("mbarrier.init: %d arrivals", arrivals));
  if (mbarriers.count(barrier) != 0) fail("mbarrier.init: there is a barrier already");
  const uint64_t mark = mark_of(barrier);
  memcpy(pointer, &mark, sizeof mark);
  mbarriers[barrier] = {arrivals, arrivals, 0, 0, new_agent("the copy engine")};
}

void barrier_arrive(uint32_t barrier) {
  maybe_yield(EMU_CALLER);
  arrive(barrier, mbarrier(barrier, "mbarrier.arrive"));
  maybe_yield(EMU_CALLER);
}

void barrier_expect(uint32_t barrier, uint32_t bytes) {
  maybe_yield(EMU_CALLER);
  Mbarrier& m = mbarrier(barrier, "mbarrier.arrive.expect_tx");
  m.bytes += bytes;
  arrive(barrier, m);
}

void barrier_wait(uint32_t barrier, uint32_t parity) {
  mbarrier(barrier, "mbarrier.try_wait");
  if (parity > 1) fail(text("mbarrier.try_wait: parity %u", parity));
  maybe_yield(EMU_CALLER);
  wait_for(PhaseOver(barrier, parity), EMU_CALLER);
  acquire(mbarriers[barrier].last);
}

int barrier_agent(uint32_t barrier) { return mbarrier(barrier, "a load").agent; }

void barrier_complete(uint32_t barrier, uint32_t bytes, const Clock& clock) {
  Mbarrier& m = mbarrier(barrier, "a load");
  join(m.now, clock);
  // Bytes may come before they are expected.
  m.bytes -= bytes;
  check_phase(m);
}

void named_sync(uint32_t number, int count) {
  maybe_yield(EMU_CALLER);
  if (number >= kNamed || count <= 0 || count % 32 != 0 || count > threads) {
    fail(text("bar.sync %u, %d", number, count));
  }
  Barrier& barrier = named[number];
  if (barrier.arrived > 0 && barrier.expected != count) {
    fail(text("bar.sync %u, %d: others said %d", number, count, barrier.expected));
  }
  sync(barrier, count, "bar.sync", EMU_CALLER);
}

void sync_threads() {
  maybe_yield(EMU_CALLER);
  sync(whole_block, alive, "__syncthreads", EMU_CALLER);
}

std::string unfinished_phases() {
  std::string out;
  for (const auto& [address, m] : mbarriers) {
    if (m.pending == m.arrivals && m.bytes == 0) continue;
    out += text("  the barrier at %s: %s\n", shared_name(address).c_str(), state(m).c_str());
  }
  return out;
}

}  // namespace emu
