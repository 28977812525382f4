/* The recurrence over the vectors of csrc/simd, ROWS value rows at a time. Both dot products are taken of the state
   before the token, so that one pass over it serves them:

     sk = S (D k)      sq = S (D q)      u = beta (v - sk)      o = sq + u (k . q)      S <- D S + u k^T

   Groups of rows do not wait for each other, which hides the way from the sums through u to the update. The state lies
   in scratch, but a token that is the first or last of its sequence reads and writes the pool itself. */
#include <stddef.h>

#include "gated_delta_parts.h"

enum {
  LANES = Q3N_LANES,
  ROWS = LANES / 2, /* a vector holds the sums sk and sq of as many rows */
  AHEAD = 3 * ROWS, /* rows of the pool */
  TOKENS = 8        /* prepared at a time, once for all rows of a head: 16 KiB at K = 128 */
};

/* A head's state, and a block of tokens. Rows of P = K rounded up to whole vectors, the rest 0. */
typedef struct block {
  int64_t n, P;
  float *s;                   /* [V rounded up to ROWS][P] */
  float *k, *decay, *dk, *dq; /* [TOKENS][P]: k, D, D k, D q */
  int64_t decay_step;         /* 0 where one decay serves all channels: then only a first vector of it is there */
  float kq[TOKENS];           /* k . q */
  float beta[TOKENS];
} block;

/* Where a group's rows are read or written. */
typedef struct rows {
  float *at;
  int64_t row;
} rows;

static inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static inline int64_t recurrent_floats(const q3n_gated_delta_args *a) {
  return (padded(a->V, ROWS) + 4 * TOKENS) * padded(a->K, LANES);
}

static inline block layout_block(const q3n_gated_delta_args *a, float *at) {
  block b = {.P = padded(a->K, LANES), .decay_step = a->gate == Q3N_GATE_CHANNEL};
  b.s = at;
  b.k = b.s + padded(a->V, ROWS) * b.P;
  b.decay = b.k + TOKENS * b.P;
  b.dk = b.decay + TOKENS * b.P;
  b.dq = b.dk + TOKENS * b.P;
  return b;
}

static inline float sum_of_products(const float *x, const float *y, int64_t P) {
  q3n_v sum = q3n_v_zero();
  for (int64_t c = 0; c < P; c += LANES) sum = q3n_v_fma(q3n_v_load(x + c), q3n_v_load(y + c), sum);
  return q3n_v_sum(sum);
}

/* y[P] = x[K], L2-normalised where the args ask for it, times `scale`; then zeros. */
static inline void load_vector(const q3n_gated_delta_args *a, const float *x, float scale, float *y, int64_t P) {
  for (int64_t c = 0; c < P; c += LANES) q3n_v_store(y + c, q3n_v_load_some(q3n_v_first(a->K - c), x + c));
  const float inverse_norm = a->qk_l2norm ? 1.0f / sqrtf(sum_of_products(y, y, P) + a->qk_l2norm_eps) : 1.0f;
  const q3n_v inverse = q3n_v_set(inverse_norm), factor = q3n_v_set(scale);
  for (int64_t c = 0; c < P; c += LANES)
    q3n_v_store(y + c, q3n_v_mul(q3n_v_mul(q3n_v_load(y + c), inverse), factor));
}

/* exp(g) of token t: for every channel and then zeros, or a vector of one value. */
static inline void load_decay(const q3n_gated_delta_args *a, const gd_head *x, int64_t t, float *y, int64_t P) {
  if (a->gate == Q3N_GATE_CHANNEL) {
    for (int64_t c = 0; c < P; c += LANES) {
      const q3n_v_mask some = q3n_v_first(a->K - c);
      const q3n_v e = q3n_v_exp(q3n_v_load_some(some, x->g + t * a->g_t + c));
      q3n_v_store(y + c, q3n_v_select(some, e, q3n_v_zero()));
    }
  } else {
    q3n_v_store(y, a->gate == Q3N_GATE_SCALAR ? q3n_v_exp(q3n_v_set(x->g[t * a->g_t])) : q3n_v_set(1.0f));
  }
}

