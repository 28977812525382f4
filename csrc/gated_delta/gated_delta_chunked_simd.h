/* The chunk form over the vectors of csrc/simd: the equations of gated_delta_chunked_scalar.c, every product of
   matrices by one register tile. All that depends on keys and gates alone is made once a chunk; then the value
   channels, which are independent, go through the rest a panel at a time, the panel's state and u staying in the first
   cache.

   With one decay for all channels the products are taken of plain keys and queries, and the rows of the results are
   decayed; with a decay a channel the keys and queries themselves are. */
#include "gated_delta_recurrent_simd.h"

enum {
  WIDE = 2,                        /* vectors across a tile */
  TALL = LANES / 2,                /* its rows */
  PANEL = WIDE * LANES,            /* value channels of a panel */
  HEADS = 2,                       /* at most so many value heads share keys and queries */
  TAIL = Q3N_GATED_DELTA_TAIL      /* shorter ends of sequences are taken token by token */
};

/* Rows of some arrays, to be asked for while other work goes on. */
typedef struct ahead {
  const char *at[2 + 2 * HEADS];
  int64_t bytes[2 + 2 * HEADS], stride[2 + 2 * HEADS];
  int arrays, which;
  int64_t left, asked; /* rows of all, and at a time: a number that does not vary, so that no branch is guessed wrong */
} ahead;

typedef struct chunk {
  int64_t n, C, P;   /* tokens in it, and at most; K rounded up to LANES */
  float *s[HEADS];   /* [panels][P][PANEL] the state of each, transposed */
  float *k, *q;      /* [C][P] keys and queries as read; then k: decayed to the chunk's end with a decay a channel */
  float *kt, *qt;    /* [P][2 C], one beside the other: transposed; decayed from the start with a decay a channel */
  float *decay;      /* [C][P] exp(g), a decay a channel only */
  float *key;        /* [P][C] transposed keys under way from their token to the chunk's end, likewise */
  float *kk, *kq;    /* [C][C] products of keys with keys and queries, not with a decay a channel */
  float *at, *pt;    /* [C][C] A and P transposed: what lies below the diagonal is not read */
  float *u;          /* [C][PANEL] */
  float *gain, *gain_low; /* [P] decay over the whole chunk, and what its rounding left over */
  float *beta;       /* [C] */
  float *start, *end; /* [C] decay of a row from the chunk's start, and on to its end: 1 with a decay a channel */
  double *reach, *e; /* [C] Γ of one token to all others; exp(g) */
  double *gamma;     /* [P] running product of a channel's decays */
  float *snap_k, *snap_decay; /* [P] */
  ahead ahead;       /* k, q, v and o of the next chunk: a head's tokens lie pages apart */
} chunk;

/* Value heads that have the same keys and queries and go through the chunks together. */
typedef struct together {
  gd_head x[HEADS];
  int64_t heads;
} together;

static inline together find_together(const q3n_gated_delta_args *a, int64_t item, int64_t end) {
  together g = {.heads = 0};
  for (; g.heads < HEADS && item < end; item++, g.heads++) {
    const gd_head x = gd_find_head(a, item / a->HV, item % a->HV);
    const gd_head *first = g.x;
    /* Tokens that have no stride begin where others do, so T is compared too. */
    if (g.heads > 0 && (a->gate == Q3N_GATE_CHANNEL || x.T != first->T || x.k != first->k || x.q != first->q)) break;
    g.x[g.heads] = x;
  }
  return g;
}

static inline __attribute__((always_inline)) void ask(ahead *x) {
  for (int64_t i = 0; i < x->asked && x->left > 0; i++, x->left--) {
    for (int64_t b = 0; b < x->bytes[x->which]; b += 64) __builtin_prefetch(x->at[x->which] + b);
    x->at[x->which] += x->stride[x->which];
    x->which = x->which + 1 == x->arrays ? 0 : x->which + 1;
  }
}

static inline void add_ahead(ahead *x, const float *row, int64_t n, int64_t stride) {
  x->at[x->arrays] = (const char *)row;
  x->bytes[x->arrays] = n * 4;
  x->stride[x->arrays++] = stride * 4;
}

