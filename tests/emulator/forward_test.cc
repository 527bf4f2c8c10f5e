// The Hopper forward's kernels on random problems, each by a random schedule, against the
// recurrence.
//   forward_test FIRST STEP END [KERNEL]
// takes the cases FIRST, FIRST + STEP, ... below END, of all kernels in turn or of one.
// MLSTM_TEST_SEED says what is in them.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <map>

#include "recurrence.h"

using namespace mlstm;

namespace {

bool is_forward(const std::string& name) { return name.starts_with("hopper_"); }

// Makes the vectors of whole sequences, by one block each: columns are the blocks of a cluster.
bool is_whole(const std::string& name) {
  const bool makes_all = name.starts_with("gates_whole") || name.starts_with("gates_many");
  return makes_all && emu::kernel_named(name).columns == 1;
}

// A case is about one kernel, which others prepare: of the forward, or one of the gates with longer
// sequences and nothing after it. gates_pack stands for the three kernels that it is the last of.
std::vector<std::string> subjects() {
  std::vector<std::string> out;
  for (const auto& [name, kernel] : emu::kernels()) {
    const bool is_last = name.starts_with("gates_pack");
    if (is_forward(name) || is_whole(name) || is_last) out.push_back(name);
  }
  return out;
}

struct Case {
  std::string subject, vectors;  // "": three kernels
  Problem problem;
};

// What can make the vectors of a problem.
std::vector<std::string> vector_kernels(const Problem& p) {
  std::vector<std::string> out = {""};
  const std::string type = p.type == kF16 ? "_f16_" : "_bf16_";
  for (const auto& [name, kernel] : emu::kernels()) {
    const bool suits = is_whole(name) && name.find(type) != name.npos && kernel.rows * 64 >= p.s;
    if (p.exponential && suits) out.push_back(name);
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
  const bool forward = is_forward(subject), whole = is_whole(subject);
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
    const int more = static_cast<int>(random.below(3));
    if (subject.find("catch_up") != subject.npos) p.segments = 2 + more;
    if (subject.find("forward") != subject.npos) p.segments = 1 + more;
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

// The largest errors so far, by type and output.
struct Largest {
  double error = 0, limit = 0;
};
std::map<std::string, Largest> largest;

// Runs a case; what is wrong, or "".
std::string run(const Case& c, Random& random) {
  const Problem& p = c.problem;
  const bool forward = is_forward(c.subject), half = p.type == kF16;
  Call call(p, random);
  const Outputs expected = recurrence(call);
  call.make_chunk_table();
  if (c.subject.find("gated") == c.subject.npos) {
    call.make_vectors(c.vectors);
    const std::string wrong = check_vectors(call, expected.m);
    if (!wrong.empty()) return wrong;
  }
  if (c.subject.find("forward") != c.subject.npos) call.make_segment_states();
  if (forward) call.forward(c.subject);

  std::string wrong;
  const auto measure = [&](const char* name, bool written, double limit, const Array& got,
                           const Expected& want) {
    if (!written) return;
    const double error = distance(got, want);
    Largest& most = largest[std::string(half ? "f16 " : "bf16 ") + name];
    most = {std::max(most.error, error), limit};
    if (!(error <= limit)) wrong += emu::text("%s: error %.3g, not %.3g  ", name, error, limit);
  };
  // Twice and more what thousands of random cases have shown.
  measure("h", forward, half ? 6e-4 : 4e-3, call.dense_h(), expected.h);
  measure("N", forward && p.writes_n, 2e-4, call.n, expected.n);
  measure("m", p.exponential && p.writes_m, 1e-6, call.m, expected.m);
  measure("C", forward && p.last, half ? 1e-3 : 5e-3, call.last.c, expected.c_last);
  measure("n", forward && p.last, 5e-4, call.last.n, expected.n_last);
  measure("last m", p.exponential && p.last, 1e-6, call.last.m, expected.m_last);
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
  printf("  largest errors (limits):");
  for (const auto& [name, most] : largest) {
    printf("  %s %.2g (%.2g)", name.c_str(), most.error, most.limit);
  }
  printf("\n");
  return failures > 0;
}
