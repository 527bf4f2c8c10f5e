#include "fibers.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "barriers.h"
#include "copies.h"
#include "races.h"
#include "report.h"
#include "shared.h"
#include "warps.h"
#include "wgmma.h"

namespace emu {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
unsigned char* stacks = nullptr;

struct Thread {
  ucontext_t context;
  bool done = true;
  const Condition* waits = nullptr;
  void* pc = nullptr;
};
std::vector<Thread> all;
ucontext_t scheduler;
const std::function<void()>* body;
std::mt19937_64 generator;

void to_scheduler() { swapcontext(&all[current].context, &scheduler); }

void run_thread() {
  (*body)();
  end_of_thread_copies();
  all[current].done = true;
  --alive;
  end_of_thread_barriers();
  to_scheduler();
  abort();
}

void prepare(Thread& thread, unsigned char* stack) {
  thread.done = false;
  thread.waits = nullptr;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = stack;
  thread.context.uc_stack.ss_size = kStackBytes;
  makecontext(&thread.context, run_thread, 0);
}

// ---- deadlocks

std::string ranges(const std::vector<int>& numbers) {
  std::string out;
  for (size_t i = 0, j; i < numbers.size(); i = j) {
    for (j = i + 1; j < numbers.size() && numbers[j] == numbers[j - 1] + 1;) ++j;
    out += text(i == 0 ? "%d" : ", %d", numbers[i]);
    if (j > i + 1) out += text("-%d", numbers[j - 1]);
  }
  return out;
}

[[noreturn]] void report_deadlock() {
  std::map<std::pair<std::string, void*>, std::vector<int>> waiting;
  for (int t = 0; t < threads; ++t) {
    if (all[t].done) {
      waiting[{"have ended", nullptr}].push_back(t);
    } else {
      waiting[{all[t].waits->description(), all[t].pc}].push_back(t);
    }
  }
  std::string report = text("deadlock of kernel %s, block %u, turn %llu\n", kernel_name, blockIdx.x,
                            static_cast<unsigned long long>(turn));
  for (const auto& [what, numbers] : waiting) {
    report += "  threads " + ranges(numbers) + " " + what.first + "\n";
    if (what.second != nullptr) report += place(what.second);
  }
  current = -1;
  fail(report + unfinished_phases());
}

// ---- the scheduler

// A turn of a warp: its threads that can go on. Whether any could.
bool run_warp(int warp) {
  bool any = false;
  const int shift = schedule != 0 ? static_cast<int>(random(32)) : 0;
  for (int x = 0; x < 32; ++x) {
    const int t = warp * 32 + (x + shift) % 32;
    if (t >= threads || all[t].done) continue;
    if (all[t].waits != nullptr && !all[t].waits->met()) continue;
    all[t].waits = nullptr;
    current = t;
    threadIdx.x = static_cast<unsigned>(t);
    swapcontext(&scheduler, &all[t].context);
    any = true;
  }
  current = -1;
  return any;
}

void start_block(unsigned block) {
  blockIdx.x = block;
  turn = 0;
  alive = threads;
  generator.seed(schedule * 1000003 + block);
  shared_start();
  races_start();
  barriers_start();
  warps_start();
  copies_start();
  wgmma_start();
  for (int t = 0; t < threads; ++t) prepare(all[t], stacks + t * kStackBytes);
}

void run_block(unsigned block) {
  start_block(block);
  std::vector<int> order;
  for (int warp = 0; warp * 32 < threads; ++warp) order.push_back(warp);
  std::vector<uint64_t> paused(order.size(), 0);
  while (alive > 0) {
    bool progress = false, pauses = false;
    if (schedule != 0) std::shuffle(order.begin(), order.end(), generator);
    for (int warp : order) {
      if (schedule != 0 && paused[warp] <= turn && random(24) == 0) {
        paused[warp] = turn + 1 + random(random(8) == 0 ? 300 : 30);
      }
      if (paused[warp] > turn) {
        pauses = true;
      } else {
        progress |= run_warp(warp);
      }
    }
    ++turn;
    progress |= run_due_copies();
    // Where nothing else happens, time passes until the next copy is there.
    if (alive > 0 && !progress && !await_next_copy() && !pauses) report_deadlock();
  }
  finish_copies();
}

void prepare_machine() {
  if (stacks != nullptr) return;
  all.resize(kMaxThreads);
  void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for stacks");
  stacks = static_cast<unsigned char*>(memory);
  const long page = sysconf(_SC_PAGESIZE);
  for (int t = 0; t < kMaxThreads; ++t) mprotect(stacks + t * kStackBytes, page, PROT_NONE);
  catch_signals();
}

}  // namespace

uint64_t random(uint64_t count) { return generator() % count; }

void wait_for(const Condition& condition, void* pc) {
  if (condition.met()) return;
  all[current].waits = &condition;
  all[current].pc = pc;
  to_scheduler();
}

void yield(void* pc) {
  all[current].pc = pc;
  to_scheduler();
}

void maybe_yield(void* pc) {
  if (schedule != 0 && random(4) == 0) yield(pc);
}

void launch(const char* name, int64_t blocks, int threads_of_block, uint32_t shared_bytes,
            const std::function<void()>& kernel) {
  prepare_machine();
  kernel_name = name;
  threads = threads_of_block;
  if (threads > kMaxThreads) fail(text("a block of %d threads", threads));
  if (shared_bytes > kMaxShared) fail(text("%u bytes of shared memory in a block", shared_bytes));
  blockDim.x = static_cast<unsigned>(threads);
  body = &kernel;
  shared_size(shared_bytes);
  for (int64_t block = 0; block < blocks; ++block) run_block(static_cast<unsigned>(block));
}

}  // namespace emu
