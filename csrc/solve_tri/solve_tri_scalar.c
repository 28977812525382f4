/* Forward substitution by rows, a block of columns at a time so that the finished rows of X stay in the first cache. */
#include "../base/check.h"
#include "solve_tri_block.h"

q3n_status q3n_solve_tri_scalar(const q3n_solve_tri_args *a, int64_t begin, int64_t end, void *scratch);

q3n_status q3n_solve_tri_scalar(const q3n_solve_tri_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  const int64_t blocks = q3n_ceil_div(a->m, Q3N_SOLVE_TRI_COLUMNS);
  for (int64_t item = begin; item < end; item++) {
    const int64_t entry = item / blocks, first = item % blocks * Q3N_SOLVE_TRI_COLUMNS;
    const int64_t width = a->m - first < Q3N_SOLVE_TRI_COLUMNS ? a->m - first : Q3N_SOLVE_TRI_COLUMNS;
    const float *l = a->l + entry * a->l_batch;
    float *x = a->x + entry * a->x_batch + first;

    for (int64_t i = 0; i < a->n; i++) {
      float acc[Q3N_SOLVE_TRI_COLUMNS];
      for (int64_t c = 0; c < width; c++)
        acc[c] = a->b ? a->b[entry * a->b_batch + i * a->b_row + first + c] : (first + c == i ? 1.0f : 0.0f);

      for (int64_t j = 0; j < i; j++) {
        const float lij = l[i * a->l_row + j];
        const float *xj = x + j * a->x_row;
        for (int64_t c = 0; c < width; c++) acc[c] -= lij * xj[c];
      }

      float *xi = x + i * a->x_row;
      for (int64_t c = 0; c < width; c++) xi[c] = a->unit_diagonal ? acc[c] : acc[c] / l[i * a->l_row + i];
      /* The inverse is lower triangular: above the diagonal 0 * inf must not become NaN. */
      if (!a->b)
        for (int64_t c = 0; c < width; c++)
          if (first + c > i) xi[c] = 0.0f;
    }
  }
  return Q3N_OK;
}
