#include "repack_avx512.h"

q3n_status q3n_repack_avx512(const q3n_repack_args *a, int64_t begin, int64_t end, void *scratch);

q3n_status q3n_repack_avx512(const q3n_repack_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  const int64_t bytes = q3n_dtype_block_bytes(a->dtype), blocks = a->N / q3n_dtype_block(a->dtype);
  const int64_t x_row = a->x_row / q3n_dtype_block(a->dtype) * bytes;
  for (int64_t item = begin; item < end; item++) {
    const uint8_t *row[Q3N_GROUP];
    for (int i = 0; i < Q3N_GROUP; i++) row[i] = (const uint8_t *)a->x + (item * Q3N_GROUP + i) * x_row;
    q3n_interleave((uint8_t *)a->y + item * Q3N_GROUP * blocks * bytes, row, a->dtype, blocks);
  }
  return Q3N_OK;
}
