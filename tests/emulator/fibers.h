// The threads of a block as fibers of one thread of the CPU, and the order in which they run.
#ifndef MLSTM_TESTS_EMULATOR_FIBERS_H
#define MLSTM_TESTS_EMULATOR_FIBERS_H

#include <cstdint>
#include <functional>
#include <string>

struct EmulatedIndex {
  unsigned x;
};
inline EmulatedIndex threadIdx, blockIdx, blockDim;

namespace emu {

constexpr int kMaxThreads = 1024;
constexpr uint32_t kMaxShared = 227 * 1024;

// 0: threads in turn, copies and products as late as they may be. Else a random order of warps,
// some of which pause, and random delays.
inline uint64_t schedule = 0;

inline const char* kernel_name = "";
inline int threads = 0;   // of the block
inline int current = -1;  // the thread that runs
inline int alive = 0;     // threads that have not ended
inline uint64_t turn = 0;

uint64_t random(uint64_t count);

// What a thread waits for.
struct Condition {
  virtual bool met() const = 0;
  virtual std::string description() const = 0;  // for the report of a deadlock

 protected:
  ~Condition() = default;
};
void wait_for(const Condition& condition, void* pc);

// Lets others run: always, or at times where the order is random.
void yield(void* pc);
void maybe_yield(void* pc);

// Runs `kernel` in every thread of a grid, one block after another.
void launch(const char* name, int64_t blocks, int threads_of_block, uint32_t shared_bytes,
            const std::function<void()>& kernel);

}  // namespace emu

#endif
