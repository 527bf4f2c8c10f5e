#include "recurrence.h"

#include <algorithm>
#include <cmath>

using namespace mlstm;

namespace {

double logsigmoid(double x) { return std::fmin(x, 0.0) - std::log1p(std::exp(-std::fabs(x))); }

// A factor of zero forgets what it multiplies, NaN included.
double keep(double factor, double x) { return factor == 0 ? 0 : factor * x; }

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

// One head of a row, along its tokens.
struct Head {
  const Call& call;
  Outputs& out;
  const Problem& p = call.p;
  int64_t row, head;
  std::vector<double> c, c_terms, n, n_terms;
  double m = 0;

  Head(const Call& call_, Outputs& out_, int64_t row_, int64_t head_)
      : call(call_), out(out_), row(row_), head(head_) {
    const int64_t index = row * p.nh + head, matrix = p.dhqk * p.dhhv;
    const auto start = [&](const Array& state, int64_t count) {
      std::vector<double> values(static_cast<size_t>(count), 0.0);
      for (int64_t x = 0; p.initial && x < count; ++x) values[x] = state.get(index * count + x);
      return values;
    };
    const auto sizes = [](std::vector<double> values) {
      for (double& x : values) x = std::fabs(x);
      return values;
    };
    c = start(call.initial.c, matrix);
    n = start(call.initial.n, p.dhqk);
    c_terms = sizes(c);
    n_terms = sizes(n);
    if (p.initial && p.exponential) m = call.initial.m.get(index);
  }

  void token(int64_t t) {
    const int64_t b = call.batch(row), index = call.token(b, head, t);
    const Gates gates = next_gates(p, call.i.get(index), call.f.get(index), m);
    const double decay = std::exp(gates.step), gain = std::exp(gates.source);
    const int64_t at_k = call.place(b, head, t, p.dhqk), at_v = call.place(b, head, t, p.dhhv);
    const auto width = static_cast<size_t>(p.dhhv);
    std::vector<double> v(width), sum(width, 0.0), terms(width, 0.0);
    for (size_t e = 0; e < width; ++e) v[e] = call.v.get(at_v + static_cast<int64_t>(e));
    double dot = 0, dot_terms = 0;
    for (int64_t d = 0; d < p.dhqk; ++d) {
      const double q = call.args.qk_scale * call.q.get(at_k + d);
      const double k = gain * call.k.get(at_k + d);
      n[d] = keep(decay, n[d]) + k;
      n_terms[d] = keep(decay, n_terms[d]) + std::fabs(k);
      dot += q * n[d];
      dot_terms += std::fabs(q) * n_terms[d];
      double *own = &c[d * p.dhhv], *own_terms = &c_terms[d * p.dhhv];
      for (size_t e = 0; e < width; ++e) {
        const double added = k * v[e];
        own[e] = keep(decay, own[e]) + added;
        own_terms[e] = keep(decay, own_terms[e]) + std::fabs(added);
        sum[e] += q * own[e];
        terms[e] += std::fabs(q) * own_terms[e];
      }
    }
    const double floor = p.exponential ? std::exp(-m) : 1;
    const double larger = std::isnan(dot) ? dot : std::fmax(std::fabs(dot), floor);
    const double inverse = p.normalize ? 1 / (larger + call.args.eps) : 1;
    for (size_t e = 0; e < width; ++e) {
      const double h = keep(inverse, sum[e]);
      // The denominator's errors count where it is not the floor.
      const double more = p.normalize && std::fabs(dot) > floor ? std::fabs(h) * dot_terms : 0;
      out.h.value[index * p.dhhv + e] = h;
      out.h.terms[index * p.dhhv + e] = keep(inverse, terms[e] + more);
    }
    out.n.value[index] = dot;
    out.n.terms[index] = dot_terms;
    out.m.value[index] = m;
    out.m.terms[index] = terms_of_m(m);
  }

  void finish() {
    const int64_t index = row * p.nh + head;
    const auto put = [&](Expected& to, const std::vector<double>& x,
                         const std::vector<double>& terms) {
      std::copy(x.begin(), x.end(), to.value.begin() + index * static_cast<int64_t>(x.size()));
      std::copy(terms.begin(), terms.end(),
                to.terms.begin() + index * static_cast<int64_t>(x.size()));
    };
    put(out.c_last, c, c_terms);
    put(out.n_last, n, n_terms);
    put(out.m_last, {m}, {terms_of_m(m)});
  }
};

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
      Head one(call, out, row, head);
      for (int64_t t = 0; t < call.length(row); ++t) one.token(call.first(row) + t);
      one.finish();
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
