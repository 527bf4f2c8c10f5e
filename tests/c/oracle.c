#include "oracle.h"

#include <math.h>
#include <string.h>

/* A factor of zero forgets what it multiplies, NaN included. */
static double forget(double factor, double x) { return factor == 0 ? 0 : factor * x; }

unsigned oracle_run(const struct oracle* o) {
  const double scale = 1 / sqrt(o->dhqk);
  const int sigmoid = o->gate == MLSTM_GATE_SIGMOID;
  unsigned sides = 0;
  for (int t = 0; t < o->s; t++) {
    const double *q = o->q + t * o->dhqk, *k = o->k + t * o->dhqk, *v = o->v + t * o->dhhv;
    double *h = o->h + t * o->dhhv, *h_terms = o->h_terms + t * o->dhhv;
    double i = o->i[t], f = o->f[t];
    double logf = fmin(f, 0) - log1p(exp(-fabs(f)));
    double m = sigmoid ? 0 : fmax(logf + *o->m, i);
    double keep = exp(logf + (sigmoid ? 0 : *o->m) - m);
    double add = sigmoid ? 1 / (1 + exp(-i)) : exp(i - m);
    /* Nothing has been seen since a reset. */
    if (m == -INFINITY) keep = add = 0;
    double dot = 0, dot_terms = 0;
    memset(h, 0, sizeof *h * (size_t)o->dhhv);
    memset(h_terms, 0, sizeof *h * (size_t)o->dhhv);
    for (int a = 0; a < o->dhqk; a++) {
      double *c = o->c + a * o->dhhv, *c_terms = o->c_terms + a * o->dhhv;
      for (int b = 0; b < o->dhhv; b++) {
        double added = add * k[a] * v[b];
        c[b] = forget(keep, c[b]) + added;
        c_terms[b] = forget(keep, c_terms[b]) + fabs(added);
        h[b] += scale * q[a] * c[b];
        h_terms[b] += scale * fabs(q[a]) * c_terms[b];
      }
      o->n[a] = forget(keep, o->n[a]) + add * k[a];
      o->n_terms[a] = forget(keep, o->n_terms[a]) + add * fabs(k[a]);
      dot += scale * q[a] * o->n[a];
      dot_terms += scale * fabs(q[a]) * o->n_terms[a];
    }
    *o->m_terms = logf + *o->m < i ? fabs(i) : *o->m_terms - logf;
    *o->m = m;
    double floor = sigmoid ? 1 : exp(-m);
    int below = fabs(dot) <= floor;
    sides = sides * 3 + !below * (dot > 0 ? 1 : 2);
    double denominator = o->unnormalized ? 1 : (below ? floor : fabs(dot)) + o->eps;
    for (int b = 0; b < o->dhhv; b++) {
      h[b] = forget(1 / denominator, h[b]);
      if (!below && !o->unnormalized) h_terms[b] += fabs(h[b]) * dot_terms;
      h_terms[b] = forget(1 / denominator, h_terms[b]);
    }
    if (o->token_n) o->token_n[t] = dot;
    if (o->token_n_terms) o->token_n_terms[t] = dot_terms;
    if (o->token_m) o->token_m[t] = m;
  }
  return sides;
}