static void load_block(const q3n_gated_delta_args *a, const gd_head *x, int64_t t0, block *b) {
  for (int64_t i = 0; i < b->n; i++) {
    const int64_t t = t0 + i;
    float *k = b->k + i * b->P, *decay = b->decay + i * b->P, *dk = b->dk + i * b->P, *dq = b->dq + i * b->P;
    load_vector(a, x->k + t * a->k_t, 1.0f, k, b->P);
    load_vector(a, x->q + t * a->q_t, a->scale, dq, b->P);
    load_decay(a, x, t, decay, b->P);
    b->kq[i] = sum_of_products(k, dq, b->P);
    b->beta[i] = x->beta[t * a->beta_t];
    for (int64_t c = 0; c < b->P; c += LANES) {
      const q3n_v d = q3n_v_load(decay + c * b->decay_step);
      q3n_v_store(dk + c, q3n_v_mul(d, q3n_v_load(k + c)));
      q3n_v_store(dq + c, q3n_v_mul(d, q3n_v_load(dq + c)));
    }
  }
}

static inline q3n_v load_part(const float *p, int whole, q3n_v_mask some) {
  return whole ? q3n_v_load(p) : q3n_v_load_some(some, p);
}

/* Channels c on of both dot products: ROWS sums sk, then ROWS sums sq. */
static inline void dot_part(q3n_v sum[2 * ROWS], const block *b, int64_t i, rows from, const float *ahead, int64_t c,
                            int whole, q3n_v_mask some) {
  const q3n_v dk = q3n_v_load(b->dk + i * b->P + c), dq = q3n_v_load(b->dq + i * b->P + c);
  for (int r = 0; r < ROWS; r++) {
    const q3n_v s = load_part(from.at + r * from.row + c, whole, some);
    if (ahead) __builtin_prefetch(ahead + r * from.row + c);
    sum[r] = q3n_v_fma(s, dk, sum[r]);
    sum[ROWS + r] = q3n_v_fma(s, dq, sum[ROWS + r]);
  }
}

static inline void update_part(const q3n_v u[ROWS], const block *b, int64_t i, rows from, rows to, int64_t c, int whole,
                               q3n_v_mask some) {
  const q3n_v k = q3n_v_load(b->k + i * b->P + c), d = q3n_v_load(b->decay + i * b->P + c * b->decay_step);
  for (int r = 0; r < ROWS; r++) {
    const q3n_v s = q3n_v_fma(u[r], k, q3n_v_mul(d, load_part(from.at + r * from.row + c, whole, some)));
    if (whole)
      q3n_v_store(to.at + r * to.row + c, s);
    else
      q3n_v_store_some(to.at + r * to.row + c, some, s);
  }
}

/* One token on ROWS rows. */
typedef struct group {
  int64_t i;          /* token of the block */
  rows from, to;
  const float *ahead; /* rows of the pool that a later group reads, to be fetched meanwhile; or NULL */
  const float *v;
  float *o;
  q3n_v_mask present; /* rows that have a v and an o */
  q3n_v sums;         /* sk, sq */
} group;

static inline void dots(const block *b, int64_t K, group *g) {
  const int64_t whole = K / LANES * LANES;
  q3n_v sum[2 * ROWS];
  for (int r = 0; r < 2 * ROWS; r++) sum[r] = q3n_v_zero();
  if (g->ahead)
    for (int64_t c = 0; c < whole; c += LANES) dot_part(sum, b, g->i, g->from, g->ahead, c, 1, q3n_v_first(0));
  else
    for (int64_t c = 0; c < whole; c += LANES) dot_part(sum, b, g->i, g->from, NULL, c, 1, q3n_v_first(0));
  if (whole < K) dot_part(sum, b, g->i, g->from, NULL, whole, 0, q3n_v_first(K - whole));
  g->sums = q3n_v_sums(sum);
}

static inline void update(const block *b, int64_t K, const group *g) {
  const int64_t whole = K / LANES * LANES;
  const q3n_v u = q3n_v_mul(q3n_v_set(b->beta[g->i]), q3n_v_sub(q3n_v_load_some(g->present, g->v), g->sums));
  q3n_v_store_some(g->o, g->present, q3n_v_fma(u, q3n_v_set(b->kq[g->i]), q3n_v_swap(g->sums)));
  q3n_v u_of[ROWS];
  for (int r = 0; r < ROWS; r++) u_of[r] = q3n_v_lane(u, r);
  for (int64_t c = 0; c < whole; c += LANES) update_part(u_of, b, g->i, g->from, g->to, c, 1, q3n_v_first(0));
  if (whole < K) update_part(u_of, b, g->i, g->from, g->to, whole, 0, q3n_v_first(K - whole));
}

static inline void copy_rows(rows to, rows from, int64_t n, int64_t K) {
  for (int64_t r = 0; r < n; r++)
    for (int64_t c = 0; c < K; c += LANES) {
      const q3n_v_mask some = q3n_v_first(K - c);
      const q3n_v s = from.at ? q3n_v_load_some(some, from.at + r * from.row + c) : q3n_v_zero();
      q3n_v_store_some(to.at + r * to.row + c, some, s);
    }
}

