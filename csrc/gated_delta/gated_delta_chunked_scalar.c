/* The chunk form; a short end of a sequence is taken token by token. Within a chunk of n <= C tokens, with Γ_ij =
   exp(g_{j+1} + ... + g_i) and S the state before it:

     A_ij = beta_i (k_i ∘ Γ_ij) · k_j      j < i
     P_ij = (q_i ∘ Γ_ij) · k_j             j <= i
     (I + A) u = beta (v - (γ ∘ k) S^T)    γ_i = exp(g_1 + ... + g_i); u_i is the u of token i in the recurrence
     o = (γ ∘ q) S^T + P u
     S <- γ_n ∘ S + u^T (Γ_n ∘ k)

   Every decay is a product of the tokens' exp(g), extended one token at a time: no difference of cumulative sums (which
   cancels, and is inf - inf where a gate closes) and no exponential of a positive number (which 1/Γ would need). γ and
   a scalar gate's Γ are kept in double: of factors near 1, a product in float is always rounded down.
   Derivation and comparison with the split into U and W: README.md. */
#include "gated_delta_parts.h"

q3n_status q3n_gated_delta_recurrent_scalar(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch);
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
  float *row[2];  /* [K] to replay snapshots with */
  double *reach;  /* [C] one row of Γ */
  double *gamma;  /* [K] γ */
} chunk;

static chunk layout(const q3n_gated_delta_args *a, int64_t C, void *scratch) {
  const int64_t K = a->K, V = a->V;
  chunk x = {.C = C, .reach = scratch};
  x.gamma = x.reach + C;
  float *at = (float *)(x.gamma + K);
  x.s = at, at += K * V;
  x.k = at, at += C * K;
  x.q = at, at += C * K;
  x.k_end = at, at += C * K;
  x.decay = at, at += C * K;
  x.u = at, at += C * V;
  x.a = at, at += C * C;
  x.p = at, at += C * C;
  x.beta = at, at += C;
  x.row[0] = at, at += K;
  x.row[1] = at;
  return x;
}

/* y[n] += sign sum_j a[j] x[j][n] over j < m, in the order of j. Four rows of x at a time, so that y is loaded and
   stored a quarter as often; the sums are the same. y is no row of x. */
static void combine(float *restrict y, float sign, const float *restrict a, const float *restrict x, int64_t x_row,
                    int64_t m, int64_t n) {
  int64_t j = 0;
  for (; j + 4 <= m; j += 4) {
    const float a0 = sign * a[j], a1 = sign * a[j + 1], a2 = sign * a[j + 2], a3 = sign * a[j + 3];
    const float *x0 = x + j * x_row, *x1 = x0 + x_row, *x2 = x1 + x_row, *x3 = x2 + x_row;
    for (int64_t c = 0; c < n; c++) y[c] = (((y[c] + a0 * x0[c]) + a1 * x1[c]) + a2 * x2[c]) + a3 * x3[c];
  }
  for (; j < m; j++)
    for (int64_t c = 0; c < n; c++) y[c] += sign * a[j] * x[j * x_row + c];
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
  for (int64_t i = 0; i < n; i++) {
    float *ai = ch->a + i * C, *pi = ch->p + i * C;
    const double e = (double)ch->decay[i * K];
    for (int64_t j = 0; j <= i; j++) ai[j] = pi[j] = 0.0f;
    combine(ai, 1.0f, ch->k + i * K, ch->k_end, C, K, i);
    combine(pi, 1.0f, ch->q + i * K, ch->k_end, C, K, i + 1);
    for (int64_t j = 0; j < i; j++) {
      ch->reach[j] *= e;
      ai[j] *= ch->beta[i] * (float)ch->reach[j];
      pi[j] *= (float)ch->reach[j];
    }
    ch->reach[i] = 1.0;
  }
  for (int64_t c = 0; c < K; c++)
    for (int64_t j = 0; j < n; j++) ch->k_end[c * C + j] *= (float)ch->reach[j];
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

/* k, q <- γ ∘ k, γ ∘ q; leaves γ_n in gamma. */
static void decay_from_start(const q3n_gated_delta_args *a, chunk *ch) {
  const int64_t K = a->K;
  for (int64_t c = 0; c < K; c++) ch->gamma[c] = 1.0;
  for (int64_t i = 0; i < ch->n; i++)
    for (int64_t c = 0; c < K; c++) {
      ch->gamma[c] *= (double)ch->decay[i * K + c];
      ch->k[i * K + c] *= (float)ch->gamma[c];
      ch->q[i * K + c] *= (float)ch->gamma[c];
    }
}

static void run_chunk(const q3n_gated_delta_args *a, const gd_head *x, int64_t t0, chunk *ch) {
  const int64_t n = ch->n, C = ch->C, K = a->K, V = a->V;
  load_tokens(a, x, t0, ch);
  if (a->gate == Q3N_GATE_CHANNEL)
    scores_channel_decay(a, ch);
  else
    scores_one_decay(a, ch);
  decay_from_start(a, ch);

  /* Row i of u needs the rows before it alone: forward substitution is one combine a row. Nothing is ever multiplied
     by the zeros above the diagonal, where a NaN of a later token would come back in time. */
  for (int64_t i = 0; i < n; i++) {
    float *u = ch->u + i * V;
    for (int64_t j = 0; j < V; j++) u[j] = x->v[(t0 + i) * a->v_t + j];
    combine(u, -1.0f, ch->k + i * K, ch->s, V, K, V);
    for (int64_t j = 0; j < V; j++) u[j] *= ch->beta[i];
    combine(u, -1.0f, ch->a + i * C, ch->u, V, i, V);
  }
  for (int64_t i = 0; i < n; i++) {
    float *o = x->o + (t0 + i) * a->o_t;
    for (int64_t j = 0; j < V; j++) o[j] = 0.0f;
    combine(o, 1.0f, ch->q + i * K, ch->s, V, K, V);
    combine(o, 1.0f, ch->p + i * C, ch->u, V, i + 1, V);
  }

  if (x->snapshots) gd_replay_snapshots(a, x, t0, n, ch->s, 1, V, ch->u, ch->row[0], ch->row[1]);
  for (int64_t c = 0; c < K; c++) {
    float *s = ch->s + c * V;
    for (int64_t j = 0; j < V; j++) s[j] = (float)(ch->gamma[c] * (double)s[j]);
    combine(s, 1.0f, ch->k_end + c * C, ch->u, V, n, V);
  }
}

/* y[columns][rows] = x[rows][columns], 16 columns at a time so that a cache line is used whole once it is loaded. */
static void transpose(float *y, int64_t y_row, const float *x, int64_t x_row, int64_t rows, int64_t columns) {
  for (int64_t c0 = 0; c0 < columns; c0 += 16)
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = c0; c < columns && c < c0 + 16; c++) y[c * y_row + r] = x[r * x_row + c];
}

