#include "wgmma.h"

#include <algorithm>
#include <deque>
#include <string>
#include <vector>

#include <cstring>

#include "fibers.h"
#include "numbers.h"
#include "races.h"
#include "report.h"
#include "shared.h"

namespace emu {
namespace {

constexpr int kThreads = 128;

struct Operation {
  Product product;
  void* pc = nullptr;
  int arrived = 0;
  float* d[kThreads];
  uint32_t a[kThreads][4];
  // What all its threads know of, and have fenced; and what any of them knows of.
  Clock known, fenced, any;
};

struct Warpgroup {
  int agent = -1;
  uint32_t first_time = 0;  // of the agent
  uint64_t done = 0;        // operations
  std::deque<Operation> open;
  Clock clock;  // of all that issued those done

  uint64_t complete() const {  // done, or issued by all threads
    uint64_t count = done;
    for (const auto& operation : open) count += operation.arrived == kThreads ? 1 : 0;
    return count;
  }
};
std::vector<Warpgroup> warpgroups;

struct Issuer {
  uint64_t issued = 0;
  std::deque<uint64_t> groups;  // what was issued up to each commit, of those not waited for
};
std::vector<Issuer> issuers;  // by thread

struct IssuedByAll : Condition {
  const Warpgroup& group;
  uint64_t count;

  IssuedByAll(const Warpgroup& g, uint64_t c) : group(g), count(c) {}
  bool met() const override { return group.complete() >= count; }
  std::string description() const override {
    const bool known = group.done + group.open.size() >= count;
    return text("wait for a wgmma that %d of %d threads have issued",
                known ? group.open[count - 1 - group.done].arrived : 0, kThreads);
  }
};

// ---- operands

struct Operand {
  uint32_t start, lead, stride;
};
Operand decode(uint64_t descriptor) {
  const bool swizzled = descriptor >> 62 == 1, offset = (descriptor >> 49 & 7) != 0;
  if (!swizzled || offset) fail("wgmma: not a descriptor of the 128-byte swizzle");
  const auto field = [=](int bit) {
    return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4;
  };
  return {field(0), field(16), field(32)};
}

float to_float(bool half, uint32_t bits) {
  const auto x = static_cast<uint16_t>(bits);
  return half ? f16_float(x) : bf16_float(x);
}

// Eight neighbours in shared memory; to[i * step].
void read_piece(uint32_t address, bool half, float* to, int step, const Access& access) {
  address ^= (address >> 7 & 7) << 4;
  const unsigned char* from = shared_pointer(address, 16, 16, "wgmma");
  agent_reads(address, 16, access);
  uint16_t bits[8];
  memcpy(bits, from, sizeof bits);
  for (int i = 0; i < 8; ++i) to[i * step] = to_float(half, bits[i]);
}

// The rows of A or the columns of B, x, at 16 places k of the contraction: to[k * pitch_k + x *
// pitch_x].
void read_operand(uint64_t descriptor, bool transposed, bool half, int count, float* to,
                  int pitch_k, int pitch_x, const Access& access) {
  const Operand o = decode(descriptor);
  if (!transposed) {
    for (int x = 0; x < count; ++x) {
      for (int k = 0; k < 16; k += 8) {
        const uint32_t address = o.start + x / 8 * o.stride + x % 8 * 128 + k * 2;
        read_piece(address, half, to + x * pitch_x + k * pitch_k, pitch_k, access);
      }
    }
  } else {
    for (int k = 0; k < 16; ++k) {
      for (int x = 0; x < count; x += 8) {
        const uint32_t address =
            o.start + x / 64 * o.lead + k / 8 * o.stride + k % 8 * 128 + x % 64 * 2;
        read_piece(address, half, to + x * pitch_x + k * pitch_k, pitch_x, access);
      }
    }
  }
}

// ---- operations

constexpr int kMostColumns = 256;

// A thread's first row of A and D; it has that and the row 8 below, and two columns of each eight.
int first_row(int thread) { return thread / 32 * 16 + thread % 32 / 4; }

void execute(Warpgroup& group, const Operation& operation) {
  const Product& p = operation.product;
  static float a[64][16], b[16][kMostColumns];
  const Access access = {group.agent, tick(group.agent), &operation.known, &operation.fenced,
                         operation.pc};
  if (p.a_in_registers) {
    for (int thread = 0; thread < kThreads; ++thread) {
      for (int x = 0; x < 4; ++x) {
        for (int e = 0; e < 2; ++e) {
          const int k = thread % 4 * 2 + x / 2 * 8 + e;
          a[first_row(thread) + x % 2 * 8][k] = to_float(p.half, operation.a[thread][x] >> 16 * e);
        }
      }
    }
  } else {
    read_operand(p.a, p.a_transposed, p.half, 64, a[0], 1, 16, access);
  }
  read_operand(p.b, p.b_transposed, p.half, p.n, b[0], kMostColumns, 1, access);
  static float rows[64][kMostColumns];
  for (int row = 0; row < 64; ++row) {
    float* sum = rows[row];
    memset(sum, 0, sizeof rows[row]);
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < p.n; ++column) sum[column] += a[row][k] * b[k][column];
    }
  }
  for (int thread = 0; thread < kThreads; ++thread) {
    float* d = operation.d[thread];
    for (int x = 0; x < p.n / 2; ++x) {
      const int row = first_row(thread) + x / 2 % 2 * 8,
                column = x / 4 * 8 + thread % 4 * 2 + x % 2;
      d[x] = (p.add ? d[x] : 0.0f) + rows[row][column];
    }
  }
}

