/* f32 to blocks. quant_blocks.h has the formats; the K types share a search that is described where it is done. */
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

/* Below this every K type's best block is zero; above the other none has a finite scale. */
static const float k_smallest = 0x1p-26f, k_largest = 0x1p30f;

/* Scale candidates of a sub-block: the range is stretched from `levels - 1` to `levels + 1` steps. */
enum { K_TRIALS = 15 };
static float trial_levels(float levels, int trial) {
  return levels + (float)(trial - K_TRIALS / 2) * (2.0f / K_TRIALS);
}

/* A super-block of Q4_K or Q5_K before packing: x = (d scale_j) q - (dmin min_j). */
typedef struct {
  uint16_t d, dmin;
  uint8_t scale[8], min[8], q[256];
  double error; /* sum of squares, of the stored values */
} affine_block;

/* The best q for the stored scales, and the error that is left. */
static void affine_round(const float *x, float levels, affine_block *b) {
  const float d = q3n_f16_to_f32(b->d), dmin = q3n_f16_to_f32(b->dmin);
  b->error = 0.0;
  for (int j = 0; j < 8; j++) {
    const float scale = d * (float)b->scale[j], min = dmin * (float)b->min[j];
    const float inverse = reciprocal(scale);
    float error = 0.0f;
    for (int i = 32 * j; i < 32 * j + 32; i++) {
      const float q = (float)(int)(clamp((x[i] + min) * inverse, 0.0f, levels) + 0.5f);
      const float off = scale * q - min - x[i];
      b->q[i] = (uint8_t)q;
      error += off * off;
    }
    b->error += (double)error;
  }
}

/* Stores the sub-blocks' scales and minima in six bits each, then rounds. */
static void affine_store(const float *x, float levels, const float scale[8], const float min[8], affine_block *b) {
  float most = 0.0f, most_min = 0.0f;
  for (int j = 0; j < 8; j++) {
    most = scale[j] > most ? scale[j] : most;
    most_min = min[j] > most_min ? min[j] : most_min;
  }
  b->d = q3n_f32_to_f16(most / 63.0f);
  b->dmin = q3n_f32_to_f16(most_min / 63.0f);
  const float inverse = reciprocal(q3n_f16_to_f32(b->d)), inverse_min = reciprocal(q3n_f16_to_f32(b->dmin));
  for (int j = 0; j < 8; j++) {
    b->scale[j] = (uint8_t)(clamp(scale[j] * inverse, 0.0f, 63.0f) + 0.5f);
    b->min[j] = (uint8_t)(clamp(min[j] * inverse_min, 0.0f, 63.0f) + 0.5f);
  }
  affine_round(x, levels, b);
}

/* The d and dmin of least squared error for the q, scales and minima that are there; then rounds anew. */
static void affine_refit(const float *x, float levels, affine_block *b) {
  double aa = 0.0, ab = 0.0, bb = 0.0, ax = 0.0, bx = 0.0;
  for (int i = 0; i < 256; i++) {
    const double p = (double)b->scale[i / 32] * b->q[i], m = -(double)b->min[i / 32], value = (double)x[i];
    aa += p * p, ab += p * m, bb += m * m, ax += p * value, bx += m * value;
  }
  const double det = aa * bb - ab * ab;
  double d = aa > 0.0 ? ax / aa : 0.0, dmin = 0.0;
  if (det > 0.0) d = (ax * bb - bx * ab) / det, dmin = (bx * aa - ax * ab) / det;
  if (!(d > 0.0) || !(dmin >= 0.0)) return;
  b->d = q3n_f32_to_f16((float)d);
  b->dmin = q3n_f32_to_f16((float)dmin);
  affine_round(x, levels, b);
}

/* scale and min >= 0 so that scale q - min, q in 0..levels, is near x: each trial rounds to a stretched range, takes
   the least-squares line through what came out, and the line of least error wins. */
