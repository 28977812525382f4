/* Mode 0: the chunk form with C = 64, each step a plain loop nest of its own and the solve done by the solve_tri
   operator. Slow and easy to check; the numbers to compare the other variants with. Here U and W are explicit:

     (I + A) [U | W] = [beta v | beta (γ ∘ k)]       u = U - W S^T

   Names as in gated_delta_chunked_scalar.c. */
#include "../solve_tri/solve_tri.h"
#include "gated_delta_parts.h"

q3n_status q3n_gated_delta_unfused_scalar(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch);

enum { C = Q3N_GATED_DELTA_UNFUSED_CHUNK };

typedef struct chunk {
  int64_t n;      /* tokens in it */
  float *s;       /* [V][K] */
  float *k, *q;   /* [C][K] */
  float *decay;   /* [C][K] exp(g) */
  float *gamma;   /* [C][K] product of the decays of tokens 0 .. i */
  float *k_end;   /* [C][K] keys decayed to the end of the chunk */
  float *uw;      /* [C][V + K] U beside W, solved in place */
  float *u;       /* [C][V] */
  float *a, *p;   /* [C][C] */
  float *beta;    /* [C] */
  float *row[2];  /* [K] */
  double *reach;  /* [K] the product that gamma is rounded from */
} chunk;

static chunk layout(const q3n_gated_delta_args *a, void *scratch) {
  const int64_t K = a->K, V = a->V;
  chunk x = {.reach = scratch};
  float *at = (float *)(x.reach + K);
  x.s = at, at += K * V;
  x.k = at, at += C * K;
  x.q = at, at += C * K;
  x.decay = at, at += C * K;
  x.gamma = at, at += C * K;
  x.k_end = at, at += C * K;
  x.uw = at, at += C * (V + K);
  x.u = at, at += C * V;
  x.a = at, at += C * C;
  x.p = at, at += C * C;
  x.beta = at, at += C;
  x.row[0] = at, at += K;
  x.row[1] = at;
  return x;
}

static void load_tokens(const q3n_gated_delta_args *a, const gd_head *x, int64_t t0, chunk *ch) {
  for (int64_t i = 0; i < ch->n; i++) {
    gd_load_vector(a, x->k + (t0 + i) * a->k_t, 1.0f, ch->k + i * a->K);
    gd_load_vector(a, x->q + (t0 + i) * a->q_t, a->scale, ch->q + i * a->K);
    gd_load_decay(a, x, t0 + i, ch->decay + i * a->K);
    ch->beta[i] = x->beta[(t0 + i) * a->beta_t];
  }
}

/* In double: of factors near 1, a product in float is always rounded down. */
static void cumulative_decay(int64_t K, chunk *ch) {
  for (int64_t c = 0; c < K; c++) ch->reach[c] = 1.0;
  for (int64_t i = 0; i < ch->n; i++)
    for (int64_t c = 0; c < K; c++) {
      ch->reach[c] *= (double)ch->decay[i * K + c];
      ch->gamma[i * K + c] = (float)ch->reach[c];
    }
}

/* A and P column by column: key j is decayed past one token after the other, and ends up in k_end. */
static void scores(int64_t K, chunk *ch) {
  for (int64_t j = 0; j < ch->n; j++) {
    float *key = ch->k_end + j * K;
    for (int64_t c = 0; c < K; c++) key[c] = ch->k[j * K + c];
    ch->p[j * C + j] = gd_dot(ch->q + j * K, key, K);
    for (int64_t i = j + 1; i < ch->n; i++) {
      for (int64_t c = 0; c < K; c++) key[c] *= ch->decay[i * K + c];
      ch->a[i * C + j] = ch->beta[i] * gd_dot(ch->k + i * K, key, K);
      ch->p[i * C + j] = gd_dot(ch->q + i * K, key, K);
    }
  }
}

/* The plain C solve whatever the ISA mask: this variant's bits must not depend on it. */
static const q3n_solve_tri_variant *scalar_solve(void) {
  int64_t i = q3n_solve_tri_variant_count() - 1;
  while (i > 0 && q3n_solve_tri_variant_at(i)->isa != Q3N_ISA_SCALAR) i--;
  return q3n_solve_tri_variant_at(i);
}

