/* f32 to blocks. quant_blocks.h has the formats; the K types and IQ4 share searches that are described where they are
   done. */
#include <math.h>

#include "quant_block.h"
#include "quant_blocks.h"

q3n_status q3n_quantize_scalar(const q3n_quantize_args *a, int64_t begin, int64_t end, void *scratch);

static const uint16_t nan_f16 = 0x7e00;

/* The element of the largest magnitude, the first of equals; NaN where any element is NaN or infinite. */
static float extreme(const float *x, int n) {
  float best = 0.0f;
  for (int i = 0; i < n; i++) {
    if (!(fabsf(x[i]) < INFINITY)) return NAN;
    if (fabsf(x[i]) > fabsf(best)) best = x[i];
  }
  return best;
}

/* 1 / d; 0 where d is 0 or so small that the reciprocal is infinite (the f16 scale is 0 then). */
static float reciprocal(float d) {
  const float r = 1.0f / d;
  return fabsf(r) < INFINITY ? r : 0.0f;
}

/* lo where x is NaN, so that the conversion to an integer that follows is defined: a scale past f16's range times a
   level of 0 is one. Such a candidate has an error of NaN and never wins. */
static float clamp(float x, float lo, float hi) { return x > lo ? (x < hi ? x : hi) : lo; }

static void to_q8_0(const float *x, q3n_block_q8_0 *b) {
  const float most = extreme(x, 32), d = fabsf(most) / 127.0f, inverse = reciprocal(d);
  memset(b, 0, sizeof *b);
  q3n_store_u16(b->d, most != most ? nan_f16 : q3n_f32_to_f16(d));
  if (most != most) return;
  for (int i = 0; i < 32; i++) b->q[i] = (int8_t)roundf(x[i] * inverse);
}

static void to_q4_0(const float *x, q3n_block_q4_0 *b) {
  const float most = extreme(x, 32), d = most / -8.0f, inverse = reciprocal(d);
  memset(b, 0, sizeof *b);
  q3n_store_u16(b->d, most != most ? nan_f16 : q3n_f32_to_f16(d));
  if (most != most) return;
  for (int i = 0; i < 16; i++) {
    const int low = (int)clamp(x[i] * inverse + 8.5f, 0.0f, 15.0f);
    const int high = (int)clamp(x[16 + i] * inverse + 8.5f, 0.0f, 15.0f);
    b->q[i] = (uint8_t)(low | high << 4);
  }
}

/* The scale of a format with levels 0 .. levels from its least element on, and the least element. */
static void range(const float *x, float levels, float *d, float *least) {
  float lo = x[0], hi = x[0];
  for (int i = 1; i < 32; i++) {
    lo = x[i] < lo ? x[i] : lo;
    hi = x[i] > hi ? x[i] : hi;
  }
  *d = (hi - lo) / levels;
  *least = lo;
}

static void to_q4_1(const float *x, q3n_block_q4_1 *b) {
  memset(b, 0, sizeof *b);
  if (extreme(x, 32) != extreme(x, 32)) {
    q3n_store_u16(b->d, nan_f16);
    return;
  }
  float d, least;
  range(x, 15.0f, &d, &least);
  const float inverse = reciprocal(d);
  q3n_store_u16(b->d, q3n_f32_to_f16(d));
  q3n_store_u16(b->m, q3n_f32_to_f16(least));
  for (int i = 0; i < 16; i++) {
    const int low = (int)clamp((x[i] - least) * inverse + 0.5f, 0.0f, 15.0f);
    const int high = (int)clamp((x[16 + i] - least) * inverse + 0.5f, 0.0f, 15.0f);
    b->q[i] = (uint8_t)(low | high << 4);
  }
}

static void pack_5_bits(const int q[32], uint8_t low[16], uint8_t high[4]) {
  for (int i = 0; i < 16; i++) low[i] = (uint8_t)((q[i] & 15) | (q[16 + i] & 15) << 4);
  for (int i = 0; i < 32; i++) high[i / 8] |= (uint8_t)(q[i] >> 4 << i % 8);
}

