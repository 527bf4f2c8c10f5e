// The Hopper forward's kernels on random problems, each by a random schedule, against the
// recurrence.
//   forward_test FIRST STEP END [KERNEL]
// takes the cases FIRST, FIRST + STEP, ... below END, of all kernels in turn or of one.
// MLSTM_TEST_SEED says what is in them.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>

#include "recurrence.h"

using namespace mlstm;

namespace {

// A case is about one kernel, which others prepare: of the forward, or one of the gates with longer
// sequences and nothing after it. gates_pack stands for the three kernels that it is the last of.
std::vector<std::string> subjects() {
  std::vector<std::string> out;
  for (const auto& [name, kernel] : emu::kernels()) {
    const bool whole = name.starts_with("gates_whole") || name.starts_with("gates_many");
    // Columns are the blocks of a cluster.
    if (whole && kernel.columns > 1) continue;
    if (whole || name.starts_with("hopper_") || name.starts_with("gates_pack")) out.push_back(name);
  }
  return out;
}

struct Case {
  std::string subject, vectors;  // "": three kernels
  Problem problem;
};

bool is_forward(const std::string& name) { return name.starts_with("hopper_"); }

// Kernels for the vectors of sequences of so many chunks.
std::vector<std::string> vector_kernels(const Problem& p) {
  std::vector<std::string> out = {""};
  if (!p.exponential) return out;
  const std::string type = p.type == kF16 ? "_f16_" : "_bf16_";
  for (const std::string& name : subjects()) {
    const bool whole = !is_forward(name) && !name.starts_with("gates_pack");
    const bool holds = emu::kernel_named(name).rows * 64 >= p.s;
    if (whole && holds && name.find(type) != name.npos) out.push_back(name);
  }
  return out;
}

void draw_lengths(Problem& p, Random& random) {
  const int64_t count = 1 + random.below(4);
  for (int64_t x = 0; x < count; ++x) {
    const int64_t length = random.below(160);
    p.lengths.push_back(random.one_in(4) ? length / 64 * 64 : length);
  }
  p.lengths.push_back(1 + random.below(100));
  p.s = 0;
  for (int64_t length : p.lengths) p.s += length;
  p.b = 1;
}

Case draw(const std::string& subject, int64_t round, Random& random) {
  const emu::Kernel& kernel = emu::kernel_named(subject);
  const bool forward = is_forward(subject), whole = !forward && !subject.starts_with("gates_pack");
  Problem p = {};
  p.type = subject.find("bf16") != subject.npos ? kBf16 : kF16;
  // What each kernel shall have met after a few rounds.
  p.exponential = whole || round % 2 == 0;
  p.initial = round / 2 % 2 == 0;
  p.normalize = p.exponential || !random.one_in(4);
  p.last = !random.one_in(4);
  p.writes_n = !random.one_in(4);
  p.writes_m = !random.one_in(4);
  p.token_major = random.one_in(3);
  p.wide_offsets = random.one_in(2);
  p.gate_type = random.one_in(3) ? p.type : kF32;
  p.state_type = random.one_in(4) ? p.type : kF32;
  p.segments = 1;
  p.resets = random.one_in(2) ? 0 : static_cast<int>(random.below(6));
  p.ignored = random.one_in(2) ? 0 : static_cast<int>(random.below(6));
  p.poisoned = random.one_in(5);
  if (forward) {
    const bool large = kernel.rows > 128;
    p.dhqk = kernel.rows - 64 * random.below(std::max(1, kernel.rows / 128));
    p.dhhv = 64 * (1 + random.below(kernel.columns / 64 + 1));
    // Some sequences are long, so that every stage comes round more than once.
    const bool is_long = !large && random.one_in(4);
    p.b = is_long ? 1 : 1 + random.below(2);
    p.nh = is_long ? 1 : 1 + random.below(large ? 2 : 3);
    p.s = 64 * (is_long ? 10 + random.below(8) : 1 + random.below(large ? 4 : 6));
    if (!random.one_in(3)) p.s -= random.below(64);
    if (subject.find("catch_up") != subject.npos)
      p.segments = 2 + static_cast<int>(random.below(3));
    if (subject.find("forward") != subject.npos) p.segments = 1 + static_cast<int>(random.below(4));
  } else {
    p.dhqk = p.dhhv = 1;
    p.b = 1;
    p.nh = 1 + random.below(2);
    p.s = 1 + random.below(64 * (whole ? kernel.rows : 40));
  }
  if (round % 3 == 1) draw_lengths(p, random);
  Case out = {subject, whole ? subject : "", p};
  if (forward) {
    const auto kernels = vector_kernels(p);
    out.vectors = kernels[static_cast<size_t>(random.below(static_cast<int64_t>(kernels.size())))];
  }
  return out;
}

// ---- limits

struct Measured {
  const char* name;
  double limit, error = 0;
};

// The largest errors so far, by the data's type.
struct Errors {
  Measured of[6];
};
Errors errors_of(DType type) {
  const bool half = type == kF16;
  return {{{"h", half ? 6e-4 : 4e-3},
           {"N", 2e-4},
           {"m", 1e-6},
           {"C", half ? 1e-3 : 5e-3},
           {"n", 5e-4},
           {"last m", 1e-6}}};
}
Errors largest[2] = {errors_of(kBf16), errors_of(kF16)};

// Runs a case; what is wrong, or "".
std::string run(const Case& c, Random& random) {
  const Problem& p = c.problem;
  Call call(p, random);
  const Outputs expected = recurrence(call);
  const bool gated = c.subject.find("gated") != c.subject.npos;
  call.make_chunk_table();
  if (!gated) {
    call.make_vectors(c.vectors);
    const std::string wrong = check_vectors(call, expected.m);
    if (!wrong.empty()) return wrong;
  }
  const bool forward = is_forward(c.subject);
  if (forward) {
    if (c.subject.find("forward") != c.subject.npos) call.make_segment_states();
    call.forward(c.subject);
  }
  Errors errors = errors_of(p.type);
  const auto measure = [&](int index, bool written, const Array& got, const Expected& want) {
    if (written) errors.of[index].error = distance(got, want);
  };
  measure(1, forward && p.writes_n, call.n, expected.n);
  measure(2, p.exponential && p.writes_m, call.m, expected.m);
  measure(3, forward && p.last, call.last.c, expected.c_last);
  measure(4, forward && p.last, call.last.n, expected.n_last);
  measure(5, p.exponential && p.last, call.last.m, expected.m_last);
  if (forward) {
    // h as dense as what is expected.
    Array h(p.type, call.h.count());
    for (int64_t b = 0; b < p.b; ++b) {
      for (int64_t head = 0; head < p.nh; ++head) {
        for (int64_t t = 0; t < p.s; ++t) {
          for (int64_t d = 0; d < p.dhhv; ++d) {
            h.set(call.token(b, head, t) * p.dhhv + d,
                  call.h.get(call.place(b, head, t, p.dhhv) + d));
          }
        }
      }
    }
    measure(0, true, h, expected.h);
  }
  std::string wrong;
  for (int x = 0; x < 6; ++x) {
    const Measured& own = errors.of[x];
    Measured& most = largest[p.type == kF16].of[x];
    most.error = std::max(most.error, own.error);
    if (!(own.error <= own.limit)) {
      wrong += emu::text("%s: error %.3g, not %.3g  ", own.name, own.error, own.limit);
    }
  }
  return wrong;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 4) return 2;
  const char* given = getenv("MLSTM_TEST_SEED");
  const uint64_t seed = given != nullptr ? strtoull(given, nullptr, 10) : 1;
  const int64_t first = atoll(arguments[1]), step = atoll(arguments[2]), end = atoll(arguments[3]);
  const std::string only = count > 4 ? arguments[4] : "";
  const auto names = only.empty() ? subjects() : std::vector<std::string>{only};
  const auto size = static_cast<int64_t>(names.size());
  time_t said = time(nullptr);
  int failures = 0;
  for (int64_t index = first; index < end; index += step) {
    Random random(seed, static_cast<uint64_t>(index));
    const Case c = draw(names[static_cast<size_t>(index % size)], index / size, random);
    emu::schedule = random.one_in(4) ? 0 : static_cast<uint64_t>(1 + random.below(1 << 30));
    emu::running = emu::text("  case of %s: %s\n  again: MLSTM_TEST_SEED=%lu '%s' %ld 1 %ld %s",
                             c.subject.c_str(), c.problem.description().c_str(), seed, arguments[0],
                             index, index + 1, only.c_str());
    const std::string wrong = run(c, random);
    if (!wrong.empty()) {
      fprintf(stderr, "\n%s\n%s\n", wrong.c_str(), emu::running.c_str());
      if (++failures == 3) return 1;
    }
    if (time(nullptr) - said >= 5) {
      said = time(nullptr);
      printf("  %ld of %ld cases\n", index + 1, end);
      fflush(stdout);
    }
  }
  for (const Errors& errors : largest) {
    printf("  largest errors, %s:", &errors == largest ? "bf16" : "f16");
    for (const Measured& x : errors.of) printf("  %s %.2g (%.2g)", x.name, x.error, x.limit);
    printf("\n");
  }
  return failures > 0;
}