/* Tokens t0 .. of one head on its value rows first .. last - 1, `first` a multiple of ROWS. `begun`: the state before
   them lies in b->s already. */
static void run_rows(const q3n_gated_delta_args *a, const gd_head *x, int64_t t0, int64_t first, int64_t last,
                     int begun, block *b) {
  const int64_t V = a->V, K = a->K, T = x->T;
  /* A const of the args is dropped here to have one type; nothing is written through `in`. */
  const rows in = {(float *)(uintptr_t)x->state_in, a->state_v}, out = {x->state_out, a->state_v}, kept = {b->s, b->P};
  const rows from0 = begun ? kept : in;
  if (t0 >= T) {
    if (out.at)
      copy_rows((rows){out.at + first * out.row, out.row},
                (rows){from0.at ? from0.at + first * from0.row : NULL, from0.row}, last - first, K);
    return;
  }
  /* Whole groups go from pool to pool; what is missing of the last group stays zeros in scratch. */
  const int64_t grouped = last < V ? last : V / ROWS * ROWS;
  if (!begun) {
    const int64_t copied = in.at && first < grouped ? grouped : first;
    for (int64_t r = copied; r < padded(last, ROWS); r++)
      for (int64_t c = 0; c < b->P; c += LANES) q3n_v_store(b->s + r * b->P + c, q3n_v_zero());
    if (in.at) copy_rows((rows){b->s + copied * b->P, b->P}, (rows){in.at + copied * in.row, in.row}, last - copied, K);
  }

  for (int64_t block0 = t0; block0 < T; block0 += TOKENS) {
    b->n = T - block0 < TOKENS ? T - block0 : TOKENS;
    load_block(a, x, block0, b);
    /* Few enough rows at a time that their state stays in the first cache over the block. */
    for (int64_t part = first; part < last; part += Q3N_GATED_DELTA_ROWS) {
      const int64_t part_end = last - part < Q3N_GATED_DELTA_ROWS ? last : part + Q3N_GATED_DELTA_ROWS;
      for (int64_t i = 0; i < b->n; i++) {
        const int64_t t = block0 + i;
        const int from_pool = t == t0 && !begun && in.at, to_pool = t == T - 1 && out.at && !x->snapshots;
        group before = {0}, now;
        for (int64_t r = part; r < part_end; r += ROWS) {
          const rows here = {b->s + r * b->P, b->P};
          now = (group){.i = i, .from = here, .to = here, .v = x->v + t * a->v_t + r, .o = x->o + t * a->o_t + r};
          if (from_pool && r < grouped) now.from = (rows){in.at + r * in.row, in.row};
          if (from_pool && r + AHEAD < grouped) now.ahead = in.at + (r + AHEAD) * in.row;
          if (to_pool && r < grouped) now.to = (rows){out.at + r * out.row, out.row};
          now.present = q3n_v_first(last - r < ROWS ? last - r : ROWS);
          dots(b, K, &now);
          if (r > part) update(b, K, &before);
          before = now;
        }
        update(b, K, &before);
        if (x->snapshots)
          copy_rows((rows){x->snapshots + t * a->snap_t + part * a->snap_v, a->snap_v},
                    (rows){b->s + part * b->P, b->P}, part_end - part, K);
      }
    }
  }
  const int64_t left = x->snapshots || grouped < first ? first : grouped;
  if (out.at && left < last)
    copy_rows((rows){out.at + left * out.row, out.row}, (rows){b->s + left * b->P, b->P}, last - left, K);
}

static inline q3n_status run_recurrent(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch) {
  const int64_t blocks = q3n_ceil_div(a->V, Q3N_GATED_DELTA_ROWS);
  block b = layout_block(a, scratch);

  /* All items of a head in one go: its tokens are read and normalised once. */
  for (int64_t item = begin; item < end;) {
    const int64_t head = item / blocks, from = item % blocks;
    const int64_t to = blocks - from < end - item ? blocks : from + end - item;
    const gd_head x = gd_find_head(a, head / a->HV, head % a->HV);
    const int64_t first = from * Q3N_GATED_DELTA_ROWS;
    const int64_t last = to * Q3N_GATED_DELTA_ROWS < a->V ? to * Q3N_GATED_DELTA_ROWS : a->V;
    if (a->K == 0) {
      for (int64_t t = 0; t < x.T; t++)
        for (int64_t j = first; j < last; j++) x.o[t * a->o_t + j] = 0.0f;
    } else {
      run_rows(a, &x, 0, first, last, 0, &b);
    }
    item += to - from;
  }
  return Q3N_OK;
}
