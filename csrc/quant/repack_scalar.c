/* Block by block, row by row. */
#include "repack_group.h"

q3n_status q3n_repack_scalar(const q3n_repack_args *a, int64_t begin, int64_t end, void *scratch);

q3n_status q3n_repack_scalar(const q3n_repack_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  const int64_t bytes = q3n_dtype_block_bytes(a->dtype), blocks = a->N / q3n_dtype_block(a->dtype);
  const int64_t x_row = a->x_row / q3n_dtype_block(a->dtype) * bytes;
  uint8_t block[Q3N_BLOCK_BYTES_MAX];
  for (int64_t item = begin; item < end; item++)
    for (int64_t b = 0; b < blocks; b++)
      for (int64_t row = 0; row < Q3N_GROUP; row++) {
        memcpy(block, (const uint8_t *)a->x + (item * Q3N_GROUP + row) * x_row + b * bytes, (size_t)bytes);
        q3n_group_copy((uint8_t *)a->y + (item * blocks + b) * Q3N_GROUP * bytes, block, a->dtype, row, 1);
      }
  return Q3N_OK;
}
