/* Blocks to f32, a row at a time (csrc/quant/quant_blocks.h has the formats). */
#include "quant_block.h"
#include "quant_blocks.h"

q3n_status q3n_dequantize_scalar(const q3n_dequantize_args *a, int64_t begin, int64_t end, void *scratch);

q3n_status q3n_dequantize_scalar(const q3n_dequantize_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  for (int64_t row = begin; row < end; row++)
    q3n_row_to_float(a->dtype, q3n_element(a->x, a->dtype, row * a->x_row), a->y + row * a->y_row, a->N);
  return Q3N_OK;
}
