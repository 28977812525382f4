/* Online softmax over blocks of keys, by register tiles over the vectors of csrc/simd. The rows of an item (its queries
   times the heads of its KV head) go in groups of ROWS.

     scores   ROWS rows x PANEL keys      sums over channels
     values   ROWS rows x PANEL channels  sums over the block's keys

   Many rows: a panel of keys is transposed once and met by all groups, and so is a panel of channels of the values. Few
   rows, as in decode: keys and values are read where they lie. Both do the same arithmetic.

   What a row does with a block does not depend on the other rows: keys that it does not see have weight 0, and a value
   that is not finite is 0 in the panel and is added afterwards to the rows that see it. */
#include <math.h>
#include <string.h>

#include "../base/check.h"
#include "../quant/quant_blocks.h"
#include "attention_tile.h"

enum {
  LANES = Q3N_LANES,
  LEVELS = LANES == 16 ? 4 : 3, /* 2^LEVELS lanes */
  ROWS = LANES / 2,
  PANEL = 2 * LANES,            /* keys or channels */
  KEYS = 64,
  FEW = 8,                      /* rows of a tile that is read where it lies */
  NEAR = LANES == 16 ? 64 : 16, /* rows up to which panels do not pay; of q8_0, dear to convert, half */
  MEMORY = 64,                  /* rows of several items together that there is memory for */
  WIDE = LANES / FEW,           /* vectors of channels that their sums leave registers for */
  MERGED = 8                    /* vectors of channels of a merge */
};

/* Scratch of an item. Rows are padded to groups, channels to panels. */
typedef struct memory {
  int64_t P;        /* D rounded up to panels */
  int64_t chunk;    /* D / LANES rounded up */
  float *q;         /* many rows: [groups][chunk x LANES, by place][ROWS]; few: [P / LANES][tile][LANES] */
  float *o;         /* [rows][P]: sum exp(s_j - max) v_j */
  float *max, *sum; /* [rows]: the largest score so far, sum exp(s_j - max) */
  float *rescale;   /* [rows]: what the block multiplies o by */
  float *p;         /* [rows][KEYS]: the block's sums q . k_j, then its weights */
  uint64_t *seen;   /* [rows]: the keys of the block whose score is not -inf */
  float *k;         /* [chunk x LANES, by place][PANEL] */
  float *v;         /* [KEYS][PANEL] */
  float *row;       /* [P]: one value as it lies in the cache */
} memory;

static int64_t padded(int64_t rows) { return (rows + FEW - 1) / FEW * FEW; }

/* Rows that there is memory for: of the largest item, or of a few small ones. */
static int64_t most_rows(const q3n_attention_args *a) {
  const int64_t queries = a->T < Q3N_ATTENTION_QUERIES ? a->T : Q3N_ATTENTION_QUERIES;
  const int64_t rows = padded(queries * (a->HQ / a->HKV)), all = a->HKV < MEMORY ? rows * a->HKV : MEMORY;
  return rows > MEMORY ? rows : all < MEMORY ? all : MEMORY;
}

/* Lays the parts out from `at` on, and returns their bytes. */
static int64_t layout(const q3n_attention_args *a, char *at, memory *m) {
  const int64_t rows = most_rows(a), P = (a->D + PANEL - 1) / PANEL * PANEL;
  const int64_t size[] = {rows * P, rows * P, rows, rows, rows, rows * KEYS, 2 * rows, P * PANEL, KEYS * PANEL, P};
  int64_t offset[10], bytes = 0;
  for (int i = 0; i < 10; i++) {
    offset[i] = bytes;
    bytes += q3n_align(size[i] * 4);
  }
  if (m)
    *m = (memory){P,
                  q3n_ceil_div(a->D, LANES),
                  (float *)(at + offset[0]),
                  (float *)(at + offset[1]),
                  (float *)(at + offset[2]),
                  (float *)(at + offset[3]),
                  (float *)(at + offset[4]),
                  (float *)(at + offset[5]),
                  (uint64_t *)(at + offset[6]),
                  (float *)(at + offset[7]),
                  (float *)(at + offset[8]),
                  (float *)(at + offset[9])};
  return bytes;
}

static int64_t tile_scratch(const q3n_attention_args *a) {
  if (a->B == 0 || a->HQ == 0 || a->T == 0) return 0; /* an empty o bounds no size */
  return layout(a, NULL, NULL);
}

/* A score is summed lane by lane: lane l takes the channels l, l + LANES ..., and the lanes are added as q3n_v_sums
   adds them, halves first. One lane after the other, they come in this order for that: the bits of l reversed. */
static inline int64_t place(int64_t l) {
  int64_t y = 0;
  for (int i = 0; i < LEVELS; i++) y = y * 2 + (l >> i & 1);
  return y;
}

