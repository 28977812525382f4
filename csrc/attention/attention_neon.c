/* Online softmax over blocks of keys, four rows of a tile at a time: a block is converted once, met by pairs of rows in
   the dot products and by all four in the sum of values. What a row does with a block depends on that row alone. */
#include <math.h>

#include "../base/check.h"
#include "../quant/quant_blocks.h"
#include "../simd/neon.h"
#include "attention_tile.h"

q3n_status q3n_attention_neon(const q3n_attention_args *a, int64_t begin, int64_t end, void *scratch);

enum { KEYS = Q3N_ATTENTION_KEYS, ROWS = 4 };

static void f16_row(const uint16_t *from, float *to, int64_t D) {
  int64_t d = 0;
  for (; d + 8 <= D; d += 8) {
    const float16x8_t x = vreinterpretq_f16_u16(vld1q_u16(from + d));
    vst1q_f32(to + d, vcvt_f32_f16(vget_low_f16(x)));
    vst1q_f32(to + d + 4, vcvt_high_f32_f16(x));
  }
  for (; d < D; d++) to[d] = q3n_f16_to_f32(from[d]);
}

static void bf16_row(const uint16_t *from, float *to, int64_t D) {
  int64_t d = 0;
  for (; d + 8 <= D; d += 8) {
    const uint16x8_t x = vld1q_u16(from + d);
    vst1q_f32(to + d, vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(x), 16)));
    vst1q_f32(to + d + 4, vreinterpretq_f32_u32(vshll_high_n_u16(x, 16)));
  }
  for (; d < D; d++) to[d] = q3n_bf16_to_f32(from[d]);
}

static void q8_0_row(const q3n_block_q8_0 *from, float *to, int64_t D) {
  for (int64_t i = 0; i < D / 32; i++) {
    const float scale = q3n_block_f16(from[i].d);
    for (int part = 0; part < 4; part++) {
      const int16x8_t x = vmovl_s8(vld1_s8(from[i].q + 8 * part));
      float *y = to + 32 * i + 8 * part;
      vst1q_f32(y, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(x))), scale));
      vst1q_f32(y + 4, vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(x)), scale));
    }
  }
}

/* As q3n_attention_rows: n keys of a cache as rows of float, in `block` unless the cache is f32. */
static const float *cache_rows(const void *cache, q3n_dtype dtype, int64_t offset, int64_t stride, int64_t n, int64_t D,
                               float *block, int64_t *row) {
  *row = dtype == Q3N_F32 ? stride : D;
  if (dtype == Q3N_F32) return (const float *)cache + offset;
  for (int64_t j = 0; j < n; j++) {
    const int64_t at = offset + j * stride;
    if (dtype == Q3N_F16)
      f16_row((const uint16_t *)cache + at, block + j * D, D);
    else if (dtype == Q3N_BF16)
      bf16_row((const uint16_t *)cache + at, block + j * D, D);
    else
      q8_0_row((const q3n_block_q8_0 *)cache + at / 32, block + j * D, D);
  }
  return block;
}

/* Products of two queries and four keys from d on, added to even or odd sums. */
static inline void add_products(float32x4_t sum[2][4][2], int p, const float *const query[2], const float *const key[4],
                                int64_t d, int64_t D) {
  float32x4_t q[2], k[4];
  for (int i = 0; i < 2; i++) q[i] = q3n_load_upto(query[i], d, D);
  for (int j = 0; j < 4; j++) k[j] = q3n_load_upto(key[j], d, D);
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 4; j++) sum[i][j][p] = vfmaq_f32(sum[i][j][p], q[i], k[j]);
}

