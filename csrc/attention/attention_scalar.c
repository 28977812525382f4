/* Online softmax over blocks of keys. What a row does with a block depends on that row alone, so one query gives the
   same bits as the same query inside a batch. */
#include <math.h>

#include "../base/check.h"
#include "attention_kv.h"
#include "attention_tile.h"

q3n_status q3n_attention_scalar(const q3n_attention_args *a, int64_t begin, int64_t end, void *scratch);
q3n_status q3n_attention_merge_scalar(const q3n_attention_merge_args *a, int64_t begin, int64_t end, void *scratch);

enum { KEYS = Q3N_ATTENTION_KEYS, LANES = 16 };

/* Sixteen partial sums: the additions do not wait for each other, and rounding errors stay few. */
static float dot(const float *x, const float *y, int64_t n) {
  float part[LANES] = {0.0f};
  int64_t d = 0;
  for (; d + LANES <= n; d += LANES)
    for (int lane = 0; lane < LANES; lane++) part[lane] += x[d + lane] * y[d + lane];
  for (; d < n; d++) part[d % LANES] += x[d] * y[d];
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; lane++) part[lane] += part[lane + half];
  return part[0];
}

/* o = o * rescale + sum_j weight_j v_j. The block's sum is made apart: over S keys it takes KEYS + S / KEYS roundings
   instead of S. */
static void add_values(float *o, float rescale, const float *weight, const int *key, int n, const float *v, int64_t row,
                       int64_t D) {
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES) {
    float part[LANES] = {0.0f};
    for (int j = 0; j < n; j++)
      for (int lane = 0; lane < LANES; lane++) part[lane] += weight[j] * v[key[j] * row + d + lane];
    for (int lane = 0; lane < LANES; lane++) o[d + lane] = o[d + lane] * rescale + part[lane];
  }
  for (; d < D; d++) {
    float part = 0.0f;
    for (int j = 0; j < n; j++) part += weight[j] * v[key[j] * row + d];
    o[d] = o[d] * rescale + part;
  }
}

/* The state of a row's softmax: o is sum exp(s_j - max) v_j, sum is sum exp(s_j - max). Nothing seen: -inf, 0, 0. */
typedef struct {
  float *o, *max, *sum;
} softmax;

/* Moves the maximum up to at least `score`, and returns the factor that what was summed so far takes. From -inf on
   there is nothing to rescale, and -inf - -inf is never formed. */
static float raise_max(softmax row, float score) {
  const float old = *row.max;
  if (!(score > old)) return 1.0f;
  *row.max = score;
  return old == -INFINITY ? 0.0f : expf(old - score);
}

/* One row over n keys, of which those with a score of -inf count as hidden: their values are not read. */
static void add_block(softmax row, const float *score, const float *v, int64_t v_row, int64_t n, int64_t D) {
  int key[KEYS], seen = 0;
  float weight[KEYS], max = -INFINITY, sum = 0.0f;
  for (int j = 0; j < (int)n; j++) {
    if (score[j] == -INFINITY) continue;
    if (score[j] > max) max = score[j];
    key[seen++] = j;
  }
  if (!seen) return;
  /* A NaN score is left out of the maximum, and makes the sum NaN for good. */
  const float rescale = raise_max(row, max);
  for (int j = 0; j < seen; j++) {
    weight[j] = expf(score[key[j]] - *row.max);
    sum += weight[j];
  }
  *row.sum = *row.sum * rescale + sum;
  add_values(row.o, rescale, weight, key, seen, v, v_row, D);
}

/* The sink, the division, the gate. `sink` is NULL where the head has none. */
static void finish(softmax row, const float *sink, const float *gate, float *o, float *lse, int64_t D) {
  float rescale = 1.0f;
  if (sink && *sink != -INFINITY) {
    rescale = raise_max(row, *sink);
    *row.sum = *row.sum * rescale + expf(*sink - *row.max);
  }
  const int empty = *row.sum == 0.0f;
  for (int64_t d = 0; d < D; d++) o[d] = empty ? 0.0f : row.o[d] * rescale / *row.sum;
  if (gate)
    for (int64_t d = 0; d < D; d++) o[d] *= 1.0f / (1.0f + expf(-gate[d]));
  if (lse) *lse = empty ? -INFINITY : *row.max + logf(*row.sum);
}

q3n_status q3n_attention_scalar(const q3n_attention_args *a, int64_t begin, int64_t end, void *scratch) {
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
      const float *k = q3n_attention_rows(a->k, a->kv_dtype, slot * a->k_slot + j0 * a->k_s + tile.hkv * a->k_h, a->k_s,
                                          n, D, k_block, &k_row);
      const float *v = q3n_attention_rows(a->v, a->kv_dtype, slot * a->v_slot + j0 * a->v_s + tile.hkv * a->v_h, a->v_s,
                                          n, D, v_block, &v_row);

      for (int64_t r = 0; r < rows; r++) {
        const int64_t i = tile.first + r / group, t = tile.packed + i, h = tile.hkv * group + r % group;
        const int64_t visible = q3n_attention_visible_end(a, &tile, i) - j0 < n
                                    ? q3n_attention_visible_end(a, &tile, i) - j0
                                    : n;
        if (visible <= 0) continue;
        const float *q = a->q + tile.row * a->q_b + t * a->q_t + h * a->q_h;
        const float *mask = a->mask ? a->mask + tile.row * a->mask_b + t * a->mask_t + j0 : NULL;
        float score[KEYS];
        for (int64_t j = 0; j < visible; j++) {
          /* The key of a masked score is not read: it may hold a NaN. */
          if (mask && mask[j] == -INFINITY)
            score[j] = -INFINITY;
          else
            score[j] = a->scale * dot(q, k + j * k_row, D) + (mask ? mask[j] : 0.0f);
        }
        add_block((softmax){o + r * D, max + r, sum + r}, score, v, v_row, visible, D);
      }
    }

    for (int64_t r = 0; r < rows; r++) {
      const int64_t t = tile.packed + tile.first + r / group, h = tile.hkv * group + r % group;
      finish((softmax){o + r * D, max + r, sum + r}, a->sinks ? a->sinks + h : NULL,
             a->gate ? a->gate + tile.row * a->gate_b + t * a->gate_t + h * a->gate_h : NULL,
             a->o + tile.row * a->o_b + t * a->o_t + h * a->o_h,
             a->lse ? a->lse + tile.row * a->lse_b + t * a->lse_t + h : NULL, D);
    }
  }
  return Q3N_OK;
}

/* A part is to the merge what a key is to attention: lse_p its score, o_p its value. */
q3n_status q3n_attention_merge_scalar(const q3n_attention_merge_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  const int64_t rows = a->T * a->HQ;
  for (int64_t item = begin; item < end; item++) {
    const int64_t t = item / a->HQ, h = item % a->HQ;
    float *o = a->o + t * a->o_t + h * a->o_h;
    float max = -INFINITY, sum = 0.0f;
    for (int64_t d = 0; d < a->D; d++) o[d] = 0.0f;
    for (int64_t p = 0; p < a->parts; p++) {
      const int64_t at = p * rows + item;
      add_block((softmax){o, &max, &sum}, a->part_lse + at, a->part_o + at * a->D, 0, 1, a->D);
    }
    finish((softmax){o, &max, &sum}, a->sinks ? a->sinks + h : NULL,
           a->gate ? a->gate + t * a->gate_t + h * a->gate_h : NULL, o, a->lse ? a->lse + t * a->lse_t + h : NULL, a->D);
  }
  return Q3N_OK;
}
