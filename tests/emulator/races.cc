#include "races.h"

#include <algorithm>
#include <string>

#include <sys/mman.h>

#include "fibers.h"
#include "report.h"
#include "shared.h"

namespace emu {
namespace {

// Agents that are no threads.
constexpr int kOthers = 240;

int agents = 0, used = 0;
std::vector<const char*> names;  // of all but threads
// Blocks go on counting: what is left of one has happened before the next.
uint32_t epoch = 0;
Clock times;
std::vector<Clock> clocks, fences_known;    // by thread
std::vector<std::vector<uint32_t>> fences;  // by thread: their times

// Of each two bytes the last write; of each four every agent's last reads since.
struct Write {
  int agent = -1;
  uint32_t time = 0;
  void* pc = nullptr;
};
constexpr uint32_t kBytes = 1 << 18;
std::vector<Write> writes(kBytes / 2);
std::vector<uint8_t> has_reads(kBytes / 4);
std::vector<void*> reads_pc(kBytes / 4);  // the last one's
uint32_t* reads = nullptr;                // [4 bytes][agents]
size_t reads_bytes = 0;

void make_reads() {
  if (reads != nullptr) munmap(reads, reads_bytes);
  reads_bytes = sizeof(uint32_t) * (kBytes / 4) * static_cast<size_t>(agents);
  void* memory = mmap(nullptr, reads_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for the detection of races");
  reads = static_cast<uint32_t*>(memory);
  writes.assign(writes.size(), {});
  has_reads.assign(has_reads.size(), 0);
}

std::string name(int agent) {
  return agent < threads ? text("thread %d", agent) : names[agent - threads];
}

[[noreturn]] void report(uint32_t address, const char* access, const Access& own, const char* how,
                         const char* earlier, int other, void* pc) {
  fail(text("race: %s of %s by %s %s a %s by %s\n  the last such %s:\n", access,
            shared_name(address).c_str(), name(own.agent).c_str(), how, earlier,
            name(other).c_str(), earlier) +
       place(pc) + "  this " + access + ":\n" + place(own.pc));
}

constexpr char kUnordered[] = "is not ordered after";

void check_write(uint32_t x, const char* access, const Access& own) {
  const Write& w = writes[x];
  if (w.agent >= 0 && w.agent != own.agent && w.time > (*own.known)[w.agent]) {
    report(x * 2, access, own, kUnordered, "write", w.agent, w.pc);
  }
}

// Of a write that is known to have happened: whether its thread has fenced before that became
// known, or who issued the read has since.
void check_fence(uint32_t x, const Access& own) {
  const Write& w = writes[x];
  if (w.agent < 0 || w.agent >= threads) return;
  const auto& list = fences[w.agent];
  const auto fence = std::lower_bound(list.begin(), list.end(), w.time);
  if (fence != list.end() && *fence < (*own.known)[w.agent]) return;
  if ((*own.fenced)[w.agent] < w.time) {
    report(x * 2, "read", own, "follows, without fence.proxy.async,", "write", w.agent, w.pc);
  }
}

Access by_thread(void* pc) {
  return {current, clocks[current][current], &clocks[current], nullptr, pc};
}

}  // namespace

void join(Clock& to, const Clock& from) {
  if (from.empty()) return;
  if (to.empty()) to.assign(agents, 0);
  for (int i = 0; i < agents; ++i) to[i] = std::max(to[i], from[i]);
}

void races_start() {
  if (agents != threads + kOthers) {
    agents = threads + kOthers;
    make_reads();
  }
  used = threads;
  names.clear();
  for (const Clock& clock : clocks) {
    for (uint32_t time : clock) epoch = std::max(epoch, time);
  }
  for (uint32_t time : times) epoch = std::max(epoch, time);
  times.assign(agents, epoch);
  clocks.assign(threads, times);
  fences_known.assign(threads, times);
  fences.assign(threads, {});
  for (int t = 0; t < threads; ++t) ++clocks[t][t];
}

int new_agent(const char* what) {
  if (used == agents) fail("too many barriers, warpgroups and threads with stores");
  names.push_back(what);
  return used++;
}
uint32_t tick(int agent) { return ++times[agent]; }

const Clock& known() { return clocks[current]; }
void release(Clock& to) {
  join(to, clocks[current]);
  advance();
}
void advance() { ++clocks[current][current]; }
void acquire(const Clock& from) { join(clocks[current], from); }
void learn(int agent, uint32_t time) {
  uint32_t& upto = clocks[current][agent];
  upto = std::max(upto, time);
}

void proxy_fence() {
  const Clock& own = clocks[current];
  fences[current].push_back(own[current]);
  fences_known[current] = own;
  advance();
}
const Clock& fenced() { return fences_known[current]; }

void agent_reads(uint32_t address, uint32_t bytes, const Access& access) {
  if (!is_dynamic(address, bytes)) return;
  for (uint32_t x = address / 2; x < (address + bytes) / 2; ++x) {
    check_write(x, "read", access);
    if (access.fenced != nullptr) check_fence(x, access);
  }
  for (uint32_t x = address / 4; x < (address + bytes + 3) / 4; ++x) {
    reads[static_cast<size_t>(x) * agents + access.agent] = access.time;
    has_reads[x] = 1;
    reads_pc[x] = access.pc;
  }
}

void agent_writes(uint32_t address, uint32_t bytes, const Access& access) {
  if (!is_dynamic(address, bytes)) return;
  for (uint32_t x = address / 4; x < (address + bytes + 3) / 4; ++x) {
    if (has_reads[x] == 0) continue;
    const uint32_t* last = reads + static_cast<size_t>(x) * agents;
    for (int i = 0; i < agents; ++i) {
      if (last[i] > (*access.known)[i]) {
        report(x * 4, "write", access, kUnordered, "read", i, reads_pc[x]);
      }
    }
    // A write of two bytes says nothing of the other two.
    if (bytes >= 4) has_reads[x] = 0;
  }
  for (uint32_t x = address / 2; x < (address + bytes) / 2; ++x) {
    check_write(x, "write", access);
    writes[x] = {access.agent, access.time, access.pc};
  }
}

void thread_reads(uint32_t address, uint32_t bytes, void* pc) {
  agent_reads(address, bytes, by_thread(pc));
}
void thread_writes(uint32_t address, uint32_t bytes, void* pc) {
  agent_writes(address, bytes, by_thread(pc));
}

}  // namespace emu