/* q . k of two queries and four keys: eight partial sums each, the same for every place in the tile. */
static inline void dots(const float *const query[2], const float *const key[4], int64_t D, float32x4_t score[2]) {
  float32x4_t sum[2][4][2];
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 4; j++)
      for (int p = 0; p < 2; p++) sum[i][j][p] = vdupq_n_f32(0.0f);
  int64_t d = 0;
  for (; d + 8 <= D; d += 8) {
    add_products(sum, 0, query, key, d, d + 4);
    add_products(sum, 1, query, key, d + 4, d + 8);
  }
  if (d < D) add_products(sum, 0, query, key, d, D);
  if (d + 4 < D) add_products(sum, 1, query, key, d + 4, D);
  for (int i = 0; i < 2; i++)
    score[i] = q3n_sum4x4(vaddq_f32(sum[i][0][0], sum[i][0][1]), vaddq_f32(sum[i][1][0], sum[i][1][1]),
                          vaddq_f32(sum[i][2][0], sum[i][2][1]), vaddq_f32(sum[i][3][0], sum[i][3][1]));
}

/* One row of the tile. Nothing seen yet: -inf, 0, 0. */
typedef struct {
  const float *q, *mask; /* mask at the first key of the cache, or NULL */
  float *o, *max, *sum;
  int64_t end;           /* one past the last key it may see */
} row_state;

/* A row's part in one block. */
typedef struct {
  int seen, key[KEYS];
  float weight[KEYS], rescale;
} block_weights;

/* Scores of n <= KEYS keys from j0 on become weights, and the row's maximum and sum move on. Hidden keys, whose score
   is -inf, are left out: their values are not read. */
static void weigh(const row_state *row, float *score, int64_t j0, int64_t n, float scale, block_weights *w) {
  const float32x4_t hidden = vdupq_n_f32(-INFINITY);
  const int64_t visible = row->end - j0 < n ? row->end - j0 : n;
  w->seen = 0;
  if (visible <= 0) return;
  for (int64_t j = visible; j < KEYS; j++) score[j] = -INFINITY;
  const int64_t whole = visible - visible % 4;
  float32x4_t most = hidden;
  for (int64_t j = 0; j < KEYS; j += 4) {
    float32x4_t s = vld1q_f32(score + j);
    if (j < whole || (j < visible && !row->mask)) {
      s = vmulq_n_f32(s, scale);
      if (row->mask) {
        /* The dot with a key whose mask is -inf may be NaN: it counts as hidden. */
        const float32x4_t m = vld1q_f32(row->mask + j0 + j);
        s = vbslq_f32(vceqq_f32(m, hidden), hidden, vaddq_f32(s, m));
      }
      vst1q_f32(score + j, s);
    } else if (j < visible) {
      for (int64_t i = j; i < visible; i++) {
        const float m = row->mask[j0 + i];
        score[i] = m == -INFINITY ? m : score[i] * scale + m;
      }
      s = vld1q_f32(score + j);
    }
    /* A NaN score is left out of the maximum, and makes the sum NaN for good. */
    most = vmaxnmq_f32(most, s);
  }
  for (int j = 0; j < (int)visible; j++)
    if (score[j] != -INFINITY) w->key[w->seen++] = j;
  if (!w->seen) return;

  /* From -inf on there is nothing to rescale, and -inf - -inf is never formed. */
  const float old = *row->max, score_max = vmaxnmvq_f32(most);
  w->rescale = 1.0f;
  if (score_max > old) {
    *row->max = score_max;
    w->rescale = old == -INFINITY ? 0.0f : expf(old - score_max);
  }
  const float32x4_t max = vdupq_n_f32(*row->max);
  float32x4_t sum[2] = {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)};
  for (int j = 0; j < KEYS; j += 4) {
    const float32x4_t s = vld1q_f32(score + j);
    const uint32x4_t out = vceqq_f32(s, hidden);
    const float32x4_t e = q3n_exp4(vsubq_f32(s, max));
    const float32x4_t p = vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(e), out));
    sum[j / 4 % 2] = vaddq_f32(sum[j / 4 % 2], p);
    vst1q_f32(score + j, p);
  }
  *row->sum = *row->sum * w->rescale + vaddvq_f32(vaddq_f32(sum[0], sum[1]));
  for (int i = 0; i < w->seen; i++) w->weight[i] = score[w->key[i]];
}

/* o = o rescale + sum_j weight_j v_j for one row. The block's sum is made apart: over S keys it takes KEYS + S / KEYS
   roundings instead of S. */
