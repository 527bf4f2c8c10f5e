#include "recurrence.h"

#include <algorithm>
#include <cmath>

#include "../c/oracle.h"

using namespace mlstm;

namespace {

double logsigmoid(double x) { return std::fmin(x, 0.0) - std::log1p(std::exp(-std::fabs(x))); }

// A token's decay of the state and gain of k v^T, both as logarithms; m goes on.
struct Gates {
  double step, source;
};
Gates next_gates(const Problem& p, double i, double f, double& m) {
  if (!p.exponential) return {logsigmoid(f), logsigmoid(i)};
  const double kept = logsigmoid(f) + m;
  m = std::fmax(kept, i);
  if (m == -INFINITY) return {-INFINITY, -INFINITY};
  return {kept - m, i - m};
}

// So that errors of m count against 1 + |m|.
double terms_of_m(double m) { return 8 * (1 + std::fabs(m)); }

// Some consecutive numbers.
using Numbers = std::vector<double>;
Numbers numbers(const Array& from, int64_t first, int64_t count) {
  Numbers out(static_cast<size_t>(count));
  for (int64_t x = 0; x < count; ++x) out[x] = from.get(first + x);
  return out;
}
// A sequence of one head: a tensor's `d` numbers of each token.
Numbers sequence(const Call& call, const Array& from, int64_t row, int64_t head, int64_t d) {
  Numbers out;
  for (int64_t t = 0; t < call.length(row); ++t) {
    const int64_t at = call.place(call.batch(row), head, call.first(row) + t, d);
    for (double x : numbers(from, at, d)) out.push_back(x);
  }
  return out;
}
void put(Expected& to, int64_t first, const Numbers& values, const Numbers& terms) {
  std::copy(values.begin(), values.end(), to.value.begin() + first);
  std::copy(terms.begin(), terms.end(), to.terms.begin() + first);
}

void add_head(Outputs& out, const Call& call, int64_t row, int64_t head) {
  const Problem& p = call.p;
  const int64_t index = row * p.nh + head, matrix = p.dhqk * p.dhhv, length = call.length(row);
  const int64_t first = call.token(call.batch(row), head, call.first(row));
  const auto state = [&](const Array& array, int64_t count) {
    if (!p.initial) return Numbers(static_cast<size_t>(count), 0.0);
    return numbers(array, index * count, count);
  };
  const auto sizes = [](Numbers values) {
    for (double& x : values) x = std::fabs(x);
    return values;
  };
  Numbers q = sequence(call, call.q, row, head, p.dhqk),
          k = sequence(call, call.k, row, head, p.dhqk);
  Numbers v = sequence(call, call.v, row, head, p.dhhv), h(v.size()), h_terms(v.size());
  Numbers i = numbers(call.i, first, length), f = numbers(call.f, first, length);
  Numbers n(i.size()), n_terms(i.size()), m(i.size());
  Numbers c_state = state(call.initial.c, matrix), c_terms = sizes(c_state);
  Numbers n_state = state(call.initial.n, p.dhqk), n_state_terms = sizes(n_state);
  Numbers m_state = p.exponential ? state(call.initial.m, 1) : Numbers{0.0}, m_state_terms = {0.0};
  oracle o = {};
  o.s = static_cast<int>(length);
  o.dhqk = static_cast<int>(p.dhqk);
  o.dhhv = static_cast<int>(p.dhhv);
  o.gate = p.exponential ? MLSTM_GATE_EXP : MLSTM_GATE_SIGMOID;
  o.unnormalized = !p.normalize;
  o.eps = call.args.eps;
  o.q = q.data(), o.k = k.data(), o.v = v.data(), o.i = i.data(), o.f = f.data();
  o.h = h.data(), o.h_terms = h_terms.data();
  o.c = c_state.data(), o.c_terms = c_terms.data();
  o.n = n_state.data(), o.n_terms = n_state_terms.data();
  o.m = m_state.data(), o.m_terms = m_state_terms.data();
  o.token_n = n.data(), o.token_n_terms = n_terms.data(), o.token_m = m.data();
  oracle_run(&o);
  const auto terms_of = [](Numbers values) {
    for (double& x : values) x = terms_of_m(x);
    return values;
  };
  put(out.h, first * p.dhhv, h, h_terms);
  put(out.n, first, n, n_terms);
  put(out.m, first, m, terms_of(m));
  put(out.c_last, index * matrix, c_state, c_terms);
  put(out.n_last, index * p.dhqk, n_state, n_state_terms);
  put(out.m_last, index, m_state, terms_of(m_state));
}

}  // namespace

Expected::Expected(int64_t count, int64_t width_)
    : width(width_), value(static_cast<size_t>(count), NAN), terms(static_cast<size_t>(count), 0) {}

