/* 8-bit activations against the blocks themselves: every tile of 32 rows of w passes all rows of x while it lies in
   the second cache. Without integer activations, or for types that have no tile, the f32 form does it. */
#include "matmul_block.h"
#include "q8_groups_avx512.h"

q3n_status q3n_matmul_avx512(const q3n_matmul_args *a, int64_t begin, int64_t end, void *scratch);
q3n_status q3n_matmul_avx512vnni(const q3n_matmul_args *a, int64_t begin, int64_t end, void *scratch);

q3n_status q3n_matmul_avx512vnni(const q3n_matmul_args *a, int64_t begin, int64_t end, void *scratch) {
  const q3n_dtype type = q3n_dtype_rows(a->dtype);
  if (a->x_dtype == Q3N_F32 || !q3n_q8_tile_avx512vnni(type, 1)) return q3n_matmul_avx512(a, begin, end, scratch);

  const int64_t blocks = a->K / q3n_dtype_block(type);
  for (int64_t item = begin; item < end; item++) {
    const int64_t first = item * Q3N_TILE_ROWS;
    const int64_t count = a->N - first < Q3N_TILE_ROWS ? a->N - first : Q3N_TILE_ROWS;
    const q3n_groups w = q3n_groups_of(a->w, a->dtype, first, count, a->w_n, a->K, scratch);
    const uint8_t *next = q3n_groups_next(a->w, a->dtype, first + Q3N_TILE_ROWS, a->N, a->w_n, a->K, w.group[0]);
    for (int64_t m = 0, tokens; m < a->M; m += tokens) {
      tokens = q3n_q8_take(a->M - m);
      const uint8_t *x[Q3N_Q8_TOKENS];
      float y[Q3N_Q8_TOKENS * Q3N_TILE_ROWS];
      for (int64_t t = 0; t < tokens; t++) x[t] = q3n_element(a->x, a->x_dtype, (m + t) * a->x_m);
      q3n_q8_tile_avx512vnni(type, tokens)(y, w.group[0], w.group[1], x, blocks, m + tokens < a->M ? w.group[0] : next);
      for (int64_t t = 0; t < tokens; t++)
        memcpy(a->y + (m + t) * a->y_m + first, y + t * Q3N_TILE_ROWS, (size_t)count * sizeof *y);
    }
  }
  return Q3N_OK;
}
