#include "repack.h"

#include "../base/check.h"
#include "repack_group.h"

q3n_status q3n_repack_check(const q3n_repack_args *a) {
  Q3N_REFUSE(!a, NULL, ARGS);
  Q3N_REFUSE(a->struct_bytes != sizeof *a, ABI, STRUCT_BYTES);
  const int64_t block = q3n_dtype_block(a->dtype);
  Q3N_REFUSE(!q3n_dtype_block((q3n_dtype)(a->dtype | Q3N_R16)) || a->dtype & Q3N_R16, DTYPE, DTYPE);
  Q3N_REFUSE(a->rows < 0 || a->rows % Q3N_GROUP, SIZE, R);
  Q3N_REFUSE(a->N < 0 || a->N % block, SIZE, N);

  const q3n_axis x[] = {{a->rows, a->x_row}, {a->N, 1}}, y[] = {{a->rows, a->N}, {a->N, 1}};
  const int64_t nx = q3n_extent(x, 2), ny = q3n_extent(y, 2);
  Q3N_REFUSE(nx < 0 || (nx > 0 && a->rows > 1 && a->x_row % block), STRIDE, X);
  Q3N_REFUSE(ny < 0, SIZE, N);
  if (nx == 0) return Q3N_OK;

  Q3N_REFUSE(!a->y, NULL, Y);
  Q3N_REFUSE(!a->x, NULL, X);
  Q3N_REFUSE(q3n_overlap(a->y, q3n_dtype_bytes(a->dtype, ny), a->x, q3n_dtype_bytes(a->dtype, nx)), ALIAS, Y);
  return Q3N_OK;
}

int64_t q3n_repack_items(const q3n_repack_args *a) { return a->N ? a->rows / Q3N_GROUP : 0; }

int64_t q3n_repack_no_scratch(const q3n_repack_args *a) {
  (void)a;
  return 0;
}

#include "repack.inc"
Q3N_DEFINE_OPERATOR(repack, Q3N_REPACK_VARIANTS)
Q3N_DEFINE_BEST_FIRST(repack)