static void add_values(const row_state *row, const block_weights *w, const float *v, int64_t v_row, int64_t D) {
  int64_t d = 0;
  for (; d + 16 <= D; d += 16) {
    float32x4_t part[4];
    for (int i = 0; i < 4; i++) part[i] = vdupq_n_f32(0.0f);
    for (int j = 0; j < w->seen; j++)
      for (int i = 0; i < 4; i++)
        part[i] = vfmaq_n_f32(part[i], vld1q_f32(v + w->key[j] * v_row + d + 4 * i), w->weight[j]);
    for (int i = 0; i < 4; i++)
      vst1q_f32(row->o + d + 4 * i, vfmaq_n_f32(part[i], vld1q_f32(row->o + d + 4 * i), w->rescale));
  }
  for (; d < D; d += 4) {
    float32x4_t part = vdupq_n_f32(0.0f);
    for (int j = 0; j < w->seen; j++)
      part = vfmaq_n_f32(part, q3n_load_upto(v + w->key[j] * v_row, d, D), w->weight[j]);
    q3n_store_upto(row->o, d, D, vfmaq_n_f32(part, q3n_load_upto(row->o, d, D), w->rescale));
  }
}

/* The same sums for four rows that see all n keys, D a multiple of 16: a value is loaded once for all of them. */
static void add_values4(const row_state *row, const block_weights *w, const float *v, int64_t v_row, int64_t n,
                        int64_t D) {
  for (int64_t d = 0; d < D; d += 16) {
    float32x4_t part[ROWS][4];
    for (int r = 0; r < ROWS; r++)
      for (int i = 0; i < 4; i++) part[r][i] = vdupq_n_f32(0.0f);
    for (int64_t j = 0; j < n; j++) {
      float32x4_t value[4];
      for (int i = 0; i < 4; i++) value[i] = vld1q_f32(v + j * v_row + d + 4 * i);
      for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < 4; i++) part[r][i] = vfmaq_n_f32(part[r][i], value[i], w[r].weight[j]);
    }
    for (int r = 0; r < ROWS; r++)
      for (int i = 0; i < 4; i++) {
        float *o = row[r].o + d + 4 * i;
        vst1q_f32(o, vfmaq_n_f32(part[r][i], vld1q_f32(o), w[r].rescale));
      }
  }
}

/* Up to four rows over the n keys from j0 on. */
static void add_block(const q3n_attention_args *a, const row_state *row, int rows, int64_t j0, int64_t n,
                      const float *k, int64_t k_row, const float *v, int64_t v_row) {
  float score[ROWS][KEYS];
  for (int64_t j = 0; j < n; j += 4)
    for (int r = 0; r < rows; r += 2) {
      /* Pairs and fours are filled up with the last row and the last key. */
      const int other = r + 1 < rows ? r + 1 : r;
      const float *query[2] = {row[r].q, row[other].q}, *key[4];
      for (int i = 0; i < 4; i++) key[i] = k + (j + i < n ? j + i : n - 1) * k_row;
      float32x4_t pair[2];
      dots(query, key, a->D, pair);
      vst1q_f32(score[r] + j, pair[0]);
      if (other > r) vst1q_f32(score[other] + j, pair[1]);
    }
  block_weights w[ROWS];
  int all = rows == ROWS && a->D % 16 == 0;
  for (int r = 0; r < rows; r++) {
    weigh(row + r, score[r], j0, n, a->scale, w + r);
    all = all && w[r].seen == n;
  }
  if (all)
    add_values4(row, w, v, v_row, n, a->D);
  else
    for (int r = 0; r < rows; r++)
      if (w[r].seen) add_values(row + r, w + r, v, v_row, a->D);
}