static q3n_status solve(const q3n_gated_delta_args *a, const gd_head *x, int64_t t0, chunk *ch) {
  const int64_t K = a->K, V = a->V, width = V + K;
  for (int64_t i = 0; i < ch->n; i++) {
    for (int64_t j = 0; j < V; j++) ch->uw[i * width + j] = ch->beta[i] * x->v[(t0 + i) * a->v_t + j];
    for (int64_t c = 0; c < K; c++) ch->uw[i * width + V + c] = ch->beta[i] * ch->gamma[i * K + c] * ch->k[i * K + c];
  }
  const q3n_solve_tri_args system = {.struct_bytes = sizeof system, .x = ch->uw, .l = ch->a, .b = ch->uw,
                                     .unit_diagonal = 1, .x_row = width, .l_row = C, .b_row = width,
                                     .batch = 1, .n = ch->n, .m = width};
  const q3n_solve_tri_variant *v = scalar_solve();
  return q3n_solve_tri_run(v, &system, 0, v->items(&system), NULL, 0);
}

static void pseudo_values(int64_t K, int64_t V, chunk *ch) {
  for (int64_t i = 0; i < ch->n; i++) {
    const float *uw = ch->uw + i * (V + K);
    for (int64_t j = 0; j < V; j++) ch->u[i * V + j] = uw[j] - gd_dot(uw + V, ch->s + j * K, K);
  }
}

static void output(const q3n_gated_delta_args *a, const gd_head *x, int64_t t0, chunk *ch) {
  const int64_t K = a->K, V = a->V;
  float *q = ch->row[0];
  for (int64_t i = 0; i < ch->n; i++) {
    float *o = x->o + (t0 + i) * a->o_t;
    for (int64_t c = 0; c < K; c++) q[c] = ch->gamma[i * K + c] * ch->q[i * K + c];
    for (int64_t j = 0; j < V; j++) o[j] = gd_dot(q, ch->s + j * K, K);
    for (int64_t t = 0; t <= i; t++)
      for (int64_t j = 0; j < V; j++) o[j] += ch->p[i * C + t] * ch->u[t * V + j];
  }
}

static void advance_state(int64_t K, int64_t V, chunk *ch) {
  const float *gamma = ch->gamma + (ch->n - 1) * K;
  for (int64_t j = 0; j < V; j++) {
    float *s = ch->s + j * K;
    for (int64_t c = 0; c < K; c++) s[c] *= gamma[c];
    for (int64_t t = 0; t < ch->n; t++)
      for (int64_t c = 0; c < K; c++) s[c] += ch->u[t * V + j] * ch->k_end[t * K + c];
  }
}

q3n_status q3n_gated_delta_unfused_scalar(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch) {
  Q3N_GATED_DELTA_F32_ALONE(a);
  const int64_t K = a->K, V = a->V;
  chunk ch = layout(a, scratch);

  for (int64_t item = begin; item < end; item++) {
    const gd_head x = gd_find_head(a, item / a->HV, item % a->HV);
    if (K == 0) {
      gd_zero_output(a, &x);
      continue;
    }
    gd_copy_rows(ch.s, K, x.state_in, a->state_v, V, K);
    for (int64_t t0 = 0; t0 < x.T; t0 += C) {
      ch.n = x.T - t0 < C ? x.T - t0 : C;
      load_tokens(a, &x, t0, &ch);
      cumulative_decay(K, &ch);
      scores(K, &ch);
      const q3n_status status = solve(a, &x, t0, &ch);
      if (status != Q3N_OK) return status;
      pseudo_values(K, V, &ch);
      output(a, &x, t0, &ch);
      if (x.snapshots) gd_replay_snapshots(a, &x, t0, ch.n, ch.s, K, 1, ch.u, ch.row[0], ch.row[1]);
      advance_state(K, V, &ch);
    }
    if (x.state_out) gd_copy_rows(x.state_out, a->state_v, ch.s, K, V, K);
  }
  return Q3N_OK;
}