/* At most C tokens from t0 on are what comes next. `heads` are at work meanwhile. */
static inline void set_ahead(chunk *ch, const q3n_gated_delta_args *a, const together *g, int64_t t0, int64_t heads) {
  ch->ahead = (ahead){.left = 0};
  if (g->heads == 0 || t0 >= g->x[0].T) return;
  const gd_head *x = g->x;
  add_ahead(&ch->ahead, x->k + t0 * a->k_t, a->K, a->k_t);
  add_ahead(&ch->ahead, x->q + t0 * a->q_t, a->K, a->q_t);
  for (int64_t h = 0; h < g->heads; h++) {
    add_ahead(&ch->ahead, x[h].v + t0 * a->v_t, a->V, a->v_t);
    add_ahead(&ch->ahead, x[h].o + t0 * a->o_t, a->V, a->o_t);
  }
  const int64_t tiles = q3n_ceil_div(ch->n, TALL);
  const int64_t places = heads * q3n_ceil_div(a->V, PANEL) * (2 * tiles + q3n_ceil_div(a->K, 2 * TALL));
  ch->ahead.left = ch->ahead.arrays * (x->T - t0 < ch->C ? x->T - t0 : ch->C);
  ch->ahead.asked = q3n_ceil_div(ch->ahead.left, places);
}

static inline int64_t chunked_floats(const q3n_gated_delta_args *a, int64_t C) {
  const int64_t P = padded(a->K, LANES), VP = padded(a->V, PANEL);
  const int64_t channel = a->gate == Q3N_GATE_CHANNEL ? 2 * C * P : 0;
  const int64_t chunks = HEADS * P * VP + 4 * C * P + channel + 4 * C * C + C * PANEL + 4 * P + 3 * C + 2 * (2 * C + P);
  return chunks + recurrent_floats(a);
}

static inline chunk layout_chunk(const q3n_gated_delta_args *a, int64_t C, float *at, block *b) {
  const int64_t P = padded(a->K, LANES), VP = padded(a->V, PANEL);
  chunk x = {.C = C, .P = P};
  for (int h = 0; h < HEADS; h++) x.s[h] = at, at += P * VP;
  x.k = at, at += C * P;
  x.q = at, at += C * P;
  x.kt = at, x.qt = at + C, at += 2 * C * P;
  if (a->gate == Q3N_GATE_CHANNEL) {
    x.decay = at, at += C * P;
    x.key = at, at += C * P;
  }
  x.kk = at, at += C * C;
  x.kq = at, at += C * C;
  x.at = at, at += C * C;
  x.pt = at, at += C * C;
  x.u = at, at += C * PANEL;
  x.reach = (double *)(void *)at, at += 2 * C;
  x.e = (double *)(void *)at, at += 2 * C;
  x.gamma = (double *)(void *)at, at += 2 * P;
  x.gain = at, at += P;
  x.gain_low = at, at += P;
  x.snap_k = at, at += P;
  x.snap_decay = at, at += P;
  x.beta = at, at += C;
  x.start = at, at += C;
  x.end = at, at += C;
  *b = layout_block(a, at);
  return x;
}

/* acc += or -= sum over j < depth of a[j][TALL] b[j][WIDE vectors]: `a` gives a tile's rows, a number each. */
static inline void product(q3n_v acc[TALL][WIDE], int subtract, const float *a, int64_t a_row, const float *b,
                           int64_t b_row, int64_t b_vector, int64_t depth) {
  for (int64_t j = 0; j < depth; j++, a += a_row, b += b_row) {
    const q3n_v b0 = q3n_v_load(b), b1 = q3n_v_load(b + b_vector);
    for (int m = 0; m < TALL; m++) {
      const q3n_v am = q3n_v_set(a[m]);
      acc[m][0] = subtract ? q3n_v_nfma(am, b0, acc[m][0]) : q3n_v_fma(am, b0, acc[m][0]);
      acc[m][1] = subtract ? q3n_v_nfma(am, b1, acc[m][1]) : q3n_v_fma(am, b1, acc[m][1]);
    }
  }
}

static inline void clear(q3n_v acc[TALL][WIDE]) {
  for (int m = 0; m < TALL; m++)
    for (int w = 0; w < WIDE; w++) acc[m][w] = q3n_v_zero();
}

/* y[columns][rows] = x[rows][columns] by blocks of LANES; the rows and columns that x lacks are written as zeros up to
   a whole block where `fill`, else not at all. */