/* Elements d .. d + LANES - 1 of a row of the cache, of which there are `left`, the others 0. */
static inline __attribute__((always_inline)) q3n_v load_part(q3n_dtype dtype, const void *row, int64_t d,
                                                             int64_t left) {
  if (left <= 0) return q3n_v_zero();
  if (dtype == Q3N_F32) {
    const float *p = (const float *)row + d;
    return left >= LANES ? q3n_v_load(p) : q3n_v_load_some(q3n_v_first(left), p);
  }
  if (dtype == Q3N_Q8_0) {
    const q3n_block_q8_0 *block = (const q3n_block_q8_0 *)row + d / 32;
    return q3n_v_mul(q3n_v_set_f16(q3n_load_u16(block->d)), q3n_v_load_i8(block->q + d % 32));
  }
  const uint16_t *p = (const uint16_t *)row + d;
  uint16_t some[LANES] = {0};
  if (left < LANES) p = memcpy(some, p, (size_t)left * 2);
  return dtype == Q3N_F16 ? q3n_v_load_f16(p) : q3n_v_load_bf16(p);
}

/* Where row j of keys or values begins: `at` elements into the cache, a whole number of blocks. */
static inline const void *row_at(const void *cache, q3n_dtype dtype, int64_t at) {
  const uint8_t *p = cache;
  if (dtype == Q3N_F32) return p + at * 4;
  if (dtype == Q3N_Q8_0) return p + at / 32 * (int64_t)sizeof(q3n_block_q8_0);
  return p + at * 2;
}

/* Rows of the cache that are needed soon: they lie apart, and the hardware does not guess them. */
typedef struct ahead {
  const char *at, *past; /* the rest of a row */
  int64_t bytes, stride; /* of a row, between rows */
  int64_t rows;          /* that begin after this one */
  int64_t lines, steps;  /* all of them are asked for in so many steps, evenly */
  int64_t due;           /* lines x steps so far - steps x lines asked for */
} ahead;

/* `rows` >= 0 rows of `bytes` from `first` on, `stride` bytes apart, in `steps` > 0 steps. */
static inline ahead ahead_of_rows(const void *first, int64_t bytes, int64_t stride, int64_t rows, int64_t steps) {
  const char *row = first;
  return (ahead){row, rows > 0 ? row + bytes : row, bytes, stride, rows - 1, rows * ((bytes + 63) / 64), steps, 0};
}

/* Inlined, because gcc drops a call that does nothing but ask. */
static inline __attribute__((always_inline)) void ask(ahead *x) {
  for (x->due += x->lines; x->due >= x->steps; x->due -= x->steps) {
    if (x->at >= x->past) {
      if (x->rows <= 0) return;
      x->rows--;
      x->at = x->past - x->bytes + x->stride;
      x->past = x->at + x->bytes;
    }
    __builtin_prefetch(x->at);
    x->at += 64;
  }
}

/* Rows of the cache from `at` on, of which the steps of the work meanwhile ask for parts. */
static ahead ahead_of(const void *cache, q3n_dtype dtype, int64_t at, int64_t stride, int64_t rows, int64_t D,
                          int64_t steps) {
  const char *row = row_at(cache, dtype, at);
  return ahead_of_rows(row, (const char *)row_at(row, dtype, D) - row, (const char *)row_at(row, dtype, stride) - row,
                      rows, steps);
}

/* n <= PANEL keys, `at` elements into the cache and `stride` apart, as k[channel][key]; missing keys are 0. */
static inline __attribute__((always_inline)) void load_keys_of(q3n_dtype dtype, const void *cache, int64_t at,
                                                               int64_t stride, int64_t n, int64_t D, float *k,
                                                               ahead *next) {
  const int64_t chunk = q3n_ceil_div(D, LANES);
  for (int64_t half = 0; half < PANEL; half += LANES) {
    const void *row[LANES];
    for (int64_t i = 0; i < LANES; i++)
      row[i] = row_at(cache, dtype, at + (half + i < n ? half + i : 0) * stride);
    for (int64_t c = 0; c < chunk; c++) {
      ask(next);
      q3n_v x[LANES];
      for (int i = 0; i < LANES; i++) x[i] = load_part(dtype, row[i], c * LANES, D - c * LANES);
      if (half + LANES > n)
        for (int i = 0; i < LANES; i++) x[i] = half + i < n ? x[i] : q3n_v_zero();
      q3n_v_transpose(x);
      for (int i = 0; i < LANES; i++) q3n_v_store(k + (place(i) * chunk + c) * PANEL + half, x[i]);
    }
  }
}

/* A panel of n <= KEYS values, channels d .. d + PANEL, as v[key][channel]. What is not finite is 0 there; returns the
   keys that hold such. */
static inline __attribute__((always_inline)) uint64_t load_values_of(q3n_dtype dtype, const void *cache, int64_t at,
                                                                     int64_t stride, int64_t n, int64_t D, int64_t d,
                                                                     float *v, ahead *next) {
  uint64_t wild = 0;
  for (int64_t j = 0; j < n; j++) {
    const void *row = row_at(cache, dtype, at + j * stride);
    if (j % 8 == 0) ask(next);
    const q3n_v low = load_part(dtype, row, d, D - d), high = load_part(dtype, row, d + LANES, D - d - LANES);
    const q3n_v_mask low_finite = q3n_v_finite(low), high_finite = q3n_v_finite(high);
    q3n_v_store(v + j * PANEL, q3n_v_select(low_finite, low, q3n_v_zero()));
    q3n_v_store(v + j * PANEL + LANES, q3n_v_select(high_finite, high, q3n_v_zero()));
    wild |= (uint64_t)(q3n_v_bits(q3n_v_both(low_finite, high_finite)) != (1u << LANES) - 1) << j;
  }
  return wild;
}