void execute_until(Warpgroup& group, uint64_t count) {
  while (group.done < count) {
    execute(group, group.open.front());
    join(group.clock, group.open.front().any);
    group.open.pop_front();
    ++group.done;
  }
}

void keep_least(Clock& to, const Clock& from) {
  for (size_t i = 0; i < to.size(); ++i) to[i] = std::min(to[i], from[i]);
}

}  // namespace

void wgmma_start() {
  warpgroups.clear();
  warpgroups.resize(threads / kThreads);
  issuers.assign(threads, {});
}

void wgmma(const Product& product, float* d, const uint32_t* a) {
  const size_t number = static_cast<size_t>(current / kThreads);
  if (number >= warpgroups.size()) fail("wgmma by less than a warpgroup");
  Warpgroup& group = warpgroups[number];
  if (group.agent < 0) {
    group.agent = new_agent("wgmma");
    group.first_time = tick(group.agent);
  }
  const uint64_t index = issuers[current].issued++ - group.done;
  if (index == group.open.size()) group.open.emplace_back();
  Operation& operation = group.open[index];
  if (operation.arrived == 0) {
    operation.product = product;
    operation.pc = EMU_CALLER;
    operation.known = operation.any = known();
    operation.fenced = fenced();
  } else if (operation.product != product) {
    fail("wgmma: threads of a warpgroup differ in its operands or form\n  others:\n" +
         place(operation.pc));
  } else {
    keep_least(operation.known, known());
    keep_least(operation.fenced, fenced());
    join(operation.any, known());
  }
  advance();
  operation.d[current % kThreads] = d;
  if (product.a_in_registers) memcpy(operation.a[current % kThreads], a, sizeof operation.a[0]);
  const bool complete = ++operation.arrived == kThreads;
  if (complete && schedule != 0 && random(3) == 0) execute_until(group, group.done + index + 1);
}

void wgmma_commit() { issuers[current].groups.push_back(issuers[current].issued); }

void wgmma_wait(int pending) {
  auto& groups = issuers[current].groups;
  if (static_cast<int>(groups.size()) <= pending) return;
  const uint64_t count = groups[groups.size() - 1 - static_cast<size_t>(pending)];
  while (static_cast<int>(groups.size()) > pending) groups.pop_front();
  maybe_yield(EMU_CALLER);
  Warpgroup& group = warpgroups[current / kThreads];
  wait_for(IssuedByAll(group, count), EMU_CALLER);
  execute_until(group, count);
  learn(group.agent, group.first_time + static_cast<uint32_t>(count));
  // A product that is done was issued by all, so what they did before has happened.
  acquire(group.clock);
}

}  // namespace emu
