/* Rows over the vectors of csrc/simd: as the scalar form, sums, factor and products in double and one rounding. A row
   is read twice, the second time from the first cache. */
#include <math.h>

#include "norm_rows.h"

enum { LANES = Q3N_LANES };

static inline q3n_v load_part(const float *p, int64_t left) {
  return left >= LANES ? q3n_v_load(p) : q3n_v_load_some(q3n_v_first(left), p);
}

/* Four sums in doubles, so that the additions do not wait for each other; missing elements add zeros. */
static inline double sum_of_squares(const float *x, int64_t n) {
  q3n_d sum[4] = {q3n_d_set(0.0), q3n_d_set(0.0), q3n_d_set(0.0), q3n_d_set(0.0)};
  for (int64_t d = 0; d < n; d += 2 * LANES) {
    const q3n_v a = load_part(x + d, n - d);
    const q3n_d a0 = q3n_d_low(a), a1 = q3n_d_high(a);
    sum[0] = q3n_d_fma(a0, a0, sum[0]);
    sum[1] = q3n_d_fma(a1, a1, sum[1]);
    if (n - d <= LANES) break;
    const q3n_v b = load_part(x + d + LANES, n - d - LANES);
    const q3n_d b0 = q3n_d_low(b), b1 = q3n_d_high(b);
    sum[2] = q3n_d_fma(b0, b0, sum[2]);
    sum[3] = q3n_d_fma(b1, b1, sum[3]);
  }
  return q3n_d_sum(q3n_d_add(q3n_d_add(sum[0], sum[1]), q3n_d_add(sum[2], sum[3])));
}

/* y = x factor, times w or 1 + w where w is there, times silu(z) where z is. */
static inline void scale_row(float *y, const float *x, const float *w, const float *z, int plus1, double factor,
                             int64_t n) {
  const q3n_d f = q3n_d_set(factor), one = q3n_d_set(1.0);
  for (int64_t d = 0; d < n; d += LANES) {
    const q3n_v xd = load_part(x + d, n - d);
    q3n_d low = q3n_d_mul(q3n_d_low(xd), f), high = q3n_d_mul(q3n_d_high(xd), f);
    if (w) {
      const q3n_v wd = load_part(w + d, n - d);
      const q3n_d w0 = q3n_d_low(wd), w1 = q3n_d_high(wd);
      low = q3n_d_mul(low, plus1 ? q3n_d_add(one, w0) : w0);
      high = q3n_d_mul(high, plus1 ? q3n_d_add(one, w1) : w1);
    }
    q3n_v yd = q3n_d_join(low, high);
    if (z) yd = q3n_v_mul(yd, q3n_v_silu(load_part(z + d, n - d)));
    if (n - d >= LANES)
      q3n_v_store(y + d, yd);
    else
      q3n_v_store_some(y + d, q3n_v_first(n - d), yd);
  }
}

static inline q3n_status run_rows(const q3n_norm_args *a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const int64_t t = row / a->H, h = row % a->H;
    const float *x = a->x + t * a->x_t + h * a->x_h;
    float *y = a->y + t * a->y_t + h * a->y_h;

    const double squares = sum_of_squares(x, a->D);
    /* The factor stays in double: of a row of subnormals it exceeds any float. */
    const double factor = 1.0 / sqrt((a->kind == Q3N_NORM_L2 ? squares : squares / (double)a->D) + (double)a->eps);
    const float *z = a->kind == Q3N_NORM_RMS_GATED ? a->z + t * a->z_t + h * a->z_h : NULL;
    if (z)
      scale_row(y, x, a->w, z, 0, factor, a->D);
    else
      scale_row(y, x, a->w, NULL, a->kind == Q3N_NORM_RMS_PLUS1, factor, a->D);
  }
  return Q3N_OK;
}