static void load_keys(const q3n_attention_args *a, int64_t at, int64_t n, float *k, ahead *next) {
  switch (a->kv_dtype) {
    case Q3N_F16: load_keys_of(Q3N_F16, a->k, at, a->k_s, n, a->D, k, next); return;
    case Q3N_BF16: load_keys_of(Q3N_BF16, a->k, at, a->k_s, n, a->D, k, next); return;
    case Q3N_Q8_0: load_keys_of(Q3N_Q8_0, a->k, at, a->k_s, n, a->D, k, next); return;
    default: load_keys_of(Q3N_F32, a->k, at, a->k_s, n, a->D, k, next); return;
  }
}

static uint64_t load_values(const q3n_attention_args *a, int64_t at, int64_t n, int64_t d, float *v, ahead *next) {
  switch (a->kv_dtype) {
    case Q3N_F16: return load_values_of(Q3N_F16, a->v, at, a->v_s, n, a->D, d, v, next);
    case Q3N_BF16: return load_values_of(Q3N_BF16, a->v, at, a->v_s, n, a->D, d, v, next);
    case Q3N_Q8_0: return load_values_of(Q3N_Q8_0, a->v, at, a->v_s, n, a->D, d, v, next);
    default: return load_values_of(Q3N_F32, a->v, at, a->v_s, n, a->D, d, v, next);
  }
}

/* q . k for `rows` rows of a group and a panel of keys. */
static inline __attribute__((always_inline)) void scores_of(int rows, const float *q, const float *k, int64_t chunk,
                                                            float *p, ahead *next) {
  float kept[LEVELS][ROWS][PANEL] __attribute__((aligned(64)));
  for (int64_t l = 0; l < LANES; l++) {
    q3n_v s[ROWS][2];
    for (int r = 0; r < rows; r++) s[r][0] = s[r][1] = q3n_v_zero();
    ask(next);
    for (int64_t c = 0; c < chunk; c++, q += ROWS, k += PANEL) {
      const q3n_v k0 = q3n_v_load(k), k1 = q3n_v_load(k + LANES);
      for (int r = 0; r < rows; r++) {
        const q3n_v qr = q3n_v_set(q[r]);
        s[r][0] = q3n_v_fma(qr, k0, s[r][0]);
        s[r][1] = q3n_v_fma(qr, k1, s[r][1]);
      }
    }
    /* Sums of as many lanes are added, as a counter carries. */
    int level = 0;
    for (; l >> level & 1; level++)
      for (int r = 0; r < rows; r++)
        for (int i = 0; i < 2; i++) s[r][i] = q3n_v_add(q3n_v_load(&kept[level][r][LANES * i]), s[r][i]);
    float *to = level < LEVELS ? &kept[level][0][0] : p;
    for (int r = 0; r < rows; r++)
      for (int i = 0; i < 2; i++) q3n_v_store(to + r * (level < LEVELS ? PANEL : KEYS) + LANES * i, s[r][i]);
  }
}

/* The same for all rows, at most FEW, from n <= KEYS keys as they lie in the cache. */
static inline __attribute__((always_inline)) void scores_near_of(q3n_dtype dtype, int rows, const float *q,
                                                                 const void *cache, int64_t at, int64_t stride,
                                                                 int64_t n, int64_t D, float *p, ahead *next) {
  /* A tile takes `keys` keys. Key b of tile t is b tiles + t, so that a row's scores come to lie side by side. */
  const int keys = LANES / rows, tiles = KEYS / keys < LANES ? KEYS / keys : LANES;
  ahead x = *next;
  for (int64_t j0 = 0; j0 < n; j0 += tiles * keys) {
    q3n_v sums[LANES];
    for (int t = 0; t < tiles; t++) {
      q3n_v s[LANES], k[LANES];
      const void *row[LANES];
      for (int b = 0; b < keys; b++) {
        const int64_t j = j0 + b * tiles + t < n ? j0 + b * tiles + t : n - 1;
        row[b] = row_at(cache, dtype, at + j * stride);
        for (int r = 0; r < rows; r++) s[b * rows + r] = q3n_v_zero();
      }
      const float *qd = q;
      int64_t d = 0;
      for (; d + LANES <= D; d += LANES, qd += rows * LANES) {
        ask(&x);
        for (int b = 0; b < keys; b++) k[b] = load_part(dtype, row[b], d, LANES);
        for (int r = 0; r < rows; r++) {
          q3n_v qr = q3n_v_load(qd + r * LANES);
          if (Q3N_REGISTERS == 32) qr = q3n_v_keep(qr);
          for (int b = 0; b < keys; b++) s[b * rows + r] = q3n_v_fma(qr, k[b], s[b * rows + r]);
        }
      }
      if (d < D) {
        for (int b = 0; b < keys; b++) k[b] = load_part(dtype, row[b], d, D - d);
        for (int r = 0; r < rows; r++)
          for (int b = 0; b < keys; b++)
            s[b * rows + r] = q3n_v_fma(q3n_v_load(qd + r * LANES), k[b], s[b * rows + r]);
      }
      sums[t] = q3n_v_sums(s);
    }
    for (int t = tiles; t < LANES; t++) sums[t] = q3n_v_zero();
    q3n_v_transpose(sums);
    for (int b = 0; b < keys; b++)
      for (int r = 0; r < rows; r++)
        q3n_v_store_some(p + r * KEYS + j0 + b * tiles, q3n_v_first(tiles), sums[b * rows + r]);
  }
  *next = x;
}

