/* One row after the other: sum of squares, factor and products in double, as in norm_scalar.c; the gate in float. */
#include <math.h>

#include "../simd/neon.h"
#include "norm_rows.h"

q3n_status q3n_norm_neon(const q3n_norm_args *a, int64_t begin, int64_t end, void *scratch);

/* Eight partial sums, so that the additions do not wait for each other. */
static double sum_of_squares(const float *x, int64_t n) {
  float64x2_t part[4];
  for (int p = 0; p < 4; p++) part[p] = vdupq_n_f64(0.0);
  int64_t d = 0;
  for (; d + 8 <= n; d += 8)
    for (int half = 0; half < 2; half++) {
      const float32x4_t v = vld1q_f32(x + d + 4 * half);
      const float64x2_t low = vcvt_f64_f32(vget_low_f32(v)), high = vcvt_high_f64_f32(v);
      part[2 * half] = vfmaq_f64(part[2 * half], low, low);
      part[2 * half + 1] = vfmaq_f64(part[2 * half + 1], high, high);
    }
  double sum = vaddvq_f64(vaddq_f64(vaddq_f64(part[0], part[2]), vaddq_f64(part[1], part[3])));
  for (; d < n; d++) sum += (double)x[d] * (double)x[d];
  return sum;
}

/* Four elements of a row times its factor and weights. Double until here: the factor may exceed any float. */
static inline float32x4_t scaled(const q3n_norm_args *a, float32x4_t x, double factor, const float *w, int64_t d) {
  float64x2_t low = vmulq_n_f64(vcvt_f64_f32(vget_low_f32(x)), factor);
  float64x2_t high = vmulq_n_f64(vcvt_high_f64_f32(x), factor);
  if (w) {
    const float32x4_t weight = q3n_load_upto(w, d, a->D);
    float64x2_t w_low = vcvt_f64_f32(vget_low_f32(weight)), w_high = vcvt_high_f64_f32(weight);
    if (a->kind == Q3N_NORM_RMS_PLUS1) {
      w_low = vaddq_f64(w_low, vdupq_n_f64(1.0));
      w_high = vaddq_f64(w_high, vdupq_n_f64(1.0));
    }
    low = vmulq_f64(low, w_low);
    high = vmulq_f64(high, w_high);
  }
  return vcvt_high_f32_f64(vcvt_f32_f64(low), high);
}

q3n_status q3n_norm_neon(const q3n_norm_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  for (int64_t row = begin; row < end; row++) {
    const int64_t t = row / a->H, h = row % a->H;
    const float *x = a->x + t * a->x_t + h * a->x_h;
    const float *z = a->kind == Q3N_NORM_RMS_GATED ? a->z + t * a->z_t + h * a->z_h : NULL;
    float *y = a->y + t * a->y_t + h * a->y_h;

    const double squares = sum_of_squares(x, a->D);
    const double factor = 1.0 / sqrt((a->kind == Q3N_NORM_L2 ? squares : squares / (double)a->D) + (double)a->eps);
    for (int64_t d = 0; d < a->D; d += 4) {
      float32x4_t v = scaled(a, q3n_load_upto(x, d, a->D), factor, a->w, d);
      if (z) v = vmulq_f32(v, q3n_silu4(q3n_load_upto(z, d, a->D)));
      q3n_store_upto(y, d, a->D, v);
    }
  }
  return Q3N_OK;
}
