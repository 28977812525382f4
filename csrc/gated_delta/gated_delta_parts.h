/* What the variants share: how the work is cut, where the arrays of one head lie, and how a token is read. */
#ifndef Q3N_GATED_DELTA_PARTS_H
#define Q3N_GATED_DELTA_PARTS_H

#include <math.h>

#include "../base/check.h"
#include "gated_delta.h"

/* Value rows in an item of the recurrent form: few enough that the block of states (K = 128) stays in the first cache,
   many enough that reading and normalising a token is cheap beside them. */
enum { Q3N_GATED_DELTA_ROWS = 32 };

/* Tokens in a chunk of the unfused form. */
enum { Q3N_GATED_DELTA_UNFUSED_CHUNK = 64 };

/* The chunk forms take fewer tokens than this at a sequence's end, or a shorter sequence, token by token: measured, a
   chunk of 8 is the first that pays, in plain C, AVX2 and AVX-512 alike. The unfused form has no such end. */
enum { Q3N_GATED_DELTA_TAIL = 8 };

int64_t q3n_gated_delta_row_items(const q3n_gated_delta_args *a);  /* (sequence, head, block of value rows) */
int64_t q3n_gated_delta_head_items(const q3n_gated_delta_args *a); /* (sequence, head) */
int64_t q3n_gated_delta_recurrent_scratch(const q3n_gated_delta_args *a);
int64_t q3n_gated_delta_chunked16_scratch(const q3n_gated_delta_args *a);
int64_t q3n_gated_delta_chunked32_scratch(const q3n_gated_delta_args *a);
int64_t q3n_gated_delta_chunked64_scratch(const q3n_gated_delta_args *a);
int64_t q3n_gated_delta_chunked128_scratch(const q3n_gated_delta_args *a);
int64_t q3n_gated_delta_unfused_scratch(const q3n_gated_delta_args *a);
int64_t q3n_gated_delta_recurrent_avx512_scratch(const q3n_gated_delta_args *a);
int64_t q3n_gated_delta_chunked32_avx512_scratch(const q3n_gated_delta_args *a);
int64_t q3n_gated_delta_recurrent_avx2_scratch(const q3n_gated_delta_args *a);
int64_t q3n_gated_delta_chunked32_avx2_scratch(const q3n_gated_delta_args *a);
int64_t q3n_gated_delta_neon_scratch(const q3n_gated_delta_args *a);

/* First in every variant: float is all that the CPU's read. */
#define Q3N_GATED_DELTA_F32_ALONE(a) Q3N_REFUSE((a)->dtype != Q3N_F32, DTYPE, DTYPE)

/* The arrays of one sequence and value head: slots, head map and cu_seqlens are resolved here and nowhere else. */
typedef struct gd_head {
  int64_t T;
  const float *q, *k, *v, *g, *beta; /* at the first token; g NULL without a gate */
  const float *state_in;             /* [V][K] or NULL */
  float *o, *state_out, *snapshots;  /* the last two may be NULL */
} gd_head;

static inline gd_head gd_find_head(const q3n_gated_delta_args *a, int64_t b, int64_t h) {
  const int64_t hk = a->head_map == Q3N_HEADS_GROUPED ? h / (a->HV / a->HK) : h % a->HK;
  const int64_t row = a->cu_seqlens ? 0 : b, t = a->cu_seqlens ? a->cu_seqlens[b] : 0;
  const int64_t slot_in = a->slot_in ? a->slot_in[b] : b, slot_out = a->slot_out ? a->slot_out[b] : b;
  gd_head x = {.T = a->cu_seqlens ? a->cu_seqlens[b + 1] - t : a->T};
  if (a->state_in) x.state_in = a->state_in + slot_in * a->state_slot + h * a->state_h;
  if (a->state_out) x.state_out = a->state_out + slot_out * a->state_slot + h * a->state_h;
  if (x.T == 0) return x; /* the other pointers may be NULL */
  x.q = a->q ? (const float *)a->q + row * a->q_b + t * a->q_t + hk * a->q_h : NULL;
  x.k = a->k ? (const float *)a->k + row * a->k_b + t * a->k_t + hk * a->k_h : NULL;
  x.v = (const float *)a->v + row * a->v_b + t * a->v_t + h * a->v_h;
  x.g = a->g ? a->g + row * a->g_b + t * a->g_t + h * a->g_h : NULL;
  x.beta = a->beta + row * a->beta_b + t * a->beta_t + h * a->beta_h;
  x.o = (float *)a->o + row * a->o_b + t * a->o_t + h * a->o_h;
  if (a->snapshots) x.snapshots = a->snapshots + row * a->snap_b + t * a->snap_t + h * a->snap_h;
  return x;
}

