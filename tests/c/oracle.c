#include "oracle.h"

#include <math.h>

unsigned oracle_run(const struct oracle* o) {
  const double scale = 1 / sqrt(o->dhqk);
  const int sigmoid = o->gate == MLSTM_GATE_SIGMOID;
  unsigned sides = 0;
  for (int t = 0; t < o->s; t++) {
    const double *q = o->q + t * o->dhqk, *k = o->k + t * o->dhqk, *v = o->v + t * o->dhhv;
    double i = o->i[t], f = o->f[t];
    double logf = fmin(f, 0) - log1p(exp(-fabs(f)));
    double m = sigmoid ? 0 : fmax(logf + *o->m, i);
    double keep = exp(logf + (sigmoid ? 0 : *o->m) - m);
    double add = sigmoid ? 1 / (1 + exp(-i)) : exp(i - m);
    double dot = 0, dot_terms = 0;
    for (int a = 0; a < o->dhqk; a++) {
      for (int b = 0; b < o->dhhv; b++) {
        double* c = &o->c[a * o->dhhv + b];
        *c = keep * *c + add * k[a] * v[b];
        double* c_terms = &o->c_terms[a * o->dhhv + b];
        *c_terms = keep * *c_terms + add * fabs(k[a] * v[b]);
      }
      o->n[a] = keep * o->n[a] + add * k[a];
      o->n_terms[a] = keep * o->n_terms[a] + add * fabs(k[a]);
      dot += scale * q[a] * o->n[a];
      dot_terms += scale * fabs(q[a]) * o->n_terms[a];
    }
    *o->m_terms = logf + *o->m < i ? fabs(i) : *o->m_terms - logf;
    *o->m = m;
    double floor = sigmoid ? 1 : exp(-m);
    sides = sides * 3 + (fabs(dot) > floor) * (dot > 0 ? 1 : 2);
    for (int b = 0; b < o->dhhv; b++) {
      double sum = 0, terms = 0;
      for (int a = 0; a < o->dhqk; a++) {
        sum += scale * q[a] * o->c[a * o->dhhv + b];
        terms += scale * fabs(q[a]) * o->c_terms[a * o->dhhv + b];
      }
      double denominator = fmax(fabs(dot), floor) + o->eps, h = sum / denominator;
      if (fabs(dot) > floor) terms += fabs(h) * dot_terms;
      o->h[t * o->dhhv + b] = h;
      o->h_terms[t * o->dhhv + b] = terms / denominator;
    }
  }
  return sides;
}