/* o = o rescale + sum_j p_j v_j for `rows` rows of a group and a panel of channels. The block's sum is made apart: over
   S keys it takes KEYS + S / KEYS roundings instead of S. */
static inline __attribute__((always_inline)) void values_of(int rows, const float *p, const float *v, int64_t n,
                                                            const float *rescale, float *o, int64_t P) {
  q3n_v s[ROWS][2];
  for (int r = 0; r < rows; r++) s[r][0] = s[r][1] = q3n_v_zero();
  for (int64_t j = 0; j < n; j++) {
    const q3n_v v0 = q3n_v_load(v + j * PANEL), v1 = q3n_v_load(v + j * PANEL + LANES);
    for (int r = 0; r < rows; r++) {
      const q3n_v pr = q3n_v_set(p[r * KEYS + j]);
      s[r][0] = q3n_v_fma(pr, v0, s[r][0]);
      s[r][1] = q3n_v_fma(pr, v1, s[r][1]);
    }
  }
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < 2; i++) {
      float *to = o + r * P + LANES * i;
      q3n_v_store(to, q3n_v_fma(q3n_v_load(to), q3n_v_set(rescale[r]), s[r][i]));
    }
}

/* The same for all rows, at most FEW, and WIDE vectors of channels, from values as they lie in the cache. Where one of
   them is not finite the first row's sum is not, as 0 times it is NaN: then o stays as it is, and the result is 0. */
static inline __attribute__((always_inline)) int values_near_of(q3n_dtype dtype, int rows, const float *p,
                                                                const void *cache, int64_t at, int64_t stride,
                                                                int64_t n, int64_t d, const float *rescale, float *o,
                                                                int64_t P, ahead *next) {
  ahead x = *next;
  q3n_v s[FEW][WIDE];
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < WIDE; i++) s[r][i] = q3n_v_zero();
  for (int64_t j = 0; j < n; j++) {
    const void *row = row_at(cache, dtype, at + j * stride);
    q3n_v v[WIDE];
    ask(&x);
    for (int i = 0; i < WIDE; i++) v[i] = load_part(dtype, row, d + LANES * i, LANES);
    for (int r = 0; r < rows; r++) {
      const q3n_v pr = q3n_v_set(p[r * KEYS + j]);
      for (int i = 0; i < WIDE; i++) s[r][i] = q3n_v_fma(pr, v[i], s[r][i]);
    }
  }
  *next = x;
  for (int i = 0; i < WIDE; i++)
    if (q3n_v_bits(q3n_v_finite(s[0][i])) != (1u << LANES) - 1) return 0;
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < WIDE; i++) {
      float *to = o + r * P + d + LANES * i;
      q3n_v_store(to, q3n_v_fma(q3n_v_load(to), q3n_v_set(rescale[r]), s[r][i]));
    }
  return 1;
}

/* The least power of two that holds `rows`, or `most`. */
static int tile_rows(int64_t rows, int most) {
  int n = 1;
  while (n < most && n < rows) n *= 2;
  return n;
}

static void scores(int64_t rows, const float *q, const float *k, int64_t chunk, float *p, ahead *next) {
  switch (tile_rows(rows, ROWS)) {
    case 1: scores_of(1, q, k, chunk, p, next); return;
    case 2: scores_of(2, q, k, chunk, p, next); return;
    case 4: scores_of(4, q, k, chunk, p, next); return;
    default: scores_of(ROWS, q, k, chunk, p, next); return;
  }
}

static void values(int64_t rows, const float *p, const float *v, int64_t n, const float *rescale, float *o, int64_t P) {
  switch (tile_rows(rows, ROWS)) {
    case 1: values_of(1, p, v, n, rescale, o, P); return;
    case 2: values_of(2, p, v, n, rescale, o, P); return;
    case 4: values_of(4, p, v, n, rescale, o, P); return;
    default: values_of(ROWS, p, v, n, rescale, o, P); return;
  }
}

/* CALL(type of the cache, rows of a tile) for any of them. */
#define BY_ROWS(CALL, dtype)         \
  switch (tile_rows(rows, FEW)) {    \
    case 1: return CALL(dtype, 1);   \
    case 2: return CALL(dtype, 2);   \
    case 4: return CALL(dtype, 4);   \
    default: return CALL(dtype, FEW); \
  }
#define BY_TYPE_AND_ROWS(CALL)              \
  switch (a->kv_dtype) {                    \
    case Q3N_F16: BY_ROWS(CALL, Q3N_F16)    \
    case Q3N_BF16: BY_ROWS(CALL, Q3N_BF16)  \
    case Q3N_Q8_0: BY_ROWS(CALL, Q3N_Q8_0)  \
    default: BY_ROWS(CALL, Q3N_F32)         \
  }

static void scores_near(const q3n_attention_args *a, const memory *m, int64_t rows, int64_t at, int64_t n,
                        ahead *next) {
#define CALL(dtype, tile) scores_near_of(dtype, tile, m->q, a->k, at, a->k_s, n, a->D, m->p, next)
  BY_TYPE_AND_ROWS(CALL)
#undef CALL
}