static void transpose(float *y, int64_t y_row, const float *x, int64_t x_row, int64_t rows_of_x, int64_t columns,
                      int fill) {
  for (int64_t r = 0; r < rows_of_x; r += LANES)
    for (int64_t c = 0; c < columns; c += LANES) {
      q3n_v tile[LANES];
      const q3n_v_mask some = q3n_v_first(columns - c), some_rows = q3n_v_first(fill ? LANES : rows_of_x - r);
      for (int i = 0; i < LANES; i++)
        tile[i] = r + i < rows_of_x ? q3n_v_load_some(some, x + (r + i) * x_row + c) : q3n_v_zero();
      q3n_v_transpose(tile);
      for (int i = 0; i < LANES && (fill || c + i < columns); i++)
        q3n_v_store_some(y + (c + i) * y_row + r, some_rows, tile[i]);
    }
}

/* A rounded decay is off by the same fraction of a unit chunk after chunk where the gates are near 1, as are products
   of numbers of few digits: the rest is kept and applied too. */
static inline void set_gain(chunk *ch, int64_t c, double decay) {
  ch->gain[c] = (float)decay;
  ch->gain_low[c] = (float)(decay - (double)ch->gain[c]);
}

/* What does not depend on the value head. */
static void load_keys(const q3n_gated_delta_args *a, const gd_head *x, int64_t t0, chunk *ch) {
  const int64_t n = ch->n, C = ch->C, P = ch->P;
  for (int64_t i = 0; i < n; i++) {
    const int64_t t = t0 + i;
    load_vector(a, x->k + t * a->k_t, 1.0f, ch->k + i * P, P);
    load_vector(a, x->q + t * a->q_t, a->scale, ch->q + i * P, P);
  }
  transpose(ch->kt, 2 * C, ch->k, P, n, a->K, 1);
  transpose(ch->qt, 2 * C, ch->q, P, n, a->K, 1);
  if (a->gate == Q3N_GATE_CHANNEL) return;
  for (int64_t j = 0; j < n; j += TALL)
    for (int64_t i = j / LANES * LANES; i < padded(n, LANES); i += LANES) {
      q3n_v acc[TALL][WIDE];
      clear(acc);
      product(acc, 0, ch->kt + j, 2 * C, ch->kt + i, 2 * C, C, a->K);
      for (int m = 0; m < TALL; m++) {
        q3n_v_store(ch->kk + (j + m) * C + i, acc[m][0]);
        q3n_v_store(ch->kq + (j + m) * C + i, acc[m][1]);
      }
    }
}

static void load_gates(const q3n_gated_delta_args *a, const gd_head *x, int64_t t0, chunk *ch) {
  const int64_t n = ch->n, P = ch->P;
  for (int64_t i = 0; i < n; i++) {
    const int64_t t = t0 + i;
    ch->beta[i] = x->beta[t * a->beta_t];
    if (a->gate == Q3N_GATE_CHANNEL) load_decay(a, x, t, ch->decay + i * P, P);
    /* Gathered first: then exp takes a vector of tokens. */
    ch->start[i] = a->gate == Q3N_GATE_SCALAR ? x->g[t * a->g_t] : 0.0f;
  }
  for (int64_t i = n; i < padded(n, LANES); i++) ch->beta[i] = ch->start[i] = 0.0f;
  for (int64_t i = 0; i < padded(n, LANES); i += LANES) {
    float e[LANES];
    q3n_v_store(e, q3n_v_exp(q3n_v_load(ch->start + i)));
    for (int64_t l = 0; l < LANES; l++) ch->e[i + l] = (double)e[l];
  }
}

/* A and P where one decay serves all channels, and the decays of rows. Γ is a running product from the last token down,
   in double: near 1, where f32 rounds every product down, it would fall behind. */
static void scores_one_decay(chunk *ch) {
  const int64_t n = ch->n, C = ch->C, N = padded(n, LANES);
  for (int64_t i = 0; i < N; i++) ch->reach[i] = 1.0;
  for (int64_t j = n - 1; j >= 0; j--) {
    const float *kk = ch->kk + j * C, *kq = ch->kq + j * C;
    float *aj = ch->at + j * C, *pj = ch->pt + j * C;
    ch->reach[j] = 1.0;
    ch->end[j] = (float)ch->reach[n - 1];
    for (int64_t i = j / LANES * LANES; i < N; i++) {
      const float g = (float)ch->reach[i];
      aj[i] = kk[i] * (ch->beta[i] * g);
      pj[i] = kq[i] * g;
      ch->reach[i] *= ch->e[j];
    }
  }
  for (int64_t i = 0; i < N; i++) ch->start[i] = (float)ch->reach[i];
  for (int64_t c = 0; c < ch->P; c++) set_gain(ch, c, ch->reach[n - 1]);
}

