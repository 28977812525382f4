/* 32 rows of w are decoded once, then every row of x meets them, three at a time. */
#include "f32_tile_avx512.h"

q3n_status q3n_matmul_avx512(const q3n_matmul_args *a, int64_t begin, int64_t end, void *scratch);

q3n_status q3n_matmul_avx512(const q3n_matmul_args *a, int64_t begin, int64_t end, void *scratch) {
  float *decoded = (float *)scratch + Q3N_TILE_ROWS * a->K;
  for (int64_t item = begin; item < end; item++) {
    const int64_t first = item * Q3N_TILE_ROWS;
    const int64_t count = a->N - first < Q3N_TILE_ROWS ? a->N - first : Q3N_TILE_ROWS;
    const float *w[Q3N_TILE_ROWS];
    q3n_tile_rows(w, count, a->w, a->dtype, first, a->w_n, a->K, scratch);

    for (int64_t m = 0; m < a->M; m += Q3N_F32_TOKENS) {
      const int64_t tokens = a->M - m < Q3N_F32_TOKENS ? a->M - m : Q3N_F32_TOKENS;
      const float *x[Q3N_F32_TOKENS];
      float y[Q3N_F32_TOKENS * Q3N_TILE_ROWS];
      for (int64_t t = 0; t < tokens; t++)
        x[t] = q3n_floats(a->x, a->x_dtype, (m + t) * a->x_m, a->K, decoded + t * a->K);
      q3n_f32_tiles(y, w, count, x, a->K, tokens);
      for (int64_t t = 0; t < tokens; t++)
        memcpy(a->y + (m + t) * a->y_m + first, y + t * Q3N_TILE_ROWS, (size_t)count * sizeof *y);
    }
  }
  return Q3N_OK;
}
