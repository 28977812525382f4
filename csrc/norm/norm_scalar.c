/* One row after the other: the factor in double, then one rounding to float. */
#include <math.h>

#include "norm_rows.h"

q3n_status q3n_norm_scalar(const q3n_norm_args *a, int64_t begin, int64_t end, void *scratch);

/* Eight partial sums, so that the additions do not wait for each other. */
static double sum_of_squares(const float *x, int64_t n) {
  double part[8] = {0.0};
  int64_t d = 0;
  for (; d + 8 <= n; d += 8)
    for (int lane = 0; lane < 8; lane++) part[lane] += (double)x[d + lane] * (double)x[d + lane];
  for (; d < n; d++) part[d % 8] += (double)x[d] * (double)x[d];
  return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

static float silu(float z) { return z / (1.0f + expf(-z)); }

q3n_status q3n_norm_scalar(const q3n_norm_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  for (int64_t row = begin; row < end; row++) {
    const int64_t t = row / a->H, h = row % a->H;
    const float *x = a->x + t * a->x_t + h * a->x_h;
    float *y = a->y + t * a->y_t + h * a->y_h;

    const double squares = sum_of_squares(x, a->D);
    const double factor = 1.0 / sqrt((a->kind == Q3N_NORM_L2 ? squares : squares / (double)a->D) + (double)a->eps);

    /* The factor stays in double: of a row of subnormals it exceeds any float. */
    if (!a->w)
      for (int64_t d = 0; d < a->D; d++) y[d] = (float)((double)x[d] * factor);
    else if (a->kind == Q3N_NORM_RMS_PLUS1)
      for (int64_t d = 0; d < a->D; d++) y[d] = (float)((double)x[d] * factor * (1.0 + (double)a->w[d]));
    else
      for (int64_t d = 0; d < a->D; d++) y[d] = (float)((double)x[d] * factor * (double)a->w[d]);

    if (a->kind == Q3N_NORM_RMS_GATED) {
      const float *z = a->z + t * a->z_t + h * a->z_h;
      for (int64_t d = 0; d < a->D; d++) y[d] *= silu(z[d]);
    }
  }
  return Q3N_OK;
}