/* The same with a decay a channel: the keys are decayed, one token after the other. Leaves k decayed to the chunk's
   end, kt and qt decayed from its start. */
static void scores_channel_decay(chunk *ch, int64_t K) {
  const int64_t n = ch->n, C = ch->C, P = ch->P, N = padded(n, LANES);
  for (int64_t c = 0; c < K; c++)
    for (int64_t i = 0; i < N; i += LANES) q3n_v_store(ch->key + c * C + i, q3n_v_load(ch->kt + c * 2 * C + i));
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j <= i; j += LANES) {
      const q3n_v_mask before = q3n_v_first(i - j);
      const q3n_v one = q3n_v_set(1.0f);
      q3n_v sum_a = q3n_v_zero(), sum_p = sum_a;
      for (int64_t c = 0; c < K; c++) {
        float *at = ch->key + c * C + j;
        const q3n_v key = q3n_v_mul(q3n_v_load(at), q3n_v_select(before, q3n_v_set(ch->decay[i * P + c]), one));
        q3n_v_store(at, key);
        sum_a = q3n_v_fma(q3n_v_set(ch->k[i * P + c]), key, sum_a);
        sum_p = q3n_v_fma(q3n_v_set(ch->q[i * P + c]), key, sum_p);
      }
      float row_a[LANES], row_p[LANES];
      q3n_v_store(row_a, q3n_v_mul(sum_a, q3n_v_set(ch->beta[i])));
      q3n_v_store(row_p, sum_p);
      for (int64_t l = 0; l < LANES && j + l <= i; l++) {
        ch->at[(j + l) * C + i] = row_a[l];
        ch->pt[(j + l) * C + i] = row_p[l];
      }
    }

  for (int64_t c = 0; c < P; c++) ch->gamma[c] = 1.0;
  for (int64_t i = 0; i < n; i++)
    for (int64_t c = 0; c < P; c++) {
      ch->gamma[c] *= (double)ch->decay[i * P + c];
      ch->k[i * P + c] *= (float)ch->gamma[c];
      ch->q[i * P + c] *= (float)ch->gamma[c];
    }
  transpose(ch->kt, 2 * C, ch->k, P, n, K, 1);
  transpose(ch->qt, 2 * C, ch->q, P, n, K, 1);
  transpose(ch->k, P, ch->key, C, K, n, 1);
  for (int64_t c = 0; c < P; c++) set_gain(ch, c, ch->gamma[c]);
  for (int64_t i = 0; i < N; i++) ch->start[i] = ch->end[i] = 1.0f;
}

/* What lies on and below the diagonal of a tile: nothing is multiplied above it, where a NaN of a later token would
   come back in time. */
static inline void product_triangle(q3n_v acc[TALL][WIDE], const float *p, int64_t C, const float *u) {
  for (int l = 0; l < TALL; l++) {
    const q3n_v u0 = q3n_v_load(u + l * PANEL), u1 = q3n_v_load(u + l * PANEL + LANES);
    for (int m = l; m < TALL; m++) {
      const q3n_v pm = q3n_v_set(p[l * C + m]);
      acc[m][0] = q3n_v_fma(pm, u0, acc[m][0]);
      acc[m][1] = q3n_v_fma(pm, u1, acc[m][1]);
    }
  }
}

static inline void substitute(q3n_v acc[TALL][WIDE], const float *a, int64_t C) {
  for (int l = 0; l < TALL; l++)
    for (int m = l + 1; m < TALL; m++) {
      const q3n_v am = q3n_v_set(a[l * C + m]);
      acc[m][0] = q3n_v_nfma(am, acc[l][0], acc[m][0]);
      acc[m][1] = q3n_v_nfma(am, acc[l][1], acc[m][1]);
    }
}

