#include "quant.h"

#include "../base/check.h"
#include "quant_block.h"

/* Interleaved weights and activations have operators of their own. */
static int is_row_type(q3n_dtype dtype) { return dtype == q3n_dtype_rows(dtype) && dtype < Q3N_Q8_X32; }

q3n_status q3n_dequantize_check(const q3n_dequantize_args *a) {
  Q3N_REFUSE(!a, NULL, ARGS);
  Q3N_REFUSE(a->struct_bytes != sizeof *a, ABI, STRUCT_BYTES);
  const int64_t block = q3n_dtype_block(a->dtype);
  Q3N_REFUSE(block == 0 || !is_row_type(a->dtype), DTYPE, DTYPE);
  Q3N_REFUSE(a->rows < 0, SIZE, R);
  Q3N_REFUSE(a->N < 0 || a->N % block, SIZE, N);

  const q3n_axis y[] = {{a->rows, a->y_row}, {a->N, 1}};
  const q3n_axis x[] = {{a->rows, a->x_row}, {a->N, 1}};
  int64_t ny = q3n_extent(y, 2), nx = q3n_extent(x, 2);
  Q3N_REFUSE(ny < 0 || !q3n_disjoint(y, 2), STRIDE, Y);
  Q3N_REFUSE(nx < 0 || (nx > 0 && a->rows > 1 && a->x_row % block), STRIDE, X);
  if (ny == 0) return Q3N_OK;

  Q3N_REFUSE(!a->y, NULL, Y);
  Q3N_REFUSE(!a->x, NULL, X);
  Q3N_REFUSE(q3n_overlap(a->y, ny * 4, a->x, q3n_dtype_bytes(a->dtype, nx)), ALIAS, Y);
  return Q3N_OK;
}

q3n_status q3n_quantize_check(const q3n_quantize_args *a) {
  Q3N_REFUSE(!a, NULL, ARGS);
  Q3N_REFUSE(a->struct_bytes != sizeof *a, ABI, STRUCT_BYTES);
  const int64_t block = q3n_dtype_block(a->dtype);
  Q3N_REFUSE(block == 0 || !is_row_type(a->dtype), DTYPE, DTYPE);
  Q3N_REFUSE(a->rows < 0, SIZE, R);
  Q3N_REFUSE(a->N < 0 || a->N % block, SIZE, N);

  const q3n_axis y[] = {{a->rows, a->y_row}, {a->N, 1}};
  const q3n_axis x[] = {{a->rows, a->x_row}, {a->N, 1}};
  int64_t ny = q3n_extent(y, 2), nx = q3n_extent(x, 2);
  Q3N_REFUSE(ny < 0 || !q3n_disjoint(y, 2) || (a->rows > 1 && a->y_row % block), STRIDE, Y);
  Q3N_REFUSE(nx < 0, STRIDE, X);
  if (ny == 0) return Q3N_OK;

  Q3N_REFUSE(!a->y, NULL, Y);
  Q3N_REFUSE(!a->x, NULL, X);
  Q3N_REFUSE(q3n_overlap(a->y, q3n_dtype_bytes(a->dtype, ny), a->x, nx * 4), ALIAS, Y);
  return Q3N_OK;
}

int64_t q3n_dequantize_items(const q3n_dequantize_args *a) { return a->N ? a->rows : 0; }

int64_t q3n_dequantize_no_scratch(const q3n_dequantize_args *a) {
  (void)a;
  return 0;
}

int64_t q3n_quantize_items(const q3n_quantize_args *a) { return a->N ? a->rows : 0; }

int64_t q3n_quantize_no_scratch(const q3n_quantize_args *a) {
  (void)a;
  return 0;
}

#include "quant.inc"
Q3N_DEFINE_OPERATOR(dequantize, Q3N_DEQUANTIZE_VARIANTS)
Q3N_DEFINE_BEST_FIRST(dequantize)
Q3N_DEFINE_OPERATOR(quantize, Q3N_QUANTIZE_VARIANTS)
Q3N_DEFINE_BEST_FIRST(quantize)