/* How often scores_near asks for what comes after it. */
static int64_t steps_near(int64_t rows, int64_t n, int64_t D) {
  const int keys = LANES / tile_rows(rows, FEW);
  return q3n_ceil_div(n, keys) * (D / LANES) + 1;
}

static int values_near(const q3n_attention_args *a, const memory *m, int64_t rows, int64_t at, int64_t n, int64_t d,
                       ahead *next) {
#define CALL(dtype, tile) \
  values_near_of(dtype, tile, m->p, a->v, at, a->v_s, n, d, m->rescale, m->o, m->P, next)
  BY_TYPE_AND_ROWS(CALL)
#undef CALL
}

/* The same sums of few rows from a panel, for values that are not finite and for the last channels of an odd D. */
static void values_apart(const memory *m, int64_t rows, int64_t n, int64_t d) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < WIDE * LANES; i += LANES) {
      q3n_v s = q3n_v_zero();
      for (int64_t j = 0; j < n; j++)
        s = q3n_v_fma(q3n_v_set(m->p[r * KEYS + j]), q3n_v_load(m->v + j * PANEL + i), s);
      float *to = m->o + r * m->P + d + i;
      q3n_v_store(to, q3n_v_fma(q3n_v_load(to), q3n_v_set(m->rescale[r]), s));
    }
}

/* Row r's sums q . k of a block become weights; it sees the first `visible` keys, of which -inf in `mask` hides
   some. */
static void weigh(const memory *m, int64_t r, int64_t visible, float scale, const float *mask) {
  float *p = m->p + r * KEYS;
  const q3n_v hidden = q3n_v_set(-INFINITY);
  q3n_v s[KEYS / LANES], largest = hidden;
  q3n_v_mask seen[KEYS / LANES];
  for (int i = 0; i < KEYS / LANES; i++) {
    const q3n_v_mask lanes = q3n_v_first(visible - LANES * i);
    const q3n_v bias = mask ? q3n_v_load_some(lanes, mask + LANES * i) : q3n_v_zero();
    s[i] = q3n_v_fma(q3n_v_load_some(lanes, p + LANES * i), q3n_v_set(scale), bias);
    /* The key of a masked score may be NaN; a NaN score counts as seen. */
    s[i] = q3n_v_select(q3n_v_both(lanes, q3n_v_differs(bias, hidden)), s[i], hidden);
    seen[i] = q3n_v_differs(s[i], hidden);
    largest = q3n_v_max(s[i], largest);
  }
  /* From -inf on there is nothing to rescale, and -inf - -inf is formed only for keys that are not seen. */
  const float old = m->max[r], block = q3n_v_largest(largest), max = block > old ? block : old;
  m->max[r] = max;
  m->rescale[r] = max == old ? 1.0f : old == -INFINITY ? 0.0f : expf(old - max);
  q3n_v sum = q3n_v_zero();
  uint64_t keys = 0;
  for (int i = 0; i < KEYS / LANES; i++) {
    const q3n_v weight = q3n_v_select(seen[i], q3n_v_exp(q3n_v_sub(s[i], q3n_v_set(max))), q3n_v_zero());
    q3n_v_store(p + LANES * i, weight);
    sum = q3n_v_add(sum, weight);
    keys |= (uint64_t)q3n_v_bits(seen[i]) << LANES * i;
  }
  m->seen[r] = keys;
  m->sum[r] = m->sum[r] * m->rescale[r] + q3n_v_sum(sum);
}

/* A row that sees nothing of a block. */
static void pass(const memory *m, int64_t r) {
  for (int i = 0; i < KEYS; i += LANES) q3n_v_store(m->p + r * KEYS + i, q3n_v_zero());
  m->rescale[r] = 1.0f;
  m->seen[r] = 0;
}

/* The channels of value j that are not finite, to the rows that see the key: 0 in place of them was added before. */
static void add_wild(const memory *m, int64_t from, int64_t rows, int64_t j, int64_t D) {
  for (int64_t r = from; r < rows; r++) {
    if (!(m->seen[r] >> j & 1)) continue;
    for (int64_t d = 0; d < D; d++)
      if (!isfinite(m->row[d])) m->o[r * m->P + d] += m->p[r * KEYS + j] * m->row[d];
  }
}

/* The sink joins a row's sum, last; returns what the row's values are multiplied by. */
static float add_sink(float sink, float *max, float *sum) {
  if (sink == -INFINITY) return 1.0f;
  const float old = *max;
  if (sink > old) *max = sink;
  const float rescale = *max == old ? 1.0f : old == -INFINITY ? 0.0f : expf(old - *max);
  *sum = *sum * rescale + expf(sink - *max);
  return rescale;
}

/* The division and the gate: o from a row's values x, which may be o. Returns lse. */
static float divide(const float *x, float rescale, float max, float sum, const float *gate, float *o, int64_t D) {
  const int empty = sum == 0.0f;
  for (int64_t d = 0; d < D; d += LANES) {
    q3n_v y = q3n_v_mul(q3n_v_load_upto(x + d, D - d), q3n_v_set(rescale));
    /* + 0: a zero's sign would tell of values that the row does not see. */
    y = q3n_v_add(q3n_v_div(y, q3n_v_set(sum)), q3n_v_zero());
    if (empty) y = q3n_v_zero();
    if (gate) y = q3n_v_mul(y, q3n_v_sigmoid(q3n_v_load_upto(gate + d, D - d)));
    q3n_v_store_upto(o + d, D - d, y);
  }
  return empty ? -INFINITY : max + logf(sum);
}

