/* The mLSTM recurrence in double precision, as the header's first lines write it. */
#ifndef MLSTM_TESTS_ORACLE_H
#define MLSTM_TESTS_ORACLE_H

#include <mlstm.h>

/* One head: q, k (s, dhqk), v, h (s, dhhv), i, f (s); all dense. */
struct oracle {
  int s, dhqk, dhhv;
  mlstm_gate gate;
  double eps;
  const double *q, *k, *v, *i, *f;
  double* h;
  /* The state (dhqk, dhhv), (dhqk), (1): before the first token, then after the last. */
  double *c, *n, *m;
  /* What the sums above would be without cancellation, by which rounding errors grow: each term's
   * absolute value in place of the term; the states' begin as the absolute values of the states. */
  double *h_terms, *c_terms, *n_terms, *m_terms;
  /* N with its terms, and m, of each token (s); or NULL. */
  double *token_n, *token_n_terms, *token_m;
  /* h is not divided by the denominator (sigmoid gate). */
  int unnormalized;
};

/* Returns a number that tells which side of the denominator's maximum each token was on. */
unsigned oracle_run(const struct oracle* o);

#endif
