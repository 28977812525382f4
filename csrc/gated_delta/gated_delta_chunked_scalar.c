/* The chunk form. Within a chunk of n <= C tokens, with Γ_ij = exp(g_{j+1} + ... + g_i) and S the state before it:

     A_ij = beta_i (k_i ∘ Γ_ij) · k_j      j < i
     P_ij = (q_i ∘ Γ_ij) · k_j             j <= i
     (I + A) u = beta (v - (γ ∘ k) S^T)    γ_i = exp(g_1 + ... + g_i); u_i is the u of token i in the recurrence
     o = (γ ∘ q) S^T + P u
     S <- γ_n ∘ S + u^T (Γ_n ∘ k)

   Every decay is a product of the tokens' exp(g), extended one token at a time: no difference of cumulative sums (which
   cancels, and is inf - inf where a gate closes) and no exponential of a positive number (which 1/Γ would need).
   Derivation and comparison with the split into U and W: README.md. */
#include "gated_delta_parts.h"

q3n_status q3n_gated_delta_chunked16_scalar(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch);
q3n_status q3n_gated_delta_chunked32_scalar(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch);
q3n_status q3n_gated_delta_chunked64_scalar(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch);
q3n_status q3n_gated_delta_chunked128_scalar(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch);

typedef struct chunk {
  int64_t n, C;   /* tokens in it, and at most */
  float *s;       /* [K][V] the state, transposed: the value channels are independent, so they are the vector */
  float *k, *q;   /* [C][K] later ∘ γ: decayed from the start of the chunk */
  float *k_end;   /* [K][C] keys, transposed and decayed to the end of the chunk */
  float *decay;   /* [C][K] exp(g) */
  float *u;       /* [C][V] */
  float *a, *p;   /* [C][C] A and P; elements above the diagonal are not read */
  float *beta;    /* [C] */
  float *reach;   /* [C] one row of Γ */
  float *row[3];  /* [K] γ, and two to replay snapshots with */
} chunk;

static chunk layout(const q3n_gated_delta_args *a, int64_t C, float *at) {
  const int64_t K = a->K, V = a->V;
  chunk x = {.C = C};
  x.s = at, at += K * V;
  x.k = at, at += C * K;
  x.q = at, at += C * K;
  x.k_end = at, at += C * K;
  x.decay = at, at += C * K;
  x.u = at, at += C * V;
  x.a = at, at += C * C;
  x.p = at, at += C * C;
  x.beta = at, at += C;
  x.reach = at, at += C;
  x.row[0] = at, at += K;
  x.row[1] = at, at += K;
  x.row[2] = at;
  return x;
}

/* A tile c[m][n] += sign a[m][l] b[l][n] with m <= 4, n <= 8; each element is one sum over l in order. */
static inline __attribute__((always_inline)) void tile(float *c, int64_t c_row, const float *a, int64_t a_row,
                                                       const float *b, int64_t b_row, const int m, const int n,
                                                       int64_t l, float sign) {
  float sum[4][8] = {{0}};
  for (int64_t i = 0; i < l; i++)
    for (int r = 0; r < m; r++)
      for (int p = 0; p < n; p++) sum[r][p] += a[r * a_row + i] * b[i * b_row + p];
  for (int r = 0; r < m; r++)
    for (int p = 0; p < n; p++) c[r * c_row + p] += sign * sum[r][p];
}

/* c[m][n] += sign a[m][l] b[l][n]. The 32 sums of a full tile stay in registers. */
static void multiply_add(float *c, int64_t c_row, const float *a, int64_t a_row, const float *b, int64_t b_row,
                         int64_t m, int64_t n, int64_t l, float sign) {
  for (int64_t i = 0; i < m; i += 4)
    for (int64_t j = 0; j < n; j += 8) {
      const int rows = m - i < 4 ? (int)(m - i) : 4, columns = n - j < 8 ? (int)(n - j) : 8;
      if (rows == 4 && columns == 8)
        tile(c + i * c_row + j, c_row, a + i * a_row, a_row, b + j, b_row, 4, 8, l, sign);
      else
        tile(c + i * c_row + j, c_row, a + i * a_row, a_row, b + j, b_row, rows, columns, l, sign);
    }
}