static void finish(const q3n_attention_args *a, const q3n_attention_tile *tile, const memory *m, int64_t r) {
  const int64_t group = a->HQ / a->HKV, t = tile->packed + tile->first + r / group, h = tile->hkv * group + r % group;
  const float *gate = a->gate ? a->gate + tile->row * a->gate_b + t * a->gate_t + h * a->gate_h : NULL;
  float *o = a->o + tile->row * a->o_b + t * a->o_t + h * a->o_h;
  const float rescale = a->sinks ? add_sink(a->sinks[h], m->max + r, m->sum + r) : 1.0f;
  const float lse = divide(m->o + r * m->P, rescale, m->max[r], m->sum[r], gate, o, a->D);
  if (a->lse) a->lse[tile->row * a->lse_b + t * a->lse_t + h] = lse;
}

/* The memory of the rows from `row` on. */
static memory rows_from(const memory *m, int64_t row) {
  memory y = *m;
  y.q += row * m->P;
  y.o += row * m->P;
  y.max += row;
  y.sum += row;
  y.rescale += row;
  y.p += row * KEYS;
  y.seen += row;
  return y;
}

/* Row r's query, or zeros for a row that only fills its group. */
static void place_query(const memory *m, int64_t r, const float *q, int64_t D) {
  for (int64_t l = 0; l < LANES; l++) {
    float *to = m->q + r / ROWS * ROWS * m->P + place(l) * m->chunk * ROWS + r % ROWS;
    for (int64_t c = 0; c < m->chunk; c++) {
      const int64_t d = c * LANES + l;
      to[c * ROWS] = q && d < D ? q[d] : 0.0f;
    }
  }
}

/* The same where keys are read from the cache, for the rows of a tile. */
static void place_near(const memory *m, int64_t r, int64_t tile, const float *q, int64_t D) {
  for (int64_t d = 0; d < m->P; d += LANES)
    q3n_v_store(m->q + d * tile + r * LANES, q ? q3n_v_load_some(q3n_v_first(D - d), q + d) : q3n_v_zero());
}

/* Row r's query of a tile. */
static const float *query_of(const q3n_attention_args *a, const q3n_attention_tile *tile, int64_t r) {
  const int64_t group = a->HQ / a->HKV, t = tile->packed + tile->first + r / group, h = tile->hkv * group + r % group;
  return a->q + tile->row * a->q_b + t * a->q_t + h * a->q_h;
}

/* Rows that have seen nothing, and those that only fill their group of `size`: what they give is not looked at. */
static void start(const memory *m, int64_t rows, int64_t size) {
  for (int64_t r = 0; r < rows; r++) {
    m->max[r] = -INFINITY;
    m->sum[r] = 0.0f;
  }
  for (int64_t r = rows; r % size; r++) pass(m, r);
  for (int64_t i = 0; i < (rows + size - 1) / size * size * m->P; i += LANES) q3n_v_store(m->o + i, q3n_v_zero());
}

/* The sums q . k of the rows from `from` on become weights; the block has n keys from j0 on. */
static void weigh_rows(const q3n_attention_args *a, const q3n_attention_tile *tile, const memory *m, int64_t from,
                       int64_t rows, int64_t j0, int64_t n) {
  for (int64_t r = from; r < rows; r++) {
    const int64_t i = tile->first + r / (a->HQ / a->HKV);
    const int64_t visible = q3n_attention_visible_end(a, tile, i) - j0;
    if (visible <= 0)
      pass(m, r);
    else
      weigh(m, r, visible < n ? visible : n, a->scale,
            a->mask ? a->mask + tile->row * a->mask_b + (tile->packed + i) * a->mask_t + j0 : NULL);
  }
}

/* To the rows from `from` on what values that are not finite add, of the keys in `wild`. */
static void add_all_wild(const q3n_attention_args *a, const memory *m, int64_t from, int64_t rows, int64_t v_at,
                         uint64_t wild) {
  for (; wild; wild &= wild - 1) {
    const int64_t j = __builtin_ctzll(wild);
    q3n_row_to_float(a->kv_dtype, row_at(a->v, a->kv_dtype, v_at + j * a->v_s), m->row, a->D);
    add_wild(m, from, rows, j, a->D);
  }
}