/* u and o of TALL tokens from i on: value channels v0 on, `width` of them. */
static void panel_tokens(const q3n_gated_delta_args *a, const gd_head *x, chunk *ch, const float *s, int64_t t0,
                         int64_t i, int64_t v0, q3n_v_mask low, q3n_v_mask high) {
  const int64_t C = ch->C;
  float *u = ch->u + i * PANEL;
  q3n_v acc[TALL][WIDE];

  ask(&ch->ahead);
  clear(acc);
  product(acc, 0, ch->kt + i, 2 * C, s, PANEL, LANES, a->K);
  for (int m = 0; m < TALL; m++) {
    q3n_v v[WIDE] = {q3n_v_zero(), q3n_v_zero()};
    if (i + m < ch->n) {
      const float *row = x->v + (t0 + i + m) * a->v_t + v0;
      v[0] = q3n_v_load_some(low, row);
      v[1] = q3n_v_load_some(high, row + LANES);
    }
    const q3n_v start = q3n_v_set(ch->start[i + m]), beta = q3n_v_set(ch->beta[i + m]);
    for (int w = 0; w < WIDE; w++) acc[m][w] = q3n_v_mul(beta, q3n_v_nfma(start, acc[m][w], v[w]));
  }
  product(acc, 1, ch->at + i, C, ch->u, PANEL, LANES, i);
  substitute(acc, ch->at + i * C + i, C);
  for (int m = 0; m < TALL; m++)
    for (int w = 0; w < WIDE; w++) q3n_v_store(u + m * PANEL + w * LANES, acc[m][w]);

  ask(&ch->ahead);
  clear(acc);
  product(acc, 0, ch->qt + i, 2 * C, s, PANEL, LANES, a->K);
  for (int m = 0; m < TALL; m++)
    for (int w = 0; w < WIDE; w++) acc[m][w] = q3n_v_mul(q3n_v_set(ch->start[i + m]), acc[m][w]);
  product(acc, 0, ch->pt + i, C, ch->u, PANEL, LANES, i);
  product_triangle(acc, ch->pt + i * C + i, C, u);
  for (int m = 0; m < TALL && i + m < ch->n; m++) {
    float *o = x->o + (t0 + i + m) * a->o_t + v0;
    q3n_v_store_some(o, low, acc[m][0]);
    q3n_v_store_some(o + LANES, high, acc[m][1]);
  }
}

/* The states after each token of the chunk, value channels v0 .. v0 + width: from the panel's state before it and u. */
static void panel_snapshots(const q3n_gated_delta_args *a, const gd_head *x, const chunk *ch, const float *s,
                            int64_t t0, int64_t v0, int64_t width) {
  transpose(x->snapshots + t0 * a->snap_t + v0 * a->snap_v, a->snap_v, s, PANEL, a->K, width, 0);
  for (int64_t i = 0; i < ch->n; i++) {
    float *now = x->snapshots + (t0 + i) * a->snap_t + v0 * a->snap_v;
    const float *last = i ? now - a->snap_t : now;
    load_vector(a, x->k + (t0 + i) * a->k_t, 1.0f, ch->snap_k, ch->P);
    load_decay(a, x, t0 + i, ch->snap_decay, ch->P);
    const int64_t step = a->gate == Q3N_GATE_CHANNEL;
    for (int64_t v = 0; v < width; v++)
      for (int64_t c = 0; c < a->K; c += LANES) {
        const q3n_v_mask some = q3n_v_first(a->K - c);
        const q3n_v before = 
            q3n_v_mul(q3n_v_load(ch->snap_decay + c * step), q3n_v_load_some(some, last + v * a->snap_v + c));
        const q3n_v u = q3n_v_set(ch->u[i * PANEL + v]);
        q3n_v_store_some(now + v * a->snap_v + c, some, q3n_v_fma(u, q3n_v_load(ch->snap_k + c), before));
      }
  }
}

static void panel_state(chunk *ch, float *s, int64_t K) {
  for (int64_t i = 0; i < ch->n; i++)
    for (int w = 0; w < WIDE; w++) {
      float *u = ch->u + i * PANEL + w * LANES;
      q3n_v_store(u, q3n_v_mul(q3n_v_set(ch->end[i]), q3n_v_load(u)));
    }
  for (int64_t c = 0; c < K; c += TALL) {
    if (c % (2 * TALL) == 0) ask(&ch->ahead);
    q3n_v acc[TALL][WIDE];
    for (int m = 0; m < TALL; m++)
      for (int w = 0; w < WIDE; w++) {
        const q3n_v before = q3n_v_load(s + (c + m) * PANEL + w * LANES);
        const q3n_v low = q3n_v_mul(q3n_v_set(ch->gain_low[c + m]), before);
        acc[m][w] = q3n_v_fma(q3n_v_set(ch->gain[c + m]), before, low);
      }
    product(acc, 0, ch->k + c, ch->P, ch->u, PANEL, LANES, ch->n);
    for (int m = 0; m < TALL; m++)
      for (int w = 0; w < WIDE; w++) q3n_v_store(s + (c + m) * PANEL + w * LANES, acc[m][w]);
  }
}