/* The sink, the division, the gate. `sink` is NULL where the head has none. */
static void finish(const row_state *row, const float *sink, const float *gate, float *o, float *lse, int64_t D) {
  float rescale = 1.0f, max = *row->max, sum = *row->sum;
  if (sink && *sink != -INFINITY) {
    if (*sink > max) {
      rescale = max == -INFINITY ? 0.0f : expf(max - *sink);
      max = *sink;
    }
    sum = sum * rescale + expf(*sink - max);
  }
  const int empty = sum == 0.0f;
  const float32x4_t one = vdupq_n_f32(1.0f);
  for (int64_t d = 0; d < D; d += 4) {
    float32x4_t x = vdupq_n_f32(0.0f);
    if (!empty) x = vdivq_f32(vmulq_n_f32(q3n_load_upto(row->o, d, D), rescale), vdupq_n_f32(sum));
    if (gate) x = vmulq_f32(x, vdivq_f32(one, vaddq_f32(one, q3n_exp4(vnegq_f32(q3n_load_upto(gate, d, D))))));
    q3n_store_upto(o, d, D, x);
  }
  if (lse) *lse = empty ? -INFINITY : max + logf(sum);
}

q3n_status q3n_attention_neon(const q3n_attention_args *a, int64_t begin, int64_t end, void *scratch) {
  const int64_t D = a->D, group = a->HQ / a->HKV;
  const int64_t most = (a->T < Q3N_ATTENTION_QUERIES ? a->T : Q3N_ATTENTION_QUERIES) * group;
  char *memory = scratch;
  float *o = (float *)memory;
  float *max = (float *)(memory += q3n_align(most * D * 4));
  float *sum = (float *)(memory += q3n_align(most * 4));
  float *k_block = (float *)(memory += q3n_align(most * 4));
  float *v_block = (float *)(memory += q3n_align(KEYS * D * 4));

  for (int64_t item = begin; item < end; item++) {
    const q3n_attention_tile tile = q3n_attention_tile_at(a, item);
    const int64_t rows = tile.queries * group, slot = a->slot ? a->slot[tile.b] : tile.b;
    for (int64_t r = 0; r < rows; r++) {
      max[r] = -INFINITY;
      sum[r] = 0.0f;
    }
    for (int64_t i = 0; i < rows * D; i++) o[i] = 0.0f;

    const int64_t last = q3n_attention_visible_end(a, &tile, tile.first + tile.queries - 1);
    for (int64_t j0 = a->kv_begin; j0 < last; j0 += KEYS) {
      const int64_t n = last - j0 < KEYS ? last - j0 : KEYS;
      int64_t k_row, v_row;
      const float *k = cache_rows(a->k, a->kv_dtype, slot * a->k_slot + j0 * a->k_s + tile.hkv * a->k_h, a->k_s, n, D,
                                  k_block, &k_row);
      const float *v = cache_rows(a->v, a->kv_dtype, slot * a->v_slot + j0 * a->v_s + tile.hkv * a->v_h, a->v_s, n, D,
                                  v_block, &v_row);
      for (int64_t r0 = 0; r0 < rows; r0 += ROWS) {
        row_state row[ROWS];
        const int count = rows - r0 < ROWS ? (int)(rows - r0) : ROWS;
        for (int r = 0; r < count; r++) {
          const int64_t i = tile.first + (r0 + r) / group, t = tile.packed + i, h = tile.hkv * group + (r0 + r) % group;
          row[r] = (row_state){.q = a->q + tile.row * a->q_b + t * a->q_t + h * a->q_h,
                               .mask = a->mask ? a->mask + tile.row * a->mask_b + t * a->mask_t : NULL,
                               .o = o + (r0 + r) * D, .max = max + r0 + r, .sum = sum + r0 + r,
                               .end = q3n_attention_visible_end(a, &tile, i)};
        }
        add_block(a, row, count, j0, n, k, k_row, v, v_row);
      }
    }

    for (int64_t r = 0; r < rows; r++) {
      const int64_t t = tile.packed + tile.first + r / group, h = tile.hkv * group + r % group;
      const row_state row = {.o = o + r * D, .max = max + r, .sum = sum + r};
      finish(&row, a->sinks ? a->sinks + h : NULL,
             a->gate ? a->gate + tile.row * a->gate_b + t * a->gate_t + h * a->gate_h : NULL,
             a->o + tile.row * a->o_b + t * a->o_t + h * a->o_h,
             a->lse ? a->lse + tile.row * a->lse_b + t * a->lse_t + h : NULL, D);
    }
  }
  return Q3N_OK;
}
