#include "matmul.h"

#include "../base/check.h"
#include "../quant/repack_group.h"
#include "matmul_block.h"

q3n_status q3n_matmul_check(const q3n_matmul_args *a) {
  Q3N_REFUSE(!a, NULL, ARGS);
  Q3N_REFUSE(a->struct_bytes != sizeof *a, ABI, STRUCT_BYTES);
  const int64_t block = q3n_dtype_block(a->dtype);
  Q3N_REFUSE(block == 0 || q3n_dtype_rows(a->dtype) >= Q3N_Q8_X32, DTYPE, DTYPE);
  Q3N_REFUSE(a->x_dtype != Q3N_F32 && a->x_dtype != q3n_dtype_activations(a->dtype), DTYPE, X);
  Q3N_REFUSE(a->M < 0, SIZE, M);
  Q3N_REFUSE(a->N < 0 || (a->dtype & Q3N_R16 && a->N % Q3N_GROUP), SIZE, N);
  /* 2^48: so that no scratch size overflows */
  Q3N_REFUSE(a->K < 0 || a->K >> 48 || a->K % block, SIZE, K);

  const q3n_axis y[] = {{a->M, a->y_m}, {a->N, 1}};
  const q3n_axis x[] = {{a->M, a->x_m}, {a->K, 1}};
  const q3n_axis w[] = {{a->N, a->w_n}, {a->K, 1}};
  int64_t ny = q3n_extent(y, 2), nx = q3n_extent(x, 2), nw = q3n_extent(w, 2);
  Q3N_REFUSE(ny < 0 || !q3n_disjoint(y, 2), STRIDE, Y);
  Q3N_REFUSE(nx < 0 || (nx > 0 && a->M > 1 && a->x_m % q3n_dtype_block(a->x_dtype)), STRIDE, X);
  Q3N_REFUSE(nw > 0 && a->dtype & Q3N_R16 && a->w_n != a->K, STRIDE, W);
  Q3N_REFUSE(nw < 0 || (nw > 0 && a->N > 1 && a->w_n % block), STRIDE, W);
  if (ny == 0) return Q3N_OK;

  Q3N_REFUSE(!a->y, NULL, Y);
  Q3N_REFUSE(nx > 0 && !a->x, NULL, X);
  Q3N_REFUSE(nx > 0 && (uintptr_t)a->x % 4, VALUE, X);
  Q3N_REFUSE(nw > 0 && !a->w, NULL, W);
  Q3N_REFUSE(q3n_overlap(a->y, ny * 4, a->x, q3n_dtype_bytes(a->x_dtype, nx)), ALIAS, Y);
  Q3N_REFUSE(q3n_overlap(a->y, ny * 4, a->w, q3n_dtype_bytes(a->dtype, nw)), ALIAS, Y);
  return Q3N_OK;
}

int64_t q3n_matmul_items(const q3n_matmul_args *a) { return a->M ? q3n_ceil_div(a->N, Q3N_MATMUL_ROWS) : 0; }

int64_t q3n_matmul_row_scratch(const q3n_matmul_args *a) {
  return q3n_align((Q3N_MATMUL_ROWS + 1) * a->K * (int64_t)sizeof(float));
}

int64_t q3n_matmul_tile_items(const q3n_matmul_args *a) { return a->M ? q3n_ceil_div(a->N, Q3N_TILE_ROWS) : 0; }

int64_t q3n_matmul_tile_scratch(const q3n_matmul_args *a) {
  return q3n_align((Q3N_TILE_ROWS + Q3N_F32_TOKENS) * a->K * (int64_t)sizeof(float));
}

#include "matmul.inc"
Q3N_DEFINE_OPERATOR(matmul, Q3N_MATMUL_VARIANTS)
Q3N_DEFINE_BEST_FIRST(matmul)
