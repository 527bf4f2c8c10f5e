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
constexpr int kOthers = 128;

int agents = 0, used = 0;
std::vector<const char*> names;  // of all but threads
// Blocks go on counting: what is left of one has happened before the next.
uint32_t epoch = 0;
Clock times;
std::vector<Clock> clocks, fences_known;    // by thread
std::vector<std::vector<uint32_t>> fences;  // by thread: their times

// Of each two bytes the last write; of each four the last read since that all others happened
// before, or, where there is none, every agent's last.
struct Write {
  int agent = -1;
  uint32_t time = 0;
  void* pc = nullptr;
};
struct Read {
  int agent = -1;
  uint32_t time = 0;
  void* pc = nullptr;
  bool many = false;
};
constexpr uint32_t kBytes = 1 << 18;
std::vector<Write> writes(kBytes / 2);
std::vector<Read> reads(kBytes / 4);
uint32_t* many_reads = nullptr;  // [4 bytes][agents]
size_t many_bytes = 0;

uint32_t* many_reads_of(uint32_t x) { return many_reads + static_cast<size_t>(x) * agents; }

void make_reads() {
  if (many_reads != nullptr) munmap(many_reads, many_bytes);
  many_bytes = sizeof(uint32_t) * (kBytes / 4) * static_cast<size_t>(agents);
  void* memory = mmap(nullptr, many_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for the detection of races");
  many_reads = static_cast<uint32_t*>(memory);
  writes.assign(writes.size(), {});
  reads.assign(reads.size(), {});
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

void check_reads(uint32_t x, const Access& own) {
  const Read& read = reads[x];
  if (read.agent < 0) return;
  const uint32_t *last = many_reads_of(x), *upto = own.known->data();
  int other = read.agent;
  if (!read.many) {
    if (read.time <= upto[other]) return;
  } else {
    // Without branches, by several at once.
    uint32_t unknown = 0;
    for (int i = 0; i < agents; ++i) unknown |= last[i] > upto[i] ? 1 : 0;
    if (unknown == 0) return;
    for (other = 0; last[other] <= upto[other];) ++other;
  }
  report(x * 4, "write", own, kUnordered, "read", other, read.pc);
}

void add_read(uint32_t x, const Access& own) {
  Read& read = reads[x];
  if (!read.many) {
    if (read.agent < 0 || read.agent == own.agent || read.time <= (*own.known)[read.agent]) {
      read = {own.agent, own.time, own.pc};
      return;
    }
    // What is left there of the time before the last write is known to have happened.
    many_reads_of(x)[read.agent] = read.time;
    read.many = true;
  }
  many_reads_of(x)[own.agent] = own.time;
  read.pc = own.pc;
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
  for (uint32_t x = address / 4; x < (address + bytes + 3) / 4; ++x) add_read(x, access);
}

void agent_writes(uint32_t address, uint32_t bytes, const Access& access) {
  if (!is_dynamic(address, bytes)) return;
  for (uint32_t x = address / 4; x < (address + bytes + 3) / 4; ++x) {
    check_reads(x, access);
    // A write of two bytes says nothing of the other two.
    if (bytes >= 4) reads[x] = {};
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
