/* A block of rows of w is dequantised once, then every row of x meets it. */
#include "../base/check.h"
#include "dot.h"
#include "matmul_block.h"

q3n_status q3n_matmul_scalar(const q3n_matmul_args *a, int64_t begin, int64_t end, void *scratch);

q3n_status q3n_matmul_scalar(const q3n_matmul_args *a, int64_t begin, int64_t end, void *scratch) {
  float *decoded = (float *)scratch + Q3N_MATMUL_ROWS * a->K;
  for (int64_t item = begin; item < end; item++) {
    const int64_t first = item * Q3N_MATMUL_ROWS;
    const int64_t count = a->N - first < Q3N_MATMUL_ROWS ? a->N - first : Q3N_MATMUL_ROWS;
    const float *w[Q3N_MATMUL_ROWS];
    q3n_rows(w, count, a->w, a->dtype, first, a->w_n, a->K, scratch);

    for (int64_t m = 0; m < a->M; m++) {
      const float *x = q3n_floats(a->x, a->x_dtype, m * a->x_m, a->K, decoded);
      for (int64_t r = 0; r < count; r++) a->y[m * a->y_m + first + r] = q3n_dot(x, w[r], a->K);
    }
  }
  return Q3N_OK;
}