/* y_i += sign sum_{j < i + diagonal} a_ij x_j for rows i in order, so that y = x, diagonal = 0, sign = -1 solves
   (I + A) y = y. Only the triangle is touched: 0 * NaN from a later token would be NaN. */
static void triangle_add(float *y, int64_t y_row, const float *a, int64_t a_row, const float *x, int64_t x_row,
                         int64_t n, int64_t width, int64_t diagonal, float sign) {
  for (int64_t i0 = 0; i0 < n; i0 += 4) {
    const int64_t rows = n - i0 < 4 ? n - i0 : 4;
    multiply_add(y + i0 * y_row, y_row, a + i0 * a_row, a_row, x, x_row, rows, width, i0, sign);
    for (int64_t i = i0; i < i0 + rows; i++)
      for (int64_t j = i0; j < i + diagonal; j++) {
        const float w = sign * a[i * a_row + j];
        for (int64_t c = 0; c < width; c++) y[i * y_row + c] += w * x[j * x_row + c];
      }
  }
}

static void load_tokens(const q3n_gated_delta_args *a, const gd_head *x, int64_t t0, chunk *ch) {
  for (int64_t i = 0; i < ch->n; i++) {
    const int64_t t = t0 + i;
    gd_load_vector(a, x->k + t * a->k_t, 1.0f, ch->k + i * a->K);
    gd_load_vector(a, x->q + t * a->q_t, a->scale, ch->q + i * a->K);
    gd_load_decay(a, x, t, ch->decay + i * a->K);
    ch->beta[i] = x->beta[t * a->beta_t];
    for (int64_t c = 0; c < a->K; c++) ch->k_end[c * ch->C + i] = ch->k[i * a->K + c];
  }
}

/* A, P and k_end where one decay serves all channels: plain products of keys and queries, then ∘ Γ row by row. */
static void scores_one_decay(const q3n_gated_delta_args *a, chunk *ch) {
  const int64_t n = ch->n, C = ch->C, K = a->K;
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < n; j++) ch->a[i * C + j] = ch->p[i * C + j] = 0.0f;
  for (int64_t i = 0; i < n; i += 4) {
    const int64_t rows = n - i < 4 ? n - i : 4;
    multiply_add(ch->a + i * C, C, ch->k + i * K, K, ch->k_end, C, rows, i + rows, K, 1.0f);
    multiply_add(ch->p + i * C, C, ch->q + i * K, K, ch->k_end, C, rows, i + rows, K, 1.0f);
  }
  for (int64_t i = 0; i < n; i++) {
    const float e = ch->decay[i * K];
    for (int64_t j = 0; j < i; j++) {
      ch->reach[j] *= e;
      ch->a[i * C + j] *= ch->beta[i] * ch->reach[j];
      ch->p[i * C + j] *= ch->reach[j];
    }
    ch->reach[i] = 1.0f;
  }
  for (int64_t c = 0; c < K; c++)
    for (int64_t j = 0; j < n; j++) ch->k_end[c * C + j] *= ch->reach[j];
}

/* The same with a decay a channel: the keys themselves are decayed, one token at a time. */
static void scores_channel_decay(const q3n_gated_delta_args *a, chunk *ch) {
  const int64_t C = ch->C, K = a->K;
  for (int64_t i = 0; i < ch->n; i++) {
    float *ai = ch->a + i * C, *pi = ch->p + i * C;
    for (int64_t j = 0; j <= i; j++) ai[j] = pi[j] = 0.0f;
    for (int64_t c = 0; c < K; c++) {
      const float e = ch->decay[i * K + c], kc = ch->k[i * K + c], qc = ch->q[i * K + c];
      float *key = ch->k_end + c * C;
      for (int64_t j = 0; j < i; j++) {
        key[j] *= e;
        ai[j] += kc * key[j];
        pi[j] += qc * key[j];
      }
      pi[i] += qc * key[i];
    }
    for (int64_t j = 0; j < i; j++) ai[j] *= ch->beta[i];
  }
}