/* Tokens t0 on of one head by the recurrence: few tokens are not worth a chunk. Where some came before them, the state
   lies in the pool, or in `kept` [V][K] where the pool is not to be written. */
static q3n_status run_rest(const q3n_gated_delta_args *a, const gd_head *x, int64_t t0, const float *kept,
                           void *scratch) {
  q3n_gated_delta_args rest = *a;
  rest.cu_seqlens = rest.slot_in = rest.slot_out = NULL;
  rest.slots = rest.B = rest.HK = rest.HV = 1;
  rest.T = x->T - t0;
  rest.state_in = x->state_in;
  rest.state_out = x->state_out;
  if (t0 > 0) rest.state_in = x->state_out ? x->state_out : kept;
  if (t0 > 0 && !x->state_out) rest.state_v = a->K;
  if (rest.T > 0) {
    rest.q = x->q + t0 * a->q_t;
    rest.k = x->k + t0 * a->k_t;
    rest.v = x->v + t0 * a->v_t;
    rest.g = x->g ? x->g + t0 * a->g_t : NULL;
    rest.beta = x->beta + t0 * a->beta_t;
    rest.o = x->o + t0 * a->o_t;
    if (x->snapshots) rest.snapshots = x->snapshots + t0 * a->snap_t;
  }
  return q3n_gated_delta_recurrent_scalar(&rest, 0, q3n_gated_delta_row_items(&rest), scratch);
}

static q3n_status run(const q3n_gated_delta_args *a, int64_t begin, int64_t end, char *scratch, int64_t C) {
  Q3N_GATED_DELTA_F32_ALONE(a);
  const int64_t K = a->K, V = a->V, one_by_one = q3n_gated_delta_recurrent_scratch(a);
  float *kept = (float *)(void *)(scratch + one_by_one);
  chunk ch = layout(a, C, scratch + one_by_one + q3n_align(K * V * 4));

  for (int64_t item = begin; item < end; item++) {
    const gd_head x = gd_find_head(a, item / a->HV, item % a->HV);
    if (K == 0) {
      gd_zero_output(a, &x);
      continue;
    }
    const int64_t chunked = x.T % C < Q3N_GATED_DELTA_TAIL ? x.T - x.T % C : x.T;
    if (chunked > 0) {
      if (x.state_in)
        transpose(ch.s, V, x.state_in, a->state_v, V, K);
      else
        gd_copy_rows(ch.s, V, NULL, 0, K, V);
      for (int64_t t0 = 0; t0 < chunked; t0 += C) {
        ch.n = chunked - t0 < C ? chunked - t0 : C;
        run_chunk(a, &x, t0, &ch);
      }
      if (x.state_out)
        transpose(x.state_out, a->state_v, ch.s, V, K, V);
      else if (chunked < x.T)
        transpose(kept, K, ch.s, V, K, V);
    }
    if (chunked == 0 || chunked < x.T) {
      const q3n_status status = run_rest(a, &x, chunked, kept, scratch);
      if (status != Q3N_OK) return status;
    }
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
