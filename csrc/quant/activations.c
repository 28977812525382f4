#include "activations.h"

#include "../base/check.h"
#include "activations_block.h"

q3n_status q3n_activations_check(const q3n_activations_args *a) {
  Q3N_REFUSE(!a, NULL, ARGS);
  Q3N_REFUSE(a->struct_bytes != sizeof *a, ABI, STRUCT_BYTES);
  Q3N_REFUSE(a->dtype != Q3N_Q8_X32 && a->dtype != Q3N_Q8_X256, DTYPE, DTYPE);
  Q3N_REFUSE(a->rows < 0, SIZE, R);
  Q3N_REFUSE(a->N < 0 || a->N % q3n_dtype_block(a->dtype), SIZE, N);

  const q3n_axis x[] = {{a->rows, a->x_row}, {a->N, 1}}, y[] = {{a->rows, a->N}, {a->N, 1}};
  const int64_t nx = q3n_extent(x, 2), ny = q3n_extent(y, 2);
  Q3N_REFUSE(nx < 0, STRIDE, X);
  Q3N_REFUSE(ny < 0, SIZE, N);
  if (nx == 0) return Q3N_OK;

  Q3N_REFUSE(!a->y, NULL, Y);
  Q3N_REFUSE((uintptr_t)a->y % 4, VALUE, Y);
  Q3N_REFUSE(!a->x, NULL, X);
  Q3N_REFUSE(q3n_overlap(a->y, q3n_dtype_bytes(a->dtype, ny), a->x, nx * 4), ALIAS, Y);
  return Q3N_OK;
}

int64_t q3n_activations_items(const q3n_activations_args *a) { return a->N ? a->rows : 0; }

int64_t q3n_activations_no_scratch(const q3n_activations_args *a) {
  (void)a;
  return 0;
}

#include "activations.inc"
Q3N_DEFINE_OPERATOR(activations, Q3N_ACTIVATIONS_VARIANTS)
Q3N_DEFINE_BEST_FIRST(activations)