static void to_q5_0(const float *x, q3n_block_q5_0 *b) {
  const float most = extreme(x, 32), d = most / -16.0f, inverse = reciprocal(d);
  memset(b, 0, sizeof *b);
  q3n_store_u16(b->d, most != most ? nan_f16 : q3n_f32_to_f16(d));
  if (most != most) return;
  int q[32];
  for (int i = 0; i < 32; i++) q[i] = (int)clamp(x[i] * inverse + 16.5f, 0.0f, 31.0f);
  pack_5_bits(q, b->q, b->high);
}

static void to_q5_1(const float *x, q3n_block_q5_1 *b) {
  memset(b, 0, sizeof *b);
  if (extreme(x, 32) != extreme(x, 32)) {
    q3n_store_u16(b->d, nan_f16);
    return;
  }
  float d, least;
  range(x, 31.0f, &d, &least);
  const float inverse = reciprocal(d);
  q3n_store_u16(b->d, q3n_f32_to_f16(d));
  q3n_store_u16(b->m, q3n_f32_to_f16(least));
  int q[32];
  for (int i = 0; i < 32; i++) q[i] = (int)clamp((x[i] - least) * inverse + 0.5f, 0.0f, 31.0f);
  pack_5_bits(q, b->q, b->high);
}

/* The exponent that puts the largest element at 4 to 8 times the scale of e2m1, whose largest value is 6. */
static void to_mxfp4(const float *x, q3n_block_mxfp4 *b) {
  const float most = fabsf(extreme(x, 32));
  if (most != most) {
    /* 12 * 2^127 is infinite: there is no other way to have nothing finite */
    memset(b, 0x77, sizeof *b);
    b->e = 255;
    return;
  }
  const int exponent = (int)(q3n_float_bits(most) >> 23) - 2;
  b->e = (uint8_t)(exponent > 0 ? exponent : 0);
  const float d = q3n_mxfp4_scale(b->e);
  int q[32];
  for (int i = 0; i < 32; i++) {
    float least = INFINITY;
    q[i] = 0;
    for (int level = 0; level < 8; level++) {
      const float off = fabsf(d * (float)q3n_mxfp4_levels[level] - fabsf(x[i]));
      if (off < least) least = off, q[i] = level;
    }
    if (q[i] && x[i] < 0.0f) q[i] |= 8;
  }
  for (int i = 0; i < 16; i++) b->q[i] = (uint8_t)(q[i] | q[16 + i] << 4);
}

/* Below this every searched type's best block is zero; above the other none has a finite scale. */
static const float k_smallest = 0x1p-26f, k_largest = 0x1p30f;