/* Eight partial sums in a fixed order, so that a dot product has the same bits in every loop it is written in. */
static inline float gd_sum8(const float s[8]) {
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

static inline float gd_dot(const float *x, const float *y, int64_t n) {
  const int64_t whole = n - n % 8;
  float sum[8] = {0};
  for (int64_t c = 0; c < whole; c += 8)
    for (int p = 0; p < 8; p++) sum[p] += x[c + p] * y[c + p];
  for (int64_t c = whole; c < n; c++) sum[c - whole] += x[c] * y[c];
  return gd_sum8(sum);
}

/* y = x, L2-normalised where the args ask for it, times `scale`. */
static inline void gd_load_vector(const q3n_gated_delta_args *a, const float *x, float scale, float *y) {
  const float inverse_norm = a->qk_l2norm ? 1.0f / sqrtf(gd_dot(x, x, a->K) + a->qk_l2norm_eps) : 1.0f;
  for (int64_t c = 0; c < a->K; c++) y[c] = x[c] * inverse_norm * scale;
}

/* exp(g) of token t for every key channel: 1 without a gate, K equal values for a scalar gate. */
static inline void gd_load_decay(const q3n_gated_delta_args *a, const gd_head *x, int64_t t, float *decay) {
  const float e = a->gate == Q3N_GATE_SCALAR ? expf(x->g[t * a->g_t]) : 1.0f;
  for (int64_t c = 0; c < a->K; c++) decay[c] = a->gate == Q3N_GATE_CHANNEL ? expf(x->g[t * a->g_t + c]) : e;
}

/* y = src row by row, or zeros where src is NULL. */
static inline void gd_copy_rows(float *y, int64_t y_row, const float *src, int64_t src_row, int64_t rows, int64_t n) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t c = 0; c < n; c++) y[i * y_row + c] = src ? src[i * src_row + c] : 0.0f;
}

/* o = 0 for every token: what the empty sums of K = 0 give. */
static inline void gd_zero_output(const q3n_gated_delta_args *a, const gd_head *x) {
  for (int64_t t = 0; t < x->T; t++)
    for (int64_t j = 0; j < a->V; j++) x->o[t * a->o_t + j] = 0.0f;
}

/* The states after each token of a chunk, from the state before it and the rank-one updates u[n][V] of its tokens
   t0 .. t0+n. `before` is S[V][K] by strides; k and decay are rows of K floats to work in. */
static inline void gd_replay_snapshots(const q3n_gated_delta_args *a, const gd_head *x, int64_t t0, int64_t n,
                                       const float *before, int64_t before_v, int64_t before_c, const float *u,
                                       float *k, float *decay) {
  for (int64_t i = 0; i < n; i++) {
    float *now = x->snapshots + (t0 + i) * a->snap_t;
    const float *last = i ? now - a->snap_t : before;
    const int64_t last_v = i ? a->snap_v : before_v, last_c = i ? 1 : before_c;
    gd_load_vector(a, x->k + (t0 + i) * a->k_t, 1.0f, k);
    gd_load_decay(a, x, t0 + i, decay);
    for (int64_t j = 0; j < a->V; j++)
      for (int64_t c = 0; c < a->K; c++)
        now[j * a->snap_v + c] = decay[c] * last[j * last_v + c * last_c] + u[i * a->V + j] * k[c];
  }
}

#endif