static void affine_fit(const float *x, float levels, float *scale, float *min) {
  float lo = 0.0f, hi = 0.0f;
  for (int i = 0; i < 32; i++) {
    lo = x[i] < lo ? x[i] : lo;
    hi = x[i] > hi ? x[i] : hi;
  }
  *scale = (hi - lo) / levels;
  *min = -lo;
  float least = INFINITY;
  for (int trial = 0; trial < K_TRIALS; trial++) {
    const float inverse = reciprocal((hi - lo) / trial_levels(levels, trial));
    float q[32], sum_q = 0.0f, sum_qq = 0.0f, sum_x = 0.0f, sum_qx = 0.0f;
    for (int i = 0; i < 32; i++) {
      q[i] = (float)(int)(clamp((x[i] - lo) * inverse, 0.0f, levels) + 0.5f);
      sum_q += q[i], sum_qq += q[i] * q[i], sum_x += x[i], sum_qx += q[i] * x[i];
    }
    const float det = 32.0f * sum_qq - sum_q * sum_q;
    if (!(det > 0.0f)) continue;
    float s = (32.0f * sum_qx - sum_q * sum_x) / det, m = (sum_q * sum_qx - sum_qq * sum_x) / det;
    if (m < 0.0f) s = sum_qx / sum_qq, m = 0.0f;
    float error = 0.0f;
    for (int i = 0; i < 32; i++) error += (s * q[i] - m - x[i]) * (s * q[i] - m - x[i]);
    if (s > 0.0f && error < least) least = error, *scale = s, *min = m;
  }
}

/* Q4_K (levels 15) and Q5_K (levels 31). Candidates: the plain minimum-maximum scales, the fitted ones, and refits of
   these; the least error of the stored values wins. A d of NaN where no finite scale exists. */
static affine_block affine(const float *x, float levels) {
  affine_block best;
  memset(&best, 0, sizeof best);
  const float most = fabsf(extreme(x, 256));
  if (most < k_smallest) return best;
  best.d = nan_f16;
  if (!(most < k_largest)) return best;

  float scale[2][8], min[2][8];
  for (int j = 0; j < 8; j++) {
    float lo = 0.0f, hi = 0.0f;
    for (int i = 32 * j; i < 32 * j + 32; i++) {
      lo = x[i] < lo ? x[i] : lo;
      hi = x[i] > hi ? x[i] : hi;
    }
    scale[0][j] = (hi - lo) / levels;
    min[0][j] = -lo;
    affine_fit(x + 32 * j, levels, &scale[1][j], &min[1][j]);
  }
  best.error = INFINITY;
  for (int candidate = 0; candidate < 2; candidate++) {
    affine_block b;
    affine_store(x, levels, scale[candidate], min[candidate], &b);
    for (int refit = 0; refit < 3; refit++) {
      if (b.error < best.error) best = b;
      affine_refit(x, levels, &b);
    }
    if (b.error < best.error) best = b;
  }
  return best;
}

static void pack_scales(const affine_block *from, uint8_t s[12]) {
  for (int j = 0; j < 4; j++) {
    s[j] = (uint8_t)(from->scale[j] | from->scale[j + 4] >> 4 << 6);
    s[j + 4] = (uint8_t)(from->min[j] | from->min[j + 4] >> 4 << 6);
    s[j + 8] = (uint8_t)((from->scale[j + 4] & 15) | (from->min[j + 4] & 15) << 4);
  }
}

static void to_q4_k(const float *x, q3n_block_q4_k *b) {
  const affine_block from = affine(x, 15.0f);
  q3n_store_u16(b->d, from.d);
  q3n_store_u16(b->dmin, from.dmin);
  pack_scales(&from, b->scales);
  for (int i = 0; i < 128; i++) {
    const uint8_t *q = from.q + i / 32 * 64 + i % 32;
    b->q[i] = (uint8_t)(q[0] | q[32] << 4);
  }
}