/* Sums run in eight lanes, so that they vectorise; n is 16 or 32. */
static inline float sum_lanes(const float s[8]) {
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

static inline float sum(int n, const float *a) {
  float s[8] = {0};
  for (int i = 0; i < n; i += 8)
    for (int l = 0; l < 8; l++) s[l] += a[i + l];
  return sum_lanes(s);
}

static inline float dot(int n, const float *a, const float *b) {
  float s[8] = {0};
  for (int i = 0; i < n; i += 8)
    for (int l = 0; l < 8; l++) s[l] += a[i + l] * b[i + l];
  return sum_lanes(s);
}

/* Squared error of scale level - min. */
static inline float squared_error(int n, const float *x, float scale, float min, const float *level) {
  float s[8] = {0};
  for (int i = 0; i < n; i += 8)
    for (int l = 0; l < 8; l++) {
      const float off = scale * level[i + l] - min - x[i + l];
      s[l] += off * off;
    }
  return sum_lanes(s);
}

/* Scale candidates of a sub-block: the range is stretched from `levels - 1` to `levels + 1` steps. */
enum { K_TRIALS = 15, K_REFITS = 3 };
static float trial_levels(float levels, int trial) {
  return levels + (float)(trial - K_TRIALS / 2) * (2.0f / K_TRIALS);
}

/* A format of affine super-blocks: x = (d scale_j) q - (dmin min_j), q in 0..levels, scale_j and min_j in 0..codes. */
typedef struct {
  int size; /* elements of a sub-block */
  float levels, codes;
} affine_format;

static const affine_format q2_k_format = {16, 3.0f, 15.0f}, q4_k_format = {32, 15.0f, 63.0f},
                           q5_k_format = {32, 31.0f, 63.0f};

/* A super-block before packing. */
typedef struct {
  uint16_t d, dmin;
  uint8_t scale[16], min[16], q[256];
  double error; /* sum of squares, of the stored values */
} affine_block;

/* The best q of one sub-block for a scale and minimum, and the error that is left. */
static inline float affine_round_sub(const affine_format *f, const float *x, float scale, float min, float q[32]) {
  const float inverse = reciprocal(scale);
  for (int i = 0; i < f->size; i++) q[i] = (float)(int)(clamp((x[i] + min) * inverse, 0.0f, f->levels) + 0.5f);
  return squared_error(f->size, x, scale, min, q);
}

static void affine_round(const affine_format *f, const float *x, affine_block *b) {
  const float d = q3n_f16_to_f32(b->d), dmin = q3n_f16_to_f32(b->dmin);
  float q[32];
  b->error = 0.0;
  for (int j = 0; j < 256 / f->size; j++) {
    const int at = f->size * j;
    b->error += (double)affine_round_sub(f, x + at, d * (float)b->scale[j], dmin * (float)b->min[j], q);
    for (int i = 0; i < f->size; i++) b->q[at + i] = (uint8_t)q[i];
  }
}

/* Stores the sub-blocks' scales and minima as codes, then rounds. */
static void affine_store(const affine_format *f, const float *x, const float *scale, const float *min,
                         affine_block *b) {
  float most = 0.0f, most_min = 0.0f;
  for (int j = 0; j < 256 / f->size; j++) {
    most = scale[j] > most ? scale[j] : most;
    most_min = min[j] > most_min ? min[j] : most_min;
  }
  b->d = q3n_f32_to_f16(most / f->codes);
  b->dmin = q3n_f32_to_f16(most_min / f->codes);
  const float inverse = reciprocal(q3n_f16_to_f32(b->d)), inverse_min = reciprocal(q3n_f16_to_f32(b->dmin));
  for (int j = 0; j < 256 / f->size; j++) {
    b->scale[j] = (uint8_t)(clamp(scale[j] * inverse, 0.0f, f->codes) + 0.5f);
    b->min[j] = (uint8_t)(clamp(min[j] * inverse_min, 0.0f, f->codes) + 0.5f);
  }
  affine_round(f, x, b);
}

/* The d and dmin of least squared error for the q, scales and minima that are there; then rounds anew. */
static void affine_refit(const affine_format *f, const float *x, affine_block *b) {
  double aa = 0.0, ab = 0.0, bb = 0.0, ax = 0.0, bx = 0.0;
  for (int i = 0; i < 256; i++) {
    const double p = (double)b->scale[i / f->size] * b->q[i], m = -(double)b->min[i / f->size], value = (double)x[i];
    aa += p * p, ab += p * m, bb += m * m, ax += p * value, bx += m * value;
  }
  const double det = aa * bb - ab * ab;
  double d = aa > 0.0 ? ax / aa : 0.0, dmin = 0.0;
  if (det > 0.0) d = (ax * bb - bx * ab) / det, dmin = (bx * aa - ax * ab) / det;
  if (!(d > 0.0) || !(dmin >= 0.0)) return;
  b->d = q3n_f32_to_f16((float)d);
  b->dmin = q3n_f32_to_f16((float)dmin);
  affine_round(f, x, b);
}

/* Moves each sub-block's codes to the neighbours of least error: with few codes the nearest one is not the best. */
static void affine_adjust(const affine_format *f, const float *x, affine_block *b) {
  const float d = q3n_f16_to_f32(b->d), dmin = q3n_f16_to_f32(b->dmin);
  float q[32];
  for (int j = 0; j < 256 / f->size; j++) {
    const int at = f->size * j, scale = b->scale[j], min = b->min[j], codes = (int)f->codes;
    float least = affine_round_sub(f, x + at, d * (float)scale, dmin * (float)min, q);
    for (int s = scale > 0 ? scale - 1 : 0; s <= scale + 1 && s <= codes; s++)
      for (int m = min > 0 ? min - 1 : 0; m <= min + 1 && m <= codes; m++) {
        const float error = affine_round_sub(f, x + at, d * (float)s, dmin * (float)m, q);
        if (error < least) least = error, b->scale[j] = (uint8_t)s, b->min[j] = (uint8_t)m;
      }
  }
  affine_round(f, x, b);
}

/* scale and min >= 0 so that scale q - min, q in 0..levels, is near x: each trial rounds to a stretched range, takes
   the least-squares line through what came out, and the line of least error wins. */
static void affine_fit(const affine_format *f, const float *x, float lo, float hi, float *scale, float *min) {
  const float levels = f->levels, n = (float)f->size, sum_x = sum(f->size, x);
  *scale = (hi - lo) / levels;
  *min = -lo;
  float least = INFINITY;
  for (int trial = 0; trial < K_TRIALS; trial++) {
    const float inverse = reciprocal((hi - lo) / trial_levels(levels, trial));
    float q[32];
    for (int i = 0; i < f->size; i++) q[i] = (float)(int)(clamp((x[i] - lo) * inverse, 0.0f, levels) + 0.5f);
    const float sum_q = sum(f->size, q), sum_qq = dot(f->size, q, q), sum_qx = dot(f->size, q, x);
    const float det = n * sum_qq - sum_q * sum_q;
    if (!(det > 0.0f)) continue;
    float s = (n * sum_qx - sum_q * sum_x) / det, m = (sum_q * sum_qx - sum_qq * sum_x) / det;
    if (m < 0.0f) s = sum_qx / sum_qq, m = 0.0f;
    const float error = squared_error(f->size, x, s, m, q);
    if (s > 0.0f && error < least) least = error, *scale = s, *min = m;
  }
}

/* Candidates: the plain minimum-maximum scales, the fitted ones, and refits of these; the least error of the stored
   values wins. A d of NaN where no finite scale exists. */
static affine_block affine(const affine_format *f, const float *x) {
  affine_block best;
  memset(&best, 0, sizeof best);
  const float most = fabsf(extreme(x, 256));
  if (most < k_smallest) return best;
  best.d = nan_f16;
  if (!(most < k_largest)) return best;

  float scale[2][16], min[2][16];
  for (int j = 0; j < 256 / f->size; j++) {
    const float *from = x + f->size * j;
    float lo = 0.0f, hi = 0.0f;
    for (int i = 0; i < f->size; i++) {
      lo = from[i] < lo ? from[i] : lo;
      hi = from[i] > hi ? from[i] : hi;
    }
    scale[0][j] = (hi - lo) / f->levels;
    min[0][j] = -lo;
    affine_fit(f, from, lo, hi, &scale[1][j], &min[1][j]);
  }
  best.error = INFINITY;
  for (int candidate = 0; candidate < 2; candidate++) {
    affine_block b;
    affine_store(f, x, scale[candidate], min[candidate], &b);
    for (int refit = 0; refit < K_REFITS; refit++) {
      if (b.error < best.error) best = b;
      if (candidate == 1) affine_adjust(f, x, &b);
      affine_refit(f, x, &b);
    }
    if (b.error < best.error) best = b;
  }
  return best;
}

/* Two bits of every element as q2_k and q3_k store them. */
static void pack_2_bits(const uint8_t q[256], uint8_t to[64]) {
  memset(to, 0, 64);
  for (int i = 0; i < 256; i++) to[32 * (i / 128) + i % 32] |= (uint8_t)((q[i] & 3) << i % 128 / 32 * 2);
}

static void to_q2_k(const float *x, q3n_block_q2_k *b) {
  const affine_block from = affine(&q2_k_format, x);
  q3n_store_u16(b->d, from.d);
  q3n_store_u16(b->dmin, from.dmin);
  for (int j = 0; j < 16; j++) b->scales[j] = (uint8_t)(from.scale[j] | from.min[j] << 4);
  pack_2_bits(from.q, b->q);
}

static void pack_scales(const affine_block *from, uint8_t s[12]) {
  for (int j = 0; j < 4; j++) {
    s[j] = (uint8_t)(from->scale[j] | from->scale[j + 4] >> 4 << 6);
    s[j + 4] = (uint8_t)(from->min[j] | from->min[j + 4] >> 4 << 6);
    s[j + 8] = (uint8_t)((from->scale[j + 4] & 15) | (from->min[j + 4] & 15) << 4);
  }
}

static void to_q4_k(const float *x, q3n_block_q4_k *b) {
  const affine_block from = affine(&q4_k_format, x);
  q3n_store_u16(b->d, from.d);
  q3n_store_u16(b->dmin, from.dmin);
  pack_scales(&from, b->scales);
  for (int i = 0; i < 128; i++) {
    const uint8_t *q = from.q + i / 32 * 64 + i % 32;
    b->q[i] = (uint8_t)(q[0] | q[32] << 4);
  }
}

static void to_q5_k(const float *x, q3n_block_q5_k *b) {
  const affine_block from = affine(&q5_k_format, x);
  q3n_store_u16(b->d, from.d);
  q3n_store_u16(b->dmin, from.dmin);
  pack_scales(&from, b->scales);
  memset(b->high, 0, sizeof b->high);
  for (int i = 0; i < 256; i++) b->high[i % 32] |= (uint8_t)(from.q[i] >> 4 << i / 32);
  for (int i = 0; i < 128; i++) {
    const uint8_t *q = from.q + i / 32 * 64 + i % 32;
    b->q[i] = (uint8_t)((q[0] & 15) | (q[32] & 15) << 4);
  }
}

/* A format of linear super-blocks: x = (d scale_j) level_q, scale_j in -codes..codes - 1. The levels are those of
   IQ4, or all whole numbers -levels..levels - 1. */
typedef struct {
  int size;
  float levels, codes;
  int iq4;
} linear_format;

static const linear_format q3_k_format = {16, 4.0f, 32.0f, 0}, q6_k_format = {16, 32.0f, 128.0f, 0},
                           iq4_xs_format = {32, 127.0f, 32.0f, 1};

/* A super-block before packing. */
typedef struct {
  uint16_t d;
  int8_t scale[16], level[256];
  double error;
} linear_block;

/* The number of the IQ4 level nearest to 32 values: as many as there are midpoints below. A loop over the elements
   inside, so that it vectorises. */
static inline void iq4_nearest(const float v[32], int32_t q[32]) {
  for (int i = 0; i < 32; i++) q[i] = 0;
  for (int level = 0; level < 15; level++) {
    const float midpoint = 0.5f * (float)(q3n_iq4_levels[level] + q3n_iq4_levels[level + 1]);
    for (int i = 0; i < 32; i++) q[i] += v[i] > midpoint;
  }
}

/* The levels nearest to x / scale. */
static inline void nearest_levels(const linear_format *f, const float *x, float inverse, float level[32]) {
  if (f->iq4) {
    int32_t q[32];
    for (int i = 0; i < 32; i++) level[i] = x[i] * inverse;
    iq4_nearest(level, q);
    for (int i = 0; i < 32; i++) level[i] = (float)q3n_iq4_levels[q[i]];
  } else {
    for (int i = 0; i < f->size; i++)
      level[i] = (float)(int)(clamp(x[i] * inverse, -f->levels, f->levels - 1.0f) + f->levels + 0.5f) - f->levels;
  }
}

static inline float linear_round_sub(const linear_format *f, const float *x, float scale, float level[32]) {
  nearest_levels(f, x, reciprocal(scale), level);
  return squared_error(f->size, x, scale, 0.0f, level);
}

static void linear_round(const linear_format *f, const float *x, linear_block *b) {
  const float d = q3n_f16_to_f32(b->d);
  float level[32];
  b->error = 0.0;
  for (int j = 0; j < 256 / f->size; j++) {
    b->error += (double)linear_round_sub(f, x + f->size * j, d * (float)b->scale[j], level);
    for (int i = 0; i < f->size; i++) b->level[f->size * j + i] = (int8_t)level[i];
  }
}

static void linear_store(const linear_format *f, const float *x, const float *scale, linear_block *b) {
  b->d = q3n_f32_to_f16(extreme(scale, 256 / f->size) / -f->codes);
  const float inverse = reciprocal(q3n_f16_to_f32(b->d));
  for (int j = 0; j < 256 / f->size; j++)
    b->scale[j] = (int8_t)roundf(clamp(scale[j] * inverse, -f->codes, f->codes - 1.0f));
  linear_round(f, x, b);
}

static void linear_refit(const linear_format *f, const float *x, linear_block *b) {
  double aa = 0.0, ax = 0.0;
  for (int i = 0; i < 256; i++) {
    const double p = (double)b->scale[i / f->size] * b->level[i];
    aa += p * p, ax += p * (double)x[i];
  }
  if (!(aa > 0.0)) return;
  b->d = q3n_f32_to_f16((float)(ax / aa));
  linear_round(f, x, b);
}

static void linear_adjust(const linear_format *f, const float *x, linear_block *b) {
  const float d = q3n_f16_to_f32(b->d);
  float level[32];
  for (int j = 0; j < 256 / f->size; j++) {
    const int scale = b->scale[j], codes = (int)f->codes;
    float least = INFINITY;
    for (int s = scale > -codes ? scale - 1 : scale; s <= scale + 1 && s < codes; s++) {
      const float error = linear_round_sub(f, x + f->size * j, d * (float)s, level);
      if (error < least) least = error, b->scale[j] = (int8_t)s;
    }
  }
  linear_round(f, x, b);
}

/* The scale of least squared error over the trials, of either sign: the largest element lies at level -levels before
   stretching, or at its mirror image. */
static float linear_fit(const linear_format *f, const float *x) {
  const float most = extreme(x, f->size);
  float best = most / -f->levels, least = INFINITY;
  for (int trial = 0; trial < 2 * K_TRIALS; trial++) {
    const float sign = trial < K_TRIALS ? -1.0f : 1.0f, stretch = f->iq4 ? 8.0f : 1.0f;
    const float steps = f->levels + stretch * (trial_levels(0.0f, trial % K_TRIALS));
    const float inverse = reciprocal(sign * most / steps);
    float level[32];
    nearest_levels(f, x, inverse, level);
    const float sum_ll = dot(f->size, level, level), sum_lx = dot(f->size, level, x);
    if (!(sum_ll > 0.0f)) continue;
    const float scale = sum_lx / sum_ll;
    const float error = squared_error(f->size, x, scale, 0.0f, level);
    if (error < least) least = error, best = scale;
  }
  return best;
}

/* As `affine`, without minima. */
static linear_block linear(const linear_format *f, const float *x) {
  linear_block best;
  memset(&best, 0, sizeof best);
  const float most = fabsf(extreme(x, 256));
  if (most < k_smallest) return best;
  best.d = nan_f16;
  if (!(most < k_largest)) return best;

  float scale[2][16];
  for (int j = 0; j < 256 / f->size; j++) {
    scale[0][j] = extreme(x + f->size * j, f->size) / -f->levels;
    scale[1][j] = linear_fit(f, x + f->size * j);
  }
  best.error = INFINITY;
  for (int candidate = 0; candidate < 2; candidate++) {
    linear_block b;
    linear_store(f, x, scale[candidate], &b);
    for (int refit = 0; refit < K_REFITS; refit++) {
      if (b.error < best.error) best = b;
      if (candidate == 1) linear_adjust(f, x, &b);
      linear_refit(f, x, &b);
    }
    if (b.error < best.error) best = b;
  }
  return best;
}

static void to_q6_k(const float *x, q3n_block_q6_k *b) {
  const linear_block from = linear(&q6_k_format, x);
  memset(b, 0, sizeof *b);
  q3n_store_u16(b->d, from.d);
  memcpy(b->scales, from.scale, sizeof b->scales);
  for (int i = 0; i < 256; i++) {
    const int level = from.level[i] + 32, half = i / 128, quarter = i % 128 / 32;
    b->low[64 * half + i % 64] |= (uint8_t)((level & 15) << quarter / 2 * 4);
    b->high[32 * half + i % 32] |= (uint8_t)(level >> 4 << 2 * quarter);
  }
}

static void to_q3_k(const float *x, q3n_block_q3_k *b) {
  const linear_block from = linear(&q3_k_format, x);
  uint8_t q[256];
  memset(b, 0, sizeof *b);
  q3n_store_u16(b->d, from.d);
  for (int i = 0; i < 256; i++) {
    q[i] = (uint8_t)(from.level[i] + 4);
    b->high[i % 32] |= (uint8_t)(q[i] >> 2 << i / 32);
  }
  pack_2_bits(q, b->low);
  for (int j = 0; j < 16; j++) {
    const int scale = from.scale[j] + 32;
    b->scales[j % 8] |= (uint8_t)((scale & 15) << j / 8 * 4);
    b->scales[8 + j % 4] |= (uint8_t)(scale >> 4 << j / 4 * 2);
  }
}

/* Levels as nibbles. */
static void pack_iq4(const float level[32], uint8_t to[16]) {
  int32_t q[32];
  iq4_nearest(level, q);
  for (int i = 0; i < 16; i++) to[i] = (uint8_t)(q[i] | q[16 + i] << 4);
}

static void to_iq4_xs(const float *x, q3n_block_iq4_xs *b) {
  const linear_block from = linear(&iq4_xs_format, x);
  memset(b, 0, sizeof *b);
  q3n_store_u16(b->d, from.d);
  int high = 0;
  for (int j = 0; j < 8; j++) {
    const int scale = from.scale[j] + 32;
    b->scales_low[j / 2] |= (uint8_t)((scale & 15) << j % 2 * 4);
    high |= scale >> 4 << 2 * j;
  }
  q3n_store_u16(b->scales_high, (uint16_t)high);
  float level[256];
  for (int i = 0; i < 256; i++) level[i] = (float)from.level[i];
  for (int j = 0; j < 8; j++) pack_iq4(level + 32 * j, b->q + 16 * j);
}

/* The f16 scale of least squared error. The candidates put the largest element at each of the levels (so that what
   was decoded is found again) or near the outermost ones, and are refitted while that helps. */
static void to_iq4_nl(const float *x, q3n_block_iq4_nl *b) {
  const float most = extreme(x, 32);
  memset(b, 0, sizeof *b);
  if (!(fabsf(most) < k_largest)) {
    q3n_store_u16(b->d, nan_f16);
    return;
  }
  float best[32] = {0}, least = INFINITY;
  uint16_t d = most == 0.0f ? 0 : nan_f16;
  for (int trial = 0; trial < 32; trial++) {
    const float near = 108.0f + 4.0f * (float)((trial - 16) / 2);
    float scale = most / (trial < 16 ? (float)q3n_iq4_levels[trial] : trial % 2 ? near : -near);
    for (int refit = 0; refit < 2; refit++) {
      const uint16_t stored = q3n_f32_to_f16(scale);
      float level[32];
      const float error = linear_round_sub(&iq4_xs_format, x, q3n_f16_to_f32(stored), level);
      if (!(error < least)) break;
      least = error, d = stored;
      memcpy(best, level, sizeof best);
      const float squares = dot(32, level, level);
      scale = dot(32, level, x) / squares;
    }
  }
  q3n_store_u16(b->d, d);
  pack_iq4(best, b->q);
}

q3n_status q3n_quantize_scalar(const q3n_quantize_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  const int64_t block = q3n_dtype_block(a->dtype), bytes = q3n_dtype_block_bytes(a->dtype);
  for (int64_t row = begin; row < end; row++) {
    const float *x = a->x + row * a->x_row;
    uint8_t *y = (uint8_t *)a->y + row * a->y_row / block * bytes;
    for (int64_t i = 0; i < a->N / block; i++, x += block, y += bytes) switch (a->dtype) {
        case Q3N_F32: memcpy(y, x, sizeof *x); break;
        case Q3N_F16: q3n_store_u16(y, q3n_f32_to_f16(*x)); break;
        case Q3N_BF16: q3n_store_u16(y, q3n_f32_to_bf16(*x)); break;
        case Q3N_Q8_0: to_q8_0(x, (q3n_block_q8_0 *)y); break;
        case Q3N_Q4_0: to_q4_0(x, (q3n_block_q4_0 *)y); break;
        case Q3N_Q4_1: to_q4_1(x, (q3n_block_q4_1 *)y); break;
        case Q3N_Q5_0: to_q5_0(x, (q3n_block_q5_0 *)y); break;
        case Q3N_Q5_1: to_q5_1(x, (q3n_block_q5_1 *)y); break;
        case Q3N_IQ4_NL: to_iq4_nl(x, (q3n_block_iq4_nl *)y); break;
        case Q3N_MXFP4: to_mxfp4(x, (q3n_block_mxfp4 *)y); break;
        case Q3N_Q2_K: to_q2_k(x, (q3n_block_q2_k *)y); break;
        case Q3N_Q3_K: to_q3_k(x, (q3n_block_q3_k *)y); break;
        case Q3N_IQ4_XS: to_iq4_xs(x, (q3n_block_iq4_xs *)y); break;
        case Q3N_Q4_K: to_q4_k(x, (q3n_block_q4_k *)y); break;
        case Q3N_Q5_K: to_q5_k(x, (q3n_block_q5_k *)y); break;
        case Q3N_Q6_K: to_q6_k(x, (q3n_block_q6_k *)y); break;
        case Q3N_Q8_X32:
        case Q3N_Q8_X256: break; /* refused by the check */
      }
  }
  return Q3N_OK;
}
