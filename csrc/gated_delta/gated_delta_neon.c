/* The recurrence, four value rows at a time. Both dot products are taken of the state before the token, so that one
   pass over it serves them, and the same pass brings the state up to that token from the one before:

     sk = S (D k)      sq = S (D q)      u = beta (v - sk)      o = sq + u (k . q)      S <- D S + u k^T */
#include "../simd/neon.h"
#include "gated_delta_parts.h"

q3n_status q3n_gated_delta_recurrent_neon(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch);

enum { TOKENS = 8 /* prepared at a time: with the item's state a block fits the first cache */, ROWS = 4 };

/* An item's state, and a block of tokens that is read once for all its value rows. Rows of P = K rounded up to 8
   elements, the rest 0. */
typedef struct block {
  int64_t n, P;
  float *s;                   /* [Q3N_GATED_DELTA_ROWS][P] */
  float *k, *decay, *dk, *dq; /* [TOKENS][P]: k, D, D k, D q */
  float *kq, *beta;           /* [TOKENS]: k . q, beta */
  float *v, *o;               /* [TOKENS][Q3N_GATED_DELTA_ROWS]: in the args a token's rows can lie whole pages apart */
} block;

static block layout(const q3n_gated_delta_args *a, float *at) {
  block x = {.P = (a->K + 7) & ~(int64_t)7};
  const int64_t size = TOKENS * x.P;
  x.s = at;
  x.k = x.s + Q3N_GATED_DELTA_ROWS * x.P;
  x.decay = x.k + size;
  x.dk = x.decay + size;
  x.dq = x.dk + size;
  x.kq = x.dq + size;
  x.beta = x.kq + TOKENS;
  x.v = x.beta + TOKENS;
  x.o = x.v + TOKENS * Q3N_GATED_DELTA_ROWS;
  return x;
}

int64_t q3n_gated_delta_neon_scratch(const q3n_gated_delta_args *a) {
  const int64_t P = (a->K + 7) & ~(int64_t)7;
  return q3n_align(((Q3N_GATED_DELTA_ROWS + 4 * TOKENS) * P + 2 * TOKENS * (Q3N_GATED_DELTA_ROWS + 1)) * 4);
}

static void load_block(const q3n_gated_delta_args *a, const gd_head *x, int64_t t0, int64_t first, int64_t rows, block *b) {
  for (int64_t i = 0; i < b->n; i++) {
    const int64_t t = t0 + i;
    float *k = b->k + i * b->P, *decay = b->decay + i * b->P, *dk = b->dk + i * b->P, *dq = b->dq + i * b->P;
    gd_load_vector(a, x->k + t * a->k_t, 1.0f, k);
    gd_load_vector(a, x->q + t * a->q_t, a->scale, dq);
    gd_load_decay(a, x, t, decay);
    b->kq[i] = gd_dot(k, dq, a->K);
    b->beta[i] = x->beta[t * a->beta_t];
    for (int64_t c = 0; c < a->K; c++) {
      dk[c] = decay[c] * k[c];
      dq[c] = decay[c] * dq[c];
    }
    float *v = b->v + i * Q3N_GATED_DELTA_ROWS;
    for (int64_t r = 0; r < rows; r++) v[r] = x->v[t * a->v_t + first + r];
    for (int64_t r = rows; r % ROWS; r++) v[r] = 0.0f;
    for (int64_t c = a->K; c < b->P; c++) k[c] = decay[c] = dk[c] = dq[c] = 0.0f;
  }
}

/* S k and S q of four rows: even and odd vectors are summed apart. */
typedef struct sums {
  float32x4_t sk[ROWS][2], sq[ROWS][2];
} sums;

static inline sums no_sums(void) {
  sums x;
  for (int r = 0; r < ROWS; r++)
    for (int p = 0; p < 2; p++) x.sk[r][p] = x.sq[r][p] = vdupq_n_f32(0.0f);
  return x;
}

static inline void add_products(sums *x, int r, int p, float32x4_t s, float32x4_t k, float32x4_t q) {
  x->sk[r][p] = vfmaq_f32(x->sk[r][p], s, k);
  x->sq[r][p] = vfmaq_f32(x->sq[r][p], s, q);
}

static inline float32x4_t total(float32x4_t s[ROWS][2]) {
  return q3n_sum4x4(vaddq_f32(s[0][0], s[0][1]), vaddq_f32(s[1][0], s[1][1]), vaddq_f32(s[2][0], s[2][1]),
                    vaddq_f32(s[3][0], s[3][1]));
}

/* Token t on rows r .. r + 3, from their sums: stores o and returns u. */
static inline float32x4_t finish(const block *b, int64_t t, int64_t r, sums *x) {
  const int64_t at = t * Q3N_GATED_DELTA_ROWS + r;
  const float32x4_t u = vmulq_n_f32(vsubq_f32(vld1q_f32(b->v + at), total(x->sk)), b->beta[t]);
  vst1q_f32(b->o + at, vfmaq_n_f32(total(x->sq), u, b->kq[t]));
  return u;
}

