/* Online softmax over blocks of keys, by register tiles. The rows of an item (its queries times the heads of its KV
   head) go in groups of 4. A panel of 16 keys is transposed once and met by all groups, and so is a panel of 16
   channels of 64 values.

     scores   4 rows x 16 keys      sums over channels, by chunks of them
     values   4 rows x 16 channels  sums over the block's keys

   What a row does with a block does not depend on the other rows: keys that it does not see have weight 0, and a value
   that is not finite is 0 in the panel and is added afterwards to the rows that see it. */
#include <math.h>

#include "../base/check.h"
#include "../quant/quant_blocks.h"
#include "../simd/exp_avx2.h"
#include "attention_tile.h"

q3n_status q3n_attention_tile_avx2(const q3n_attention_args *a, int64_t begin, int64_t end, void *scratch);

enum { ROWS = 4, LANES = 8, PANEL = 16 /* keys or channels */, KEYS = 64 };

/* Scratch of an item. Rows are padded to groups, channels to panels. */
typedef struct memory {
  int64_t P;        /* D rounded up to panels */
  float *q;         /* [groups][D][ROWS] */
  float *o;         /* [rows][P]: sum exp(s_j - max) v_j */
  float *max, *sum; /* [rows]: the largest score so far, sum exp(s_j - max) */
  float *rescale;   /* [rows]: what the block multiplies o by */
  float *p;         /* [rows][KEYS]: the block's sums q . k_j, then its weights */
  uint64_t *seen;   /* [rows]: the keys of the block whose score is not -inf */
  float *k;         /* [D][PANEL] */
  float *v;         /* [KEYS][PANEL] */
  float *row;       /* [P]: one value as it lies in the cache */
} memory;

static int64_t padded_rows(const q3n_attention_args *a) {
  const int64_t queries = a->T < Q3N_ATTENTION_QUERIES ? a->T : Q3N_ATTENTION_QUERIES;
  return (queries * (a->HQ / a->HKV) + ROWS - 1) / ROWS * ROWS;
}