/* An item of many rows, by panels. */
static void run_many(const q3n_attention_args *a, const q3n_attention_tile *tile, const memory *m) {
  const int64_t D = a->D, group = a->HQ / a->HKV, rows = tile->queries * group;
  const int64_t slot = a->slot ? a->slot[tile->b] : tile->b;
  for (int64_t r = 0; r < rows; r++) place_query(m, r, query_of(a, tile, r), D);
  for (int64_t r = rows; r % ROWS; r++) place_query(m, r, NULL, D);
  start(m, rows, ROWS);

  const int64_t last = q3n_attention_visible_end(a, tile, tile->first + tile->queries - 1);
  for (int64_t j0 = a->kv_begin; j0 < last; j0 += KEYS) {
    const int64_t n = last - j0 < KEYS ? last - j0 : KEYS;
    /* Visible ends grow with the row: the groups before `from` see nothing of the block. */
    int64_t from = 0;
    for (;; from += ROWS) {
      const int64_t end = from + ROWS < rows ? from + ROWS : rows;
      if (q3n_attention_visible_end(a, tile, tile->first + (end - 1) / group) > j0) break;
    }
    /* While the scores are made the values are fetched, and while the values are added the next block's keys. */
    const int64_t k_at = slot * a->k_slot + j0 * a->k_s + tile->hkv * a->k_h;
    const int64_t v_at = slot * a->v_slot + j0 * a->v_s + tile->hkv * a->v_h;
    const int64_t groups = (rows - from + ROWS - 1) / ROWS, left = last - j0 - n;
    const int64_t steps = q3n_ceil_div(n, PANEL) * (groups * LANES + 2 * m->chunk);
    ahead next = ahead_of(a->v, a->kv_dtype, v_at, a->v_s, n, D, steps);
    for (int64_t j = 0; j < n; j += PANEL) {
      load_keys(a, k_at + j * a->k_s, n - j < PANEL ? n - j : PANEL, m->k, &next);
      for (int64_t r = from; r < rows; r += ROWS)
        scores(rows - r, m->q + r * m->P, m->k, m->chunk, m->p + r * KEYS + j, &next);
    }
    weigh_rows(a, tile, m, from, rows, j0, n);
    uint64_t wild = 0;
    next = ahead_of(a->k, a->kv_dtype, left > 0 ? k_at + n * a->k_s : k_at, a->k_s, left < KEYS ? left : KEYS, D,
                    m->P / PANEL * (groups + q3n_ceil_div(n, 8)));
    for (int64_t d = 0; d < m->P; d += PANEL) {
      wild |= load_values(a, v_at, n, d, m->v, &next);
      for (int64_t r = from; r < rows; r += ROWS) {
        ask(&next);
        values(rows - r, m->p + r * KEYS, m->v, n, m->rescale + r, m->o + r * m->P + d, m->P);
      }
    }
    add_all_wild(a, m, from, rows, v_at, wild);
  }
  for (int64_t r = 0; r < rows; r++) finish(a, tile, m, r);
}

/* The items of `heads` KV heads side by side that have the same few queries, from where the cache lies. Block by block:
   so memory is read as it lies, whole rows of all heads. */
static void run_near(const q3n_attention_args *a, const q3n_attention_tile *first, int64_t heads, const memory *all) {
  const int64_t D = a->D, rows = first->queries * (a->HQ / a->HKV), slot = a->slot ? a->slot[first->b] : first->b;
  q3n_attention_tile tile = *first;
  for (int64_t h = 0; h < heads; h++) {
    const memory m = rows_from(all, h * padded(rows));
    tile.hkv = first->hkv + h;
    for (int64_t from = 0; from < rows; from += FEW) {
      const memory few = rows_from(&m, from);
      const int size = tile_rows(rows - from, FEW);
      for (int64_t r = 0; r < size; r++)
        place_near(&few, r, size, from + r < rows ? query_of(a, &tile, from + r) : NULL, D);
    }
    start(&m, rows, FEW);
  }

  const int64_t last = q3n_attention_visible_end(a, first, first->first + first->queries - 1);
  const int64_t k_first = slot * a->k_slot + first->hkv * a->k_h, v_first = slot * a->v_slot + first->hkv * a->v_h;
  for (int64_t j0 = a->kv_begin; j0 < last; j0 += KEYS) {
    const int64_t n = last - j0 < KEYS ? last - j0 : KEYS, k_at = k_first + j0 * a->k_s, v_at = v_first + j0 * a->v_s;
    int64_t steps = 0;
    for (int64_t from = 0; from < rows; from += FEW) steps += heads * steps_near(rows - from, n, D);
    ahead next = ahead_of(a->v, a->kv_dtype, v_at, a->v_s, n, heads * D, steps);
    for (int64_t h = 0; h < heads; h++)
      for (int64_t from = 0; from < rows; from += FEW) {
        const memory m = rows_from(all, h * padded(rows) + from);
        scores_near(a, &m, rows - from, k_at + h * a->k_h, n, &next);
      }
    /* Behind kv_end too: the next part of a split call begins there. */
    const int64_t left = first->kv_len - j0 - n;
    next = ahead_of(a->k, a->kv_dtype, left > 0 ? k_at + n * a->k_s : k_at, a->k_s, left < KEYS ? left : KEYS,
                    heads * D, heads * q3n_ceil_div(rows, FEW) * q3n_ceil_div(D, WIDE * LANES) * n);
    for (int64_t h = 0; h < heads; h++) {
      tile.hkv = first->hkv + h;
      const memory m = rows_from(all, h * padded(rows));
      weigh_rows(a, &tile, &m, 0, rows, j0, n);
      for (int64_t from = 0; from < rows; from += FEW) {
        const memory few = rows_from(&m, from);
        const int64_t here = rows - from < FEW ? rows - from : FEW, at = v_at + h * a->v_h;
        uint64_t wild = 0;
        for (int64_t d = 0; d < D; d += WIDE * LANES) {
          if (d + WIDE * LANES <= D && values_near(a, &few, here, at, n, d, &next)) continue;
          wild |= load_values(a, at, n, d, m.v, &next);
          values_apart(&few, here, n, d);
        }
        add_all_wild(a, &few, 0, here, at, wild);
      }
    }
  }
  for (int64_t h = 0; h < heads; h++) {
    tile.hkv = first->hkv + h;
    const memory m = rows_from(all, h * padded(rows));
    for (int64_t r = 0; r < rows; r++) finish(a, &tile, &m, r);
  }
}