static void to_q5_k(const float *x, q3n_block_q5_k *b) {
  const affine_block from = affine(x, 31.0f);
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

/* A super-block of Q6_K before packing: x = (d scale_j) q, q in -32..31. */
typedef struct {
  uint16_t d;
  int8_t scale[16], q[256];
  double error;
} linear_block;

static float round_level(float v) { return roundf(clamp(v, -32.0f, 31.0f)); }

static void linear_round(const float *x, linear_block *b) {
  const float d = q3n_f16_to_f32(b->d);
  b->error = 0.0;
  for (int j = 0; j < 16; j++) {
    const float scale = d * (float)b->scale[j], inverse = reciprocal(scale);
    float error = 0.0f;
    for (int i = 16 * j; i < 16 * j + 16; i++) {
      const float q = round_level(x[i] * inverse), off = scale * q - x[i];
      b->q[i] = (int8_t)q;
      error += off * off;
    }
    b->error += (double)error;
  }
}

static void linear_store(const float *x, const float scale[16], linear_block *b) {
  const float d = extreme(scale, 16) / -128.0f;
  b->d = q3n_f32_to_f16(d);
  const float inverse = reciprocal(q3n_f16_to_f32(b->d));
  for (int j = 0; j < 16; j++) b->scale[j] = (int8_t)roundf(clamp(scale[j] * inverse, -128.0f, 127.0f));
  linear_round(x, b);
}

static void linear_refit(const float *x, linear_block *b) {
  double aa = 0.0, ax = 0.0;
  for (int i = 0; i < 256; i++) {
    const double p = (double)b->scale[i / 16] * b->q[i];
    aa += p * p, ax += p * (double)x[i];
  }
  if (!(aa > 0.0)) return;
  b->d = q3n_f32_to_f16((float)(ax / aa));
  linear_round(x, b);
}

/* The scale of least squared error over the trials; the largest element lies at level -32 before stretching. */
static float linear_fit(const float *x) {
  const float most = extreme(x, 16);
  float best = most / -32.0f, least = INFINITY;
  for (int trial = 0; trial < K_TRIALS; trial++) {
    const float inverse = reciprocal(most / -trial_levels(32.0f, trial));
    float q[16], sum_qq = 0.0f, sum_qx = 0.0f;
    for (int i = 0; i < 16; i++) {
      q[i] = round_level(x[i] * inverse);
      sum_qq += q[i] * q[i], sum_qx += q[i] * x[i];
    }
    if (!(sum_qq > 0.0f)) continue;
    const float scale = sum_qx / sum_qq;
    float error = 0.0f;
    for (int i = 0; i < 16; i++) error += (scale * q[i] - x[i]) * (scale * q[i] - x[i]);
    if (error < least) least = error, best = scale;
  }
  return best;
}

/* As `affine`, without minima. */
static linear_block linear(const float *x) {
  linear_block best;
  memset(&best, 0, sizeof best);
  const float most = fabsf(extreme(x, 256));
  if (most < k_smallest) return best;
  best.d = nan_f16;
  if (!(most < k_largest)) return best;

  float scale[2][16];
  for (int j = 0; j < 16; j++) {
    scale[0][j] = extreme(x + 16 * j, 16) / -32.0f;
    scale[1][j] = linear_fit(x + 16 * j);
  }
  best.error = INFINITY;
  for (int candidate = 0; candidate < 2; candidate++) {
    linear_block b;
    linear_store(x, scale[candidate], &b);
    for (int refit = 0; refit < 3; refit++) {
      if (b.error < best.error) best = b;
      linear_refit(x, &b);
    }
    if (b.error < best.error) best = b;
  }
  return best;
}

static void to_q6_k(const float *x, q3n_block_q6_k *b) {
  const linear_block from = linear(x);
  memset(b, 0, sizeof *b);
  q3n_store_u16(b->d, from.d);
  memcpy(b->scales, from.scale, sizeof b->scales);
  for (int i = 0; i < 256; i++) {
    const int level = from.q[i] + 32, half = i / 128, quarter = i % 128 / 32;
    b->low[64 * half + i % 64] |= (uint8_t)((level & 15) << quarter / 2 * 4);
    b->high[32 * half + i % 32] |= (uint8_t)(level >> 4 << 2 * quarter);
  }
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
        case Q3N_Q4_K: to_q4_k(x, (q3n_block_q4_k *)y); break;
        case Q3N_Q5_K: to_q5_k(x, (q3n_block_q5_k *)y); break;
        case Q3N_Q6_K: to_q6_k(x, (q3n_block_q6_k *)y); break;
        case Q3N_Q8_X32:
        case Q3N_Q8_X256: break; /* refused by the check */
      }
  }
  return Q3N_OK;
}