/* Lays the parts out from `at` on, and returns their bytes. */
static int64_t layout(const q3n_attention_args *a, char *at, memory *m) {
  const int64_t rows = padded_rows(a), P = (a->D + PANEL - 1) / PANEL * PANEL;
  const int64_t size[] = {rows * a->D, rows * P, rows,         rows,     rows,
                          rows * KEYS, 2 * rows, a->D * PANEL, KEYS * PANEL, P};
  int64_t offset[10], bytes = 0;
  for (int i = 0; i < 10; i++) {
    offset[i] = bytes;
    bytes += q3n_align(size[i] * 4);
  }
  if (m)
    *m = (memory){P,
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

int64_t q3n_attention_avx2_scratch(const q3n_attention_args *a) {
  if (a->B == 0 || a->HQ == 0 || a->T == 0) return 0; /* an empty o bounds no size */
  return layout(a, NULL, NULL);
}

/* Eight lanes in a fixed order. */
static inline float sum8(__m256 x) {
  __m128 z = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  z = _mm_add_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}

static inline float max8(__m256 x) {
  __m128 z = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  z = _mm_max_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}

/* All bits set in the first n lanes. */
static inline __m256i first8(int64_t n) {
  const int lanes = n < 0 ? 0 : n < LANES ? (int)n : LANES;
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* Elements d .. d + 7 of a row of the cache, of which there are `left`, the others 0. */
static inline __attribute__((always_inline)) __m256 load8(q3n_dtype dtype, const void *row, int64_t d, int64_t left) {
  if (dtype == Q3N_F32) {
    if (left >= LANES) return _mm256_loadu_ps((const float *)row + d);
    return left > 0 ? _mm256_maskload_ps((const float *)row + d, first8(left)) : _mm256_setzero_ps();
  }
  if (dtype == Q3N_F16 || dtype == Q3N_BF16) {
    __m128i half = _mm_setzero_si128();
    if (left >= LANES)
      half = _mm_loadu_si128((const __m128i *)(const void *)((const uint16_t *)row + d));
    else if (left > 0) {
      uint16_t some[LANES] = {0};
      memcpy(some, (const uint16_t *)row + d, (size_t)left * 2);
      half = _mm_loadu_si128((const __m128i *)(const void *)some);
    }
    if (dtype == Q3N_F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  if (left <= 0) return _mm256_setzero_ps();
  const q3n_block_q8_0 *block = (const q3n_block_q8_0 *)row + d / 32;
  const __m128i q = _mm_loadl_epi64((const __m128i *)(const void *)(block->q + d % 32));
  const __m128 scale = _mm_cvtph_ps(_mm_cvtsi32_si128(q3n_load_u16(block->d)));
  return _mm256_mul_ps(_mm256_broadcastss_ps(scale), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)));
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
  const char *at, *past; /* the rest of the row */
  int64_t bytes, stride; /* of a row, between rows */
  int64_t rows;          /* that begin after this one */
  int64_t lines;         /* asked for a step, so that the steps are enough for all */
} ahead;

static ahead ahead_of(const void *cache, q3n_dtype dtype, int64_t at, int64_t stride, int64_t rows, int64_t D,
                      int64_t steps) {
  const char *row = row_at(cache, dtype, at);
  const int64_t bytes = (const char *)row_at(row, dtype, D) - row;
  const int64_t lines = rows * q3n_ceil_div(bytes, 64);
  return (ahead){row, rows > 0 ? row + bytes : row, bytes, (const char *)row_at(row, dtype, stride) - row,
                 rows - 1, q3n_ceil_div(lines, steps)};
}

/* Inlined, because gcc drops a call that does nothing but ask. */
static inline __attribute__((always_inline)) void ask(ahead *x) {
  for (int64_t i = 0; i < x->lines; i++) {
    if (x->at >= x->past) {
      if (x->rows <= 0) return;
      x->rows--;
      x->at = x->past - x->bytes + x->stride;
      x->past = x->at + x->bytes;
    }
    _mm_prefetch(x->at, _MM_HINT_T0);
    x->at += 64;
  }
}

/* 8 x 8, rows become columns. */
static inline __attribute__((always_inline)) void transpose8(__m256 x[LANES]) {
  __m256 y[LANES];
  for (int i = 0; i < LANES; i += 2) {
    y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < LANES; i += 4)
    for (int j = 0; j < 2; j++) {
      const __m256d low = _mm256_castps_pd(y[i + j]), high = _mm256_castps_pd(y[i + j + 2]);
      x[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
      x[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
    }
  for (int i = 0; i < 4; i++) {
    y[i] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x20);
    y[i + 4] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
  }
  for (int i = 0; i < LANES; i++) x[i] = y[i];
}

/* n <= PANEL keys, `at` elements into the cache and `stride` apart, as k[channel][key]; missing keys are 0. */
static inline __attribute__((always_inline)) void load_keys_of(q3n_dtype dtype, const void *cache, int64_t at,
                                                               int64_t stride, int64_t n, int64_t D, float *k) {
  for (int64_t half = 0; half < PANEL; half += LANES) {
    const void *row[LANES];
    for (int64_t i = 0; i < LANES; i++)
      row[i] = row_at(cache, dtype, at + (half + i < n ? half + i : 0) * stride);
    for (int64_t d = 0; d < D; d += LANES) {
      __m256 x[LANES];
      for (int i = 0; i < LANES; i++) x[i] = load8(dtype, row[i], d, D - d);
      if (half + LANES > n)
        for (int i = 0; i < LANES; i++) x[i] = half + i < n ? x[i] : _mm256_setzero_ps();
      transpose8(x);
      if (D - d >= LANES) {
        for (int i = 0; i < LANES; i++) _mm256_store_ps(k + (d + i) * PANEL + half, x[i]);
      } else {
        for (int i = 0; i < D - d; i++) _mm256_store_ps(k + (d + i) * PANEL + half, x[i]);
      }
    }
  }
}

/* A panel of n <= KEYS values, channels d .. d + PANEL, as v[key][channel]. What is not finite is 0 there; returns the
   keys that hold such. */
static inline __attribute__((always_inline)) uint64_t load_values_of(q3n_dtype dtype, const void *cache, int64_t at,
                                                                     int64_t stride, int64_t n, int64_t D, int64_t d,
                                                                     float *v) {
  const __m256 infinity = _mm256_set1_ps(INFINITY), sign = _mm256_set1_ps(-0.0f);
  uint64_t wild = 0;
  for (int64_t j = 0; j < n; j++) {
    const void *row = row_at(cache, dtype, at + j * stride);
    int all = 0xff;
    for (int i = 0; i < 2; i++) {
      const __m256 x = load8(dtype, row, d + LANES * i, D - d - LANES * i);
      const __m256 finite = _mm256_cmp_ps(_mm256_andnot_ps(sign, x), infinity, _CMP_LT_OQ);
      _mm256_store_ps(v + j * PANEL + LANES * i, _mm256_and_ps(finite, x));
      all &= _mm256_movemask_ps(finite);
    }
    wild |= (uint64_t)(all != 0xff) << j;
  }
  return wild;
}

static void load_keys(const q3n_attention_args *a, int64_t at, int64_t n, float *k) {
  switch (a->kv_dtype) {
    case Q3N_F16: load_keys_of(Q3N_F16, a->k, at, a->k_s, n, a->D, k); return;
    case Q3N_BF16: load_keys_of(Q3N_BF16, a->k, at, a->k_s, n, a->D, k); return;
    case Q3N_Q8_0: load_keys_of(Q3N_Q8_0, a->k, at, a->k_s, n, a->D, k); return;
    default: load_keys_of(Q3N_F32, a->k, at, a->k_s, n, a->D, k); return;
  }
}

static uint64_t load_values(const q3n_attention_args *a, int64_t at, int64_t n, int64_t d, float *v) {
  switch (a->kv_dtype) {
    case Q3N_F16: return load_values_of(Q3N_F16, a->v, at, a->v_s, n, a->D, d, v);
    case Q3N_BF16: return load_values_of(Q3N_BF16, a->v, at, a->v_s, n, a->D, d, v);
    case Q3N_Q8_0: return load_values_of(Q3N_Q8_0, a->v, at, a->v_s, n, a->D, d, v);
    default: return load_values_of(Q3N_F32, a->v, at, a->v_s, n, a->D, d, v);
  }
}

/* Channels summed one after the other. Sums of chunks go into two totals, so that a score takes chunk + D / chunk / 2
   roundings, never more than D / 8 + 6 with scale and mask. */
static int64_t chunk_of(int64_t D) { return D < 64 ? 4 : D < 128 ? 8 : 16; }

/* q . k for `rows` rows of a group and a panel of keys. */
static inline __attribute__((always_inline)) void scores_of(int rows, const float *q, const float *k, int64_t D,
                                                            float *p, ahead *next) {
  float total[2][ROWS][PANEL] __attribute__((aligned(64)));
  const int64_t chunk = chunk_of(D);
  int64_t d = 0;
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < 2 * 2; i++) _mm256_store_ps(&total[i / 2][r][LANES * (i % 2)], _mm256_setzero_ps());
  for (int64_t c = 0; d < D; c++) {
    const int64_t end = D - d < chunk ? D : d + chunk;
    __m256 s[ROWS][2];
    for (int r = 0; r < rows; r++) s[r][0] = s[r][1] = _mm256_setzero_ps();
    ask(next);
    for (; d < end; d++) {
      const __m256 k0 = _mm256_load_ps(k + d * PANEL), k1 = _mm256_load_ps(k + d * PANEL + LANES);
      for (int r = 0; r < rows; r++) {
        const __m256 qr = _mm256_set1_ps(q[d * ROWS + r]);
        s[r][0] = _mm256_fmadd_ps(qr, k0, s[r][0]);
        s[r][1] = _mm256_fmadd_ps(qr, k1, s[r][1]);
      }
    }
    for (int r = 0; r < rows; r++)
      for (int i = 0; i < 2; i++) {
        float *to = &total[c % 2][r][LANES * i];
        _mm256_store_ps(to, _mm256_add_ps(_mm256_load_ps(to), s[r][i]));
      }
  }
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < 2; i++) {
      const __m256 even = _mm256_load_ps(&total[0][r][LANES * i]), odd = _mm256_load_ps(&total[1][r][LANES * i]);
      _mm256_store_ps(p + r * KEYS + LANES * i, _mm256_add_ps(even, odd));
    }
}

/* o = o rescale + sum_j p_j v_j for `rows` rows of a group and a panel of channels. The block's sum is made apart: over
   S keys it takes KEYS + S / KEYS roundings instead of S. */
static inline __attribute__((always_inline)) void values_of(int rows, const float *p, const float *v, int64_t n,
                                                            const float *rescale, float *o, int64_t P) {
  __m256 s[ROWS][2];
  for (int r = 0; r < rows; r++) s[r][0] = s[r][1] = _mm256_setzero_ps();
  for (int64_t j = 0; j < n; j++) {
    const __m256 v0 = _mm256_load_ps(v + j * PANEL), v1 = _mm256_load_ps(v + j * PANEL + LANES);
    for (int r = 0; r < rows; r++) {
      const __m256 pr = _mm256_set1_ps(p[r * KEYS + j]);
      s[r][0] = _mm256_fmadd_ps(pr, v0, s[r][0]);
      s[r][1] = _mm256_fmadd_ps(pr, v1, s[r][1]);
    }
  }
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < 2; i++) {
      float *to = o + r * P + LANES * i;
      _mm256_store_ps(to, _mm256_fmadd_ps(_mm256_load_ps(to), _mm256_set1_ps(rescale[r]), s[r][i]));
    }
}

static void scores(int64_t rows, const float *q, const float *k, int64_t D, float *p, ahead *next) {
  if (rows > 2) scores_of(4, q, k, D, p, next);
  else if (rows > 1) scores_of(2, q, k, D, p, next);
  else scores_of(1, q, k, D, p, next);
}

static void values(int64_t rows, const float *p, const float *v, int64_t n, const float *rescale, float *o, int64_t P) {
  if (rows > 2) values_of(4, p, v, n, rescale, o, P);
  else if (rows > 1) values_of(2, p, v, n, rescale, o, P);
  else values_of(1, p, v, n, rescale, o, P);
}

/* Row r's sums q . k of a block become weights; it sees the first `visible` keys, of which -inf in `mask` hides
   some. */
static void weigh(const memory *m, int64_t r, int64_t visible, float scale, const float *mask) {
  float *p = m->p + r * KEYS;
  const __m256 hidden = _mm256_set1_ps(-INFINITY);
  __m256 s[KEYS / LANES], seen[KEYS / LANES], largest = hidden;
  for (int i = 0; i < KEYS / LANES; i++) {
    const __m256i lanes = first8(visible - LANES * i);
    const __m256 bias = mask ? _mm256_maskload_ps(mask + LANES * i, lanes) : _mm256_setzero_ps();
    s[i] = _mm256_fmadd_ps(_mm256_maskload_ps(p + LANES * i, lanes), _mm256_set1_ps(scale), bias);
    /* The key of a masked score may be NaN; a NaN score counts as seen. */
    seen[i] = _mm256_and_ps(_mm256_castsi256_ps(lanes), _mm256_cmp_ps(bias, hidden, _CMP_NEQ_UQ));
    s[i] = _mm256_blendv_ps(hidden, s[i], seen[i]);
    seen[i] = _mm256_cmp_ps(s[i], hidden, _CMP_NEQ_UQ);
    largest = _mm256_max_ps(s[i], largest); /* the second operand where the first is NaN */
  }
  /* From -inf on there is nothing to rescale, and -inf - -inf is formed only for keys that are not seen. */
  const float old = m->max[r], block = max8(largest), max = block > old ? block : old;
  m->max[r] = max;
  m->rescale[r] = max == old ? 1.0f : old == -INFINITY ? 0.0f : expf(old - max);
  __m256 sum = _mm256_setzero_ps();
  uint64_t keys = 0;
  for (int i = 0; i < KEYS / LANES; i++) {
    const __m256 weight = q3n_exp8_negative(seen[i], _mm256_sub_ps(s[i], _mm256_set1_ps(max)));
    _mm256_store_ps(p + LANES * i, weight);
    sum = _mm256_add_ps(sum, weight);
    keys |= (uint64_t)_mm256_movemask_ps(seen[i]) << LANES * i;
  }
  m->seen[r] = keys;
  m->sum[r] = m->sum[r] * m->rescale[r] + sum8(sum);
}

/* A row that sees nothing of a block. */
static void pass(const memory *m, int64_t r) {
  for (int i = 0; i < KEYS; i += LANES) _mm256_store_ps(m->p + r * KEYS + i, _mm256_setzero_ps());
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

/* The sink, the division, the gate. */
static void finish(const q3n_attention_args *a, const q3n_attention_tile *tile, const memory *m, int64_t r) {
  const int64_t group = a->HQ / a->HKV, t = tile->packed + tile->first + r / group, h = tile->hkv * group + r % group;
  const float *gate = a->gate ? a->gate + tile->row * a->gate_b + t * a->gate_t + h * a->gate_h : NULL;
  float *o = a->o + tile->row * a->o_b + t * a->o_t + h * a->o_h;
  float max = m->max[r], sum = m->sum[r], rescale = 1.0f;
  if (a->sinks && a->sinks[h] != -INFINITY) {
    const float old = max, sink = a->sinks[h];
    if (sink > old) max = sink;
    rescale = max == old ? 1.0f : old == -INFINITY ? 0.0f : expf(old - max);
    sum = sum * rescale + expf(sink - max);
  }
  const int empty = sum == 0.0f;
  for (int64_t d = 0; d < a->D; d += LANES) {
    const __m256i lanes = first8(a->D - d);
    __m256 x = _mm256_mul_ps(_mm256_load_ps(m->o + r * m->P + d), _mm256_set1_ps(rescale));
    /* + 0: a zero's sign would tell of values that the row does not see. */
    x = _mm256_add_ps(_mm256_div_ps(x, _mm256_set1_ps(sum)), _mm256_setzero_ps());
    if (empty) x = _mm256_setzero_ps();
    if (gate) x = _mm256_mul_ps(x, q3n_sigmoid8(_mm256_maskload_ps(gate + d, lanes)));
    _mm256_maskstore_ps(o + d, lanes, x);
  }
  if (a->lse) a->lse[tile->row * a->lse_b + t * a->lse_t + h] = empty ? -INFINITY : max + logf(sum);
}

q3n_status q3n_attention_tile_avx2(const q3n_attention_args *a, int64_t begin, int64_t end, void *scratch) {
  const int64_t D = a->D, group = a->HQ / a->HKV;
  memory m;
  layout(a, scratch, &m);

  for (int64_t item = begin; item < end; item++) {
    const q3n_attention_tile tile = q3n_attention_tile_at(a, item);
    const int64_t rows = tile.queries * group, slot = a->slot ? a->slot[tile.b] : tile.b;
    for (int64_t r = 0; r < rows; r++) {
      const int64_t t = tile.packed + tile.first + r / group, h = tile.hkv * group + r % group;
      const float *q = a->q + tile.row * a->q_b + t * a->q_t + h * a->q_h;
      float *to = m.q + r / ROWS * ROWS * D + r % ROWS;
      for (int64_t d = 0; d < D; d++) to[d * ROWS] = q[d];
      m.max[r] = -INFINITY;
      m.sum[r] = 0.0f;
    }
    /* The last group is computed whole or to a power of two; what its missing rows give is not looked at. */
    for (int64_t r = rows; r % ROWS; r++) {
      for (int64_t d = 0; d < D; d++) m.q[r / ROWS * ROWS * D + d * ROWS + r % ROWS] = 0.0f;
      pass(&m, r);
    }
    for (int64_t i = 0; i < (rows + ROWS - 1) / ROWS * ROWS * m.P; i += LANES)
      _mm256_store_ps(m.o + i, _mm256_setzero_ps());

    const int64_t last = q3n_attention_visible_end(a, &tile, tile.first + tile.queries - 1);
    for (int64_t j0 = a->kv_begin; j0 < last; j0 += KEYS) {
      const int64_t n = last - j0 < KEYS ? last - j0 : KEYS;
      /* Visible ends grow with the row: the groups before `from` see nothing of the block. */
      int64_t from = 0;
      for (;; from += ROWS) {
        const int64_t end = from + ROWS < rows ? from + ROWS : rows;
        if (q3n_attention_visible_end(a, &tile, tile.first + (end - 1) / group) > j0) break;
      }
      /* Spread over the tiles of the scores the values are fetched, over those of the values the next block's keys. */
      const int64_t k_at = slot * a->k_slot + j0 * a->k_s + tile.hkv * a->k_h;
      const int64_t v_at = slot * a->v_slot + j0 * a->v_s + tile.hkv * a->v_h;
      const int64_t groups = (rows - from + ROWS - 1) / ROWS, left = last - j0 - n;
      ahead next = ahead_of(a->v, a->kv_dtype, v_at, a->v_s, n, D,
                            q3n_ceil_div(n, PANEL) * groups * q3n_ceil_div(D, chunk_of(D)));
      for (int64_t j = 0; j < n; j += PANEL) {
        load_keys(a, k_at + j * a->k_s, n - j < PANEL ? n - j : PANEL, m.k);
        for (int64_t r = from; r < rows; r += ROWS) scores(rows - r, m.q + r * D, m.k, D, m.p + r * KEYS + j, &next);
      }
      for (int64_t r = from; r < rows; r++) {
        const int64_t i = tile.first + r / group, t = tile.packed + i;
        const int64_t visible = q3n_attention_visible_end(a, &tile, i) - j0;
        if (visible <= 0)
          pass(&m, r);
        else
          weigh(&m, r, visible < n ? visible : n, a->scale,
                a->mask ? a->mask + tile.row * a->mask_b + t * a->mask_t + j0 : NULL);
      }
      uint64_t wild = 0;
      next = ahead_of(a->k, a->kv_dtype, left > 0 ? k_at + n * a->k_s : k_at, a->k_s, left < KEYS ? left : KEYS, D,
                      m.P / PANEL * groups);
      for (int64_t d = 0; d < m.P; d += PANEL) {
        wild |= load_values(a, v_at, n, d, m.v);
        for (int64_t r = from; r < rows; r += ROWS) {
          ask(&next);
          values(rows - r, m.p + r * KEYS, m.v, n, m.rescale + r, m.o + r * m.P + d, m.P);
        }
      }
      for (uint64_t some = wild; some; some &= some - 1) {
        const int64_t j = __builtin_ctzll(some);
        q3n_row_to_float(a->kv_dtype, row_at(a->v, a->kv_dtype, v_at + j * a->v_s), m.row, D);
        add_wild(&m, from, rows, j, D);
      }
    }
    for (int64_t r = 0; r < rows; r++) finish(a, &tile, &m, r);
  }
  return Q3N_OK;
}