static void run_chunk(const q3n_gated_delta_args *a, const gd_head *x, float *state, int64_t t0, chunk *ch) {
  load_gates(a, x, t0, ch);
  if (a->gate == Q3N_GATE_CHANNEL)
    scores_channel_decay(ch, a->K);
  else
    scores_one_decay(ch);
  for (int64_t v0 = 0; v0 < a->V; v0 += PANEL) {
    const int64_t width = a->V - v0 < PANEL ? a->V - v0 : PANEL;
    float *s = state + v0 * ch->P;
    for (int64_t i = 0; i < ch->n; i += TALL)
      panel_tokens(a, x, ch, s, t0, i, v0, q3n_v_first(width), q3n_v_first(width - LANES));
    if (x->snapshots) panel_snapshots(a, x, ch, s, t0, v0, width);
    panel_state(ch, s, a->K);
  }
}

static void load_state(const q3n_gated_delta_args *a, const gd_head *x, const chunk *ch, float *state) {
  for (int64_t v0 = 0; v0 < a->V; v0 += PANEL) {
    const int64_t width = a->V - v0 < PANEL ? a->V - v0 : PANEL;
    float *s = state + v0 * ch->P;
    for (int64_t i = 0; i < ch->P * PANEL; i += LANES) q3n_v_store(s + i, q3n_v_zero());
    if (x->state_in) transpose(s, PANEL, x->state_in + v0 * a->state_v, a->state_v, width, a->K, 1);
  }
}

/* As `rows` >= V rows, those past V zeros. */
static void store_state(const q3n_gated_delta_args *a, float *to, int64_t to_row, int64_t rows, const chunk *ch,
                        const float *state) {
  for (int64_t v0 = 0; v0 < a->V; v0 += PANEL)
    transpose(to + v0 * to_row, to_row, state + v0 * ch->P, PANEL, a->K, a->V - v0 < PANEL ? a->V - v0 : PANEL, 0);
  for (int64_t r = a->V; r < rows; r++)
    for (int64_t c = 0; c < ch->P; c += LANES) q3n_v_store(to + r * to_row + c, q3n_v_zero());
}

static inline q3n_status run_chunked(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch,
                                     int64_t C) {
  const int64_t K = a->K, V = a->V;
  block b;
  chunk ch = layout_chunk(a, C, scratch, &b);

  together next = find_together(a, begin, end);
  for (int64_t item = begin; item < end;) {
    const together g = next;
    const gd_head *x = g.x;
    item += g.heads;
    next = find_together(a, item, end);
    const int64_t T = x->T, rest = T % C, chunked = rest < TAIL ? T - rest : T;
    if (K == 0) {
      for (int64_t h = 0; h < g.heads; h++) gd_zero_output(a, x + h);
      continue;
    }
    for (int64_t t0 = 0; t0 < chunked; t0 += C) {
      ch.n = chunked - t0 < C ? chunked - t0 : C;
      if (t0 + ch.n < T)
        set_ahead(&ch, a, &g, t0 + ch.n, g.heads);
      else
        set_ahead(&ch, a, &next, 0, g.heads);
      load_keys(a, x, t0, &ch);
      for (int64_t h = 0; h < g.heads; h++) {
        float *state = ch.s[chunked > C ? h : 0]; /* after an only chunk the head is done, and its state's place free */
        if (t0 == 0) load_state(a, x + h, &ch, state);
        run_chunk(a, x + h, state, t0, &ch);
        if (t0 + ch.n < chunked) continue;
        if (chunked == T) {
          if (x[h].state_out) store_state(a, x[h].state_out, a->state_v, V, &ch, state);
        } else {
          store_state(a, b.s, b.P, padded(V, ROWS), &ch, state);
          run_rows(a, x + h, chunked, 0, V, 1, &b);
        }
      }
    }
    for (int64_t h = 0; h < g.heads && chunked == 0; h++) run_rows(a, x + h, 0, 0, V, 0, &b);
  }
  return Q3N_OK;
}