/* The sums of token t over the state as it is. */
static sums first_sums(const block *b, int64_t r, int64_t t) {
  const float *s = b->s + r * b->P, *dk = b->dk + t * b->P, *dq = b->dq + t * b->P;
  sums x = no_sums();
  for (int64_t c = 0; c < b->P; c += 8)
    for (int p = 0; p < 2; p++) {
      const float32x4_t k = vld1q_f32(dk + c + 4 * p), q = vld1q_f32(dq + c + 4 * p);
      for (int i = 0; i < ROWS; i++) add_products(&x, i, p, vld1q_f32(s + i * b->P + c + 4 * p), k, q);
    }
  return x;
}

/* D s + u k of vector c of row i, stored. */
#define UPDATE(i)                                                                           \
  const float32x4_t s##i = vfmaq_laneq_f32(vmulq_f32(d, vld1q_f32(s + i * b->P + c)), k, u, i); \
  vst1q_f32(s + i * b->P + c, s##i);

/* S <- D S + u k^T with token t on four rows. */
static void update(const block *b, int64_t r, int64_t t, float32x4_t u) {
  float *s = b->s + r * b->P;
  for (int64_t c = 0; c < b->P; c += 4) {
    const float32x4_t k = vld1q_f32(b->k + t * b->P + c), d = vld1q_f32(b->decay + t * b->P + c);
    UPDATE(0) UPDATE(1) UPDATE(2) UPDATE(3)
  }
}

/* The same, and the sums of token t + 1 from the registers. */
static sums update_and_sums(const block *b, int64_t r, int64_t t, float32x4_t u) {
  float *s = b->s + r * b->P;
  const float *keys = b->k + t * b->P, *decay = b->decay + t * b->P;
  const float *dk = b->dk + (t + 1) * b->P, *dq = b->dq + (t + 1) * b->P;
  sums x = no_sums();
  for (int64_t c0 = 0; c0 < b->P; c0 += 8)
    for (int p = 0; p < 2; p++) {
      const int64_t c = c0 + 4 * p;
      const float32x4_t k = vld1q_f32(keys + c), d = vld1q_f32(decay + c);
      UPDATE(0) UPDATE(1) UPDATE(2) UPDATE(3)
      const float32x4_t next_k = vld1q_f32(dk + c), next_q = vld1q_f32(dq + c);
      add_products(&x, 0, p, s0, next_k, next_q);
      add_products(&x, 1, p, s1, next_k, next_q);
      add_products(&x, 2, p, s2, next_k, next_q);
      add_products(&x, 3, p, s3, next_k, next_q);
    }
  return x;
}

q3n_status q3n_gated_delta_recurrent_neon(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch) {
  Q3N_GATED_DELTA_F32_ALONE(a);
  const int64_t blocks = q3n_ceil_div(a->V, Q3N_GATED_DELTA_ROWS);
  block b = layout(a, scratch);

  for (int64_t item = begin; item < end; item++) {
    const int64_t first = item % blocks * Q3N_GATED_DELTA_ROWS, head = item / blocks;
    const int64_t rows = a->V - first < Q3N_GATED_DELTA_ROWS ? a->V - first : Q3N_GATED_DELTA_ROWS;
    const gd_head x = gd_find_head(a, head / a->HV, head % a->HV);

    /* Rows go in fours: a last group is filled up with zeros. */
    for (int64_t i = 0; i < q3n_ceil_div(rows, ROWS) * ROWS * b.P; i++) b.s[i] = 0.0f;
    if (x.state_in) gd_copy_rows(b.s, b.P, x.state_in + first * a->state_v, a->state_v, rows, a->K);
    for (int64_t t0 = 0; t0 < x.T; t0 += TOKENS) {
      b.n = x.T - t0 < TOKENS ? x.T - t0 : TOKENS;
      load_block(a, &x, t0, first, rows, &b);
      for (int64_t r = 0; r < rows; r += ROWS) {
        sums now = first_sums(&b, r, 0);
        for (int64_t t = 0; t < b.n; t++) {
          const float32x4_t u = finish(&b, t, r, &now);
          if (t + 1 < b.n)
            now = update_and_sums(&b, r, t, u);
          else
            update(&b, r, t, u);
          if (x.snapshots)
            gd_copy_rows(x.snapshots + (t0 + t) * a->snap_t + (first + r) * a->snap_v, a->snap_v, b.s + r * b.P, b.P,
                         rows - r < ROWS ? rows - r : ROWS, a->K);
        }
      }
      for (int64_t t = 0; t < b.n; t++)
        for (int64_t r = 0; r < rows; r++) x.o[(t0 + t) * a->o_t + first + r] = b.o[t * Q3N_GATED_DELTA_ROWS + r];
    }
    if (x.state_out) gd_copy_rows(x.state_out + first * a->state_v, a->state_v, b.s, b.P, rows, a->K);
  }
  return Q3N_OK;
}
