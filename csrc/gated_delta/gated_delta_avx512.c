/* The recurrence with the state in registers: two value rows at a time stay there over a block of tokens (K = 128 is 8
   vectors a row). Both dot products are taken of the state before the token, so that one pass over it serves them:

     sk = S (D k)      sq = S (D q)      u = beta (v - sk)      o = sq + u (k . q)      S <- D S + u k^T */
#include "../simd/avx512.h"
#include "gated_delta_parts.h"

q3n_status q3n_gated_delta_recurrent_avx512(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch);

enum { TOKENS = 8 /* prepared at a time: with the item's state a block fits the first cache */ };

/* An item's state, and a block of tokens that is read once for all its value rows. Rows of P = K rounded up to 16
   elements, the rest 0. */
typedef struct block {
  int64_t n, P;
  float *s;                   /* [Q3N_GATED_DELTA_ROWS][P] */
  float *k, *decay, *dk, *dq; /* [TOKENS][P]: k, D, D k, D q */
  float *kq, *beta;           /* [TOKENS]: k . q, beta */
  float *v, *o;               /* [TOKENS][Q3N_GATED_DELTA_ROWS]: in the args a token's rows can lie whole pages apart */
} block;

static block layout(const q3n_gated_delta_args *a, float *at) {
  block x = {.P = (a->K + 15) & ~(int64_t)15};
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

int64_t q3n_gated_delta_avx512_scratch(const q3n_gated_delta_args *a) {
  const int64_t P = (a->K + 15) & ~(int64_t)15;
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
    for (int64_t r = 0; r < rows; r++) b->v[i * Q3N_GATED_DELTA_ROWS + r] = x->v[t * a->v_t + first + r];
    if (rows % 2) b->v[i * Q3N_GATED_DELTA_ROWS + rows] = 0.0f;
    for (int64_t c = a->K; c < b->P; c++) k[c] = decay[c] = dk[c] = dq[c] = 0.0f;
  }
}

/* The end of a token on rows r and r + 1 of the item, from their four sums: stores o and returns u. */
static inline __m128 finish(const block *b, int64_t t, int64_t r, __m512 sk0, __m512 sq0, __m512 sk1, __m512 sq1) {
  const __m128 sum = q3n_sum4x16(sk0, sk1, sq0, sq1), zero = _mm_setzero_ps();
  const __m128 v = _mm_castpd_ps(_mm_load_sd((const double *)(const void *)(b->v + t * Q3N_GATED_DELTA_ROWS + r)));
  const __m128 u = _mm_mul_ps(_mm_set1_ps(b->beta[t]), _mm_sub_ps(v, _mm_movelh_ps(sum, zero)));
  const __m128 o = _mm_fmadd_ps(u, _mm_set1_ps(b->kq[t]), _mm_movehl_ps(zero, sum));
  _mm_store_sd((double *)(void *)(b->o + t * Q3N_GATED_DELTA_ROWS + r), _mm_castps_pd(o));
  return u;
}

/* Vector i of both rows: what is loaded before a block, done in the two passes over a token, stored after the block.
   Even and odd vectors are summed apart: the chains of additions are half as long. The names are registers. */
#define LOAD(i, half) __m512 s0##i = _mm512_loadu_ps(s + 16 * i), s1##i = _mm512_loadu_ps(s + b->P + 16 * i);
#define DOT(i, half)                                                                         \
  {                                                                                          \
    const __m512 ki = _mm512_loadu_ps(dk + 16 * i), qi = _mm512_loadu_ps(dq + 16 * i);       \
    sk0##half = _mm512_fmadd_ps(s0##i, ki, sk0##half);                                       \
    sk1##half = _mm512_fmadd_ps(s1##i, ki, sk1##half);                                       \
    sq0##half = _mm512_fmadd_ps(s0##i, qi, sq0##half);                                       \
    sq1##half = _mm512_fmadd_ps(s1##i, qi, sq1##half);                                       \
  }
#define UPDATE(i, half)                                                                      \
  {                                                                                          \
    const __m512 ki = _mm512_loadu_ps(k + 16 * i), di = _mm512_loadu_ps(decay + 16 * i);     \
    s0##i = _mm512_fmadd_ps(u0, ki, _mm512_mul_ps(di, s0##i));                               \
    s1##i = _mm512_fmadd_ps(u1, ki, _mm512_mul_ps(di, s1##i));                               \
  }
#define STORE(i, half) _mm512_storeu_ps(s + 16 * i, s0##i), _mm512_storeu_ps(s + b->P + 16 * i, s1##i);
#define FOUR_VECTORS(X) X(0, e) X(1, d) X(2, e) X(3, d)
#define EIGHT_VECTORS(X) FOUR_VECTORS(X) X(4, e) X(5, d) X(6, e) X(7, d)