Outputs recurrence(const Call& call) {
  const Problem& p = call.p;
  const int64_t tokens = p.b * p.nh * p.s, heads = call.rows * p.nh;
  Outputs out = {
      {tokens * p.dhhv, p.dhhv}, {tokens, 1}, {tokens, 1}, {heads * p.dhqk * p.dhhv, p.dhhv},
      {heads * p.dhqk, p.dhqk},  {heads, 1}};
  for (int64_t row = 0; row < call.rows; ++row) {
    for (int64_t head = 0; head < p.nh; ++head) {
      add_head(out, call, row, head);
    }
  }
  return out;
}

double distance(const Array& got, const Expected& expected) {
  double sum = 0;
  const int64_t width = expected.width, rows = static_cast<int64_t>(expected.value.size()) / width;
  for (int64_t row = 0; row < rows; ++row) {
    double difference = 0, norm = 0, largest = 0;
    bool defined = true;
    for (int64_t x = row * width; x < (row + 1) * width; ++x) {
      const double want = expected.value[x], delta = got.get(x) - want;
      defined = defined && !std::isnan(want);
      // m of a state that has been reset.
      if (std::isinf(want) && got.get(x) == want) continue;
      difference += delta * delta;
      norm += want * want;
      largest += expected.terms[x] * expected.terms[x];
    }
    if (!defined || difference == 0) continue;
    sum += difference / std::fmax(norm, largest / 64);
  }
  return std::isnan(sum) ? INFINITY : std::sqrt(sum / std::fmax(1, static_cast<double>(rows)));
}

// ---- vectors

namespace {

constexpr double kLog2 = 0.6931471805599453;

// An exponent as it is summed up, in log2 units.
double clamped(double natural) { return std::fmax(natural / kLog2, kNear); }

struct VectorCheck {
  const float* got;
  int64_t chunk;
  std::string wrong = {};

  void close(const char* name, int t, double x, double want, double limit) {
    if (std::fabs(x - want) <= limit || !wrong.empty()) return;
    wrong = emu::text("%s of token %d of chunk %ld is %.9g, not %.9g", name, t, chunk, x, want);
  }
  void vector(const char* name, int t, int from, int at, double want, double limit) {
    close(name, t, got[from / 4 + at], want, limit);
  }
};

}  // namespace

std::string check_vectors(const Call& call, const Expected& m) {
  const Problem& p = call.p;
  int64_t chunk = 0;
  for (int64_t row = 0; row < call.rows; ++row) {
    for (int64_t from = 0; from < call.length(row); from += 64, ++chunk) {
      for (int64_t head = 0; head < p.nh; ++head) {
        const int length = static_cast<int>(std::min<int64_t>(64, call.length(row) - from));
        const int64_t start = call.token(call.batch(row), head, call.first(row) + from);
        const bool given = p.initial && p.exponential;
        double before = given ? call.initial.m.get(row * p.nh + head) : 0;
        if (from > 0 && p.exponential) before = m.value[start - 1];
        // Phi and the sources, then what is made of them.
        double phi[64], source[64], after[64], total = 0;
        for (int t = 0; t < length; ++t) {
          const Gates gates = next_gates(p, call.i.get(start + t), call.f.get(start + t), before);
          phi[t] = total += clamped(gates.step);
          source[t] = clamped(gates.source);
          after[t] = before;
        }
        VectorCheck check = {call.vectors(chunk, head), chunk};
        const auto* split = static_cast<const uint16_t*>(static_cast<const void*>(check.got));
        for (int t = 0; t < 64; ++t) {
          const bool inside = t < length;
          // Sums are in float.
          const double digits = 1e-5 * (1 + std::fabs(total));
          const int column = column_order(t);
          const double w = inside ? std::exp2(phi[t]) : 0;
          const double a = inside ? std::exp2(total - phi[t] + source[t]) : 0;
          const double floor = inside && p.exponential ? std::exp(-after[t]) : 1;
          check.vector("w", t, kWeightAt, column, w, digits * w + 1e-37);
          check.vector("a", t, kInputAt, column, a, digits * a + 1e-37);
          check.vector("row", t, kRowAt, t, inside ? phi[t] : 0, digits);
          check.vector("col", t, kColAt, column, inside ? source[t] - phi[t] : kNever, digits);
          if (floor < 1e38)
            check.vector("floor", t, kFloorAt, t, floor,
                         1e-5 * floor * (1 + std::fabs(std::log(floor))));
          const auto number = [&](uint16_t bits) {
            return p.type == kF16 ? emu::f16_float(bits) : emu::bf16_float(bits);
          };
          const double both = number(split[t]) + number(split[64 + (t ^ 8)]);
          check.close("a in two parts", t, both, a, (digits + 0x1p-16) * a + 0x1p-24);
        }
        check.vector("g", 0, kDecayAt, 0, std::exp2(total), 1e-5 * (1 + std::fabs(total)) + 1e-37);
        if (!check.wrong.empty()) return check.wrong + emu::text(", head %ld", head);
      }
    }
  }
  return "";
}
