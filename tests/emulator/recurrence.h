// The recurrence of the mLSTM, token by token in double precision, and how far a call is from it.
#ifndef MLSTM_TESTS_EMULATOR_RECURRENCE_H
#define MLSTM_TESTS_EMULATOR_RECURRENCE_H

#include <string>
#include <vector>

#include "call.h"

// Numbers in rows of some width, and what their sums would be without cancellation, by which
// rounding errors grow: each term's absolute value in place of the term. NaN where the inputs make
// it so.
struct Expected {
  int64_t width = 1;
  std::vector<double> value, terms;

  Expected() = default;
  Expected(int64_t count, int64_t width_);
};

struct Outputs {
  Expected h, n, m;  // dense (B, NH, S, D)
  Expected c_last, n_last, m_last;
};
Outputs recurrence(const Call& call);

// The root mean square over rows of |difference| / |expected|, norms of a row, or over an eighth of
// the norm of the terms, if that is more: so that rows where sums cancel, and those where a
// denominator makes numbers large, count like others. Infinite if something is no number or should
// be zero.
double distance(const Array& got, const Expected& expected);

// Whether the vectors of all chunks are those of params.cuh; else a text says which are not.
std::string check_vectors(const Call& call, const Expected& m);

#endif