/* The block's tokens on rows r and r + 1 of the item. */
#define DEFINE_STEP(name, VECTORS)                                                                                  \
  static void name(const block *b, int64_t r) {                                                                     \
    float *s = b->s + r * b->P;                                                                                     \
    VECTORS(LOAD)                                                                                                   \
    for (int64_t t = 0; t < b->n; t++) {                                                                            \
      const float *k = b->k + t * b->P, *decay = b->decay + t * b->P, *dk = b->dk + t * b->P, *dq = b->dq + t * b->P; \
      __m512 sk0e = _mm512_setzero_ps(), sk0d = sk0e, sk1e = sk0e, sk1d = sk0e;                                     \
      __m512 sq0e = sk0e, sq0d = sk0e, sq1e = sk0e, sq1d = sk0e;                                                    \
      VECTORS(DOT)                                                                                                  \
      const __m128 u = finish(b, t, r, _mm512_add_ps(sk0e, sk0d), _mm512_add_ps(sq0e, sq0d),                        \
                              _mm512_add_ps(sk1e, sk1d), _mm512_add_ps(sq1e, sq1d));                                \
      const __m512 u0 = _mm512_broadcastss_ps(u), u1 = _mm512_broadcastss_ps(_mm_movehdup_ps(u));                   \
      VECTORS(UPDATE)                                                                                               \
    }                                                                                                               \
    VECTORS(STORE)                                                                                                  \
  }

DEFINE_STEP(step_64, FOUR_VECTORS)
DEFINE_STEP(step_128, EIGHT_VECTORS)

/* One token t of the block, any K: the same sums with the state in memory. */
static void step_any(const block *b, int64_t r, int64_t t) {
  float *s0 = b->s + r * b->P, *s1 = s0 + b->P;
  const float *k = b->k + t * b->P, *decay = b->decay + t * b->P, *dk = b->dk + t * b->P, *dq = b->dq + t * b->P;
  __m512 sk0[2], sk1[2], sq0[2], sq1[2];
  for (int p = 0; p < 2; p++) sk0[p] = sk1[p] = sq0[p] = sq1[p] = _mm512_setzero_ps();
  for (int64_t c = 0; c < b->P; c += 16) {
    const int p = (c / 16) % 2 == 1;
    const __m512 kc = _mm512_loadu_ps(dk + c), qc = _mm512_loadu_ps(dq + c);
    sk0[p] = _mm512_fmadd_ps(_mm512_loadu_ps(s0 + c), kc, sk0[p]);
    sk1[p] = _mm512_fmadd_ps(_mm512_loadu_ps(s1 + c), kc, sk1[p]);
    sq0[p] = _mm512_fmadd_ps(_mm512_loadu_ps(s0 + c), qc, sq0[p]);
    sq1[p] = _mm512_fmadd_ps(_mm512_loadu_ps(s1 + c), qc, sq1[p]);
  }
  const __m128 u = finish(b, t, r, _mm512_add_ps(sk0[0], sk0[1]), _mm512_add_ps(sq0[0], sq0[1]),
                          _mm512_add_ps(sk1[0], sk1[1]), _mm512_add_ps(sq1[0], sq1[1]));
  const __m512 u0 = _mm512_broadcastss_ps(u), u1 = _mm512_broadcastss_ps(_mm_movehdup_ps(u));
  for (int64_t c = 0; c < b->P; c += 16) {
    const __m512 kc = _mm512_loadu_ps(k + c), dc = _mm512_loadu_ps(decay + c);
    _mm512_storeu_ps(s0 + c, _mm512_fmadd_ps(u0, kc, _mm512_mul_ps(dc, _mm512_loadu_ps(s0 + c))));
    _mm512_storeu_ps(s1 + c, _mm512_fmadd_ps(u1, kc, _mm512_mul_ps(dc, _mm512_loadu_ps(s1 + c))));
  }
}

q3n_status q3n_gated_delta_recurrent_avx512(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch) {
  const int64_t blocks = q3n_ceil_div(a->V, Q3N_GATED_DELTA_ROWS);
  block b = layout(a, scratch);

  for (int64_t item = begin; item < end; item++) {
    const int64_t first = item % blocks * Q3N_GATED_DELTA_ROWS, head = item / blocks;
    const int64_t rows = a->V - first < Q3N_GATED_DELTA_ROWS ? a->V - first : Q3N_GATED_DELTA_ROWS;
    const gd_head x = gd_find_head(a, head / a->HV, head % a->HV);

    /* Rows go in pairs: an odd last one is paired with zeros, which stay zeros. */
    for (int64_t i = 0; i < (rows + rows % 2) * b.P; i++) b.s[i] = 0.0f;
    if (x.state_in) gd_copy_rows(b.s, b.P, x.state_in + first * a->state_v, a->state_v, rows, a->K);
    for (int64_t t0 = 0; t0 < x.T; t0 += TOKENS) {
      b.n = x.T - t0 < TOKENS ? x.T - t0 : TOKENS;
      load_block(a, &x, t0, first, rows, &b);
      if (b.P == 128 && !x.snapshots) {
        for (int64_t r = 0; r < rows; r += 2) step_128(&b, r);
      } else if (b.P == 64 && !x.snapshots) {
        for (int64_t r = 0; r < rows; r += 2) step_64(&b, r);
      } else {
        for (int64_t t = 0; t < b.n; t++) {
          for (int64_t r = 0; r < rows; r += 2) step_any(&b, r, t);
          if (x.snapshots)
            gd_copy_rows(x.snapshots + (t0 + t) * a->snap_t + first * a->snap_v, a->snap_v, b.s, b.P, rows, a->K);
        }
      }
      for (int64_t t = 0; t < b.n; t++)
        for (int64_t r = 0; r < rows; r++) x.o[(t0 + t) * a->o_t + first + r] = b.o[t * Q3N_GATED_DELTA_ROWS + r];
    }
    if (x.state_out) gd_copy_rows(x.state_out + first * a->state_v, a->state_v, b.s, b.P, rows, a->K);
  }
  return Q3N_OK;
}