/* How many items from `item` on run side by side: KV heads that lie side by side, as far as there is memory. */
static int64_t side_by_side(const q3n_attention_args *a, const q3n_attention_tile *tile, int64_t items) {
  if (a->k_h != a->D || a->v_h != a->D) return 1;
  const int64_t heads = a->HKV - tile->hkv < items ? a->HKV - tile->hkv : items;
  const int64_t most = most_rows(a) / padded(tile->queries * (a->HQ / a->HKV));
  return heads < most ? heads : most;
}

static q3n_status run_tiles(const q3n_attention_args *a, int64_t begin, int64_t end, void *scratch) {
  memory m;
  layout(a, scratch, &m);
  for (int64_t item = begin; item < end;) {
    const q3n_attention_tile tile = q3n_attention_tile_at(a, item);
    const int near = tile.queries * (a->HQ / a->HKV) <= (a->kv_dtype == Q3N_Q8_0 ? NEAR / 2 : NEAR);
    const int64_t items = near ? side_by_side(a, &tile, end - item) : 1;
    if (near)
      run_near(a, &tile, items, &m);
    else
      run_many(a, &tile, &m);
    item += items;
  }
  return Q3N_OK;
}

/* o = o rescale + sum_j weight_j x_j for `width` vectors of channels, the last of which has `left` lanes or more; 0
   for o where there is none yet. */
static inline __attribute__((always_inline)) void add_parts(int width, int64_t left, const float *weight,
                                                            const float *const *part, int n, int64_t d, float rescale,
                                                            float *o) {
  q3n_v s[MERGED];
  for (int i = 0; i < width; i++) s[i] = q3n_v_zero();
  for (int j = 0; j < n; j++) {
    const q3n_v w = q3n_v_set(weight[j]);
    for (int i = 0; i < width; i++)
      s[i] = q3n_v_fma(w, q3n_v_load_upto(part[j] + d + LANES * i, left - LANES * i), s[i]);
  }
  for (int i = 0; i < width; i++) {
    const q3n_v old = q3n_v_load_upto(o + d + LANES * i, left - LANES * i);
    q3n_v_store_upto(o + d + LANES * i, left - LANES * i, q3n_v_fma(old, q3n_v_set(rescale), s[i]));
  }
}

/* A part is to the merge what a key is to attention: its lse the score, its o the value, which is not read where lse is
   -inf. Parts go in blocks of KEYS. */
static q3n_status run_merge(const q3n_attention_merge_args *a, int64_t begin, int64_t end) {
  const int64_t rows = a->T * a->HQ;
  for (int64_t item = begin; item < end; item++) {
    const int64_t t = item / a->HQ, h = item % a->HQ;
    float *o = a->o + t * a->o_t + h * a->o_h;
    float max = -INFINITY, sum = 0.0f;
    memset(o, 0, (size_t)a->D * sizeof *o);
    for (int64_t p0 = 0; p0 < a->parts; p0 += KEYS) {
      const float *part[KEYS];
      float weight[KEYS];
      const float old = max;
      int n = 0;
      for (int64_t p = p0; p < a->parts && p < p0 + KEYS; p++) {
        const float lse = a->part_lse[p * rows + item];
        if (lse == -INFINITY) continue;
        /* A NaN is left out of the maximum, but its weight is NaN. */
        if (lse > max) max = lse;
        part[n] = a->part_o + (p * rows + item) * a->D;
        weight[n++] = lse;
      }
      if (n == 0) continue;
      const float rescale = max == old ? 1.0f : old == -INFINITY ? 0.0f : expf(old - max);
      q3n_v total = q3n_v_zero();
      for (int j = 0; j < n; j += LANES) {
        const q3n_v_mask lanes = q3n_v_first(n - j);
        const q3n_v x = q3n_v_exp(q3n_v_sub(q3n_v_load_upto(weight + j, n - j), q3n_v_set(max)));
        total = q3n_v_add(total, q3n_v_select(lanes, x, q3n_v_zero()));
        q3n_v_store_upto(weight + j, n - j, x);
      }
      sum = sum * rescale + q3n_v_sum(total);
      int64_t d = 0;
      for (; d + MERGED * LANES <= a->D; d += MERGED * LANES)
        add_parts(MERGED, MERGED * LANES, weight, part, n, d, rescale, o);
      for (; d < a->D; d += LANES) add_parts(1, a->D - d, weight, part, n, d, rescale, o);
    }
    const float rescale = a->sinks ? add_sink(a->sinks[h], &max, &sum) : 1.0f;
    const float lse = divide(o, rescale, max, sum, a->gate ? a->gate + t * a->gate_t + h * a->gate_h : NULL, o, a->D);
    if (a->lse) a->lse[t * a->lse_t + h] = lse;
  }
  return Q3N_OK;
}