/* k, q <- γ ∘ k, γ ∘ q; returns γ_n. */
static const float *decay_from_start(const q3n_gated_delta_args *a, chunk *ch) {
  const int64_t K = a->K;
  float *gamma = ch->row[0];
  for (int64_t c = 0; c < K; c++) gamma[c] = 1.0f;
  for (int64_t i = 0; i < ch->n; i++)
    for (int64_t c = 0; c < K; c++) {
      gamma[c] *= ch->decay[i * K + c];
      ch->k[i * K + c] *= gamma[c];
      ch->q[i * K + c] *= gamma[c];
    }
  return gamma;
}

static void run_chunk(const q3n_gated_delta_args *a, const gd_head *x, int64_t t0, chunk *ch) {
  const int64_t n = ch->n, C = ch->C, K = a->K, V = a->V;
  load_tokens(a, x, t0, ch);
  if (a->gate == Q3N_GATE_CHANNEL)
    scores_channel_decay(a, ch);
  else
    scores_one_decay(a, ch);
  const float *gamma = decay_from_start(a, ch);

  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < V; j++) ch->u[i * V + j] = x->v[(t0 + i) * a->v_t + j];
  multiply_add(ch->u, V, ch->k, K, ch->s, V, n, V, K, -1.0f);
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < V; j++) ch->u[i * V + j] *= ch->beta[i];
  triangle_add(ch->u, V, ch->a, C, ch->u, V, n, V, 0, -1.0f);

  float *o = x->o + t0 * a->o_t;
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < V; j++) o[i * a->o_t + j] = 0.0f;
  multiply_add(o, a->o_t, ch->q, K, ch->s, V, n, V, K, 1.0f);
  triangle_add(o, a->o_t, ch->p, C, ch->u, V, n, V, 1, 1.0f);

  if (x->snapshots) gd_replay_snapshots(a, x, t0, n, ch->s, 1, V, ch->u, ch->row[1], ch->row[2]);
  for (int64_t c = 0; c < K; c++)
    for (int64_t j = 0; j < V; j++) ch->s[c * V + j] *= gamma[c];
  multiply_add(ch->s, V, ch->k_end, C, ch->u, V, K, V, n, 1.0f);
}

static q3n_status run(const q3n_gated_delta_args *a, int64_t begin, int64_t end, float *scratch, int64_t C) {
  const int64_t K = a->K, V = a->V;
  chunk ch = layout(a, C, scratch);

  for (int64_t item = begin; item < end; item++) {
    const gd_head x = gd_find_head(a, item / a->HV, item % a->HV);
    if (K == 0) {
      gd_zero_output(a, &x);
      continue;
    }
    for (int64_t j = 0; j < V; j++)
      for (int64_t c = 0; c < K; c++) ch.s[c * V + j] = x.state_in ? x.state_in[j * a->state_v + c] : 0.0f;
    for (int64_t t0 = 0; t0 < x.T; t0 += C) {
      ch.n = x.T - t0 < C ? x.T - t0 : C;
      run_chunk(a, &x, t0, &ch);
    }
    if (x.state_out)
      for (int64_t j = 0; j < V; j++)
        for (int64_t c = 0; c < K; c++) x.state_out[j * a->state_v + c] = ch.s[c * V + j];
  }
  return Q3N_OK;
}

q3n_status q3n_gated_delta_chunked16_scalar(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch) {
  return run(a, begin, end, scratch, 16);
}

q3n_status q3n_gated_delta_chunked32_scalar(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch) {
  return run(a, begin, end, scratch, 32);
}

q3n_status q3n_gated_delta_chunked64_scalar(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch) {
  return run(a, begin, end, scratch, 64);
}

q3n_status q3n_gated_delta_chunked128_scalar(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch) {
  return run(a, begin, end, scratch, 128);
}
