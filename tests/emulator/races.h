// Races in dynamic shared memory, found whatever the order in which threads ran: by vector clocks
// of all threads and of those that act for them, which are a barrier's loads, a warpgroup's
// products and a thread's stores by the copy engine. Each of these agents counts a time of its own;
// a clock has for every agent the time up to which its accesses are known to have happened before.
//
// The copy engine and wgmma are another proxy: what threads wrote they read only after a
// fence.proxy.async of the writer, or of who issues them.
#ifndef MLSTM_TESTS_EMULATOR_RACES_H
#define MLSTM_TESTS_EMULATOR_RACES_H

#include <cstdint>
#include <vector>

namespace emu {

using Clock = std::vector<uint32_t>;
void join(Clock& to, const Clock& from);  // of an empty clock too

void races_start();

// An agent of the copy engine or wgmma, and its next time.
int new_agent(const char* what);
uint32_t tick(int agent);

// Of the running thread: what it knows goes to others, or others' to it.
const Clock& known();
void release(Clock& to);
void advance();  // to a time of its own for what it does from here on
void acquire(const Clock& from);
void learn(int agent, uint32_t time);
// What it knew at its last fence.
void proxy_fence();
const Clock& fenced();

void thread_reads(uint32_t address, uint32_t bytes, void* pc);
void thread_writes(uint32_t address, uint32_t bytes, void* pc);

// An agent's access at a time, by what was known when it was issued (and fenced, for reads).
struct Access {
  int agent;
  uint32_t time;
  const Clock* known;
  const Clock* fenced;
  void* pc;
};
void agent_reads(uint32_t address, uint32_t bytes, const Access& access);
void agent_writes(uint32_t address, uint32_t bytes, const Access& access);

}  // namespace emu

#endif
