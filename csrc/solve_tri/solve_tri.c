#include "solve_tri.h"

#include "../base/check.h"
#include "solve_tri_block.h"

q3n_status q3n_solve_tri_check(const q3n_solve_tri_args *a) {
  Q3N_REFUSE(!a, NULL, ARGS);
  Q3N_REFUSE(a->struct_bytes != sizeof *a, ABI, STRUCT_BYTES);
  Q3N_REFUSE(a->batch < 0, SIZE, B);
  Q3N_REFUSE(a->n < 0 || a->n > 256, SIZE, N);
  Q3N_REFUSE(a->m < 0 || (!a->b && a->m != a->n), SIZE, M);

  const q3n_axis x[] = {{a->batch, a->x_batch}, {a->n, a->x_row}, {a->m, 1}};
  const q3n_axis l[] = {{a->batch, a->l_batch}, {a->n, a->l_row}, {a->n, 1}};
  const q3n_axis b[] = {{a->batch, a->b_batch}, {a->n, a->b_row}, {a->m, 1}};
  int64_t nx = q3n_extent(x, 3), nl = q3n_extent(l, 3), nb = a->b ? q3n_extent(b, 3) : 0;
  Q3N_REFUSE(nx < 0 || !q3n_disjoint(x, 3), STRIDE, X);
  Q3N_REFUSE(nl < 0, STRIDE, L);
  Q3N_REFUSE(nb < 0, STRIDE, RHS);
  if (nx == 0) return Q3N_OK;

  Q3N_REFUSE(!a->x, NULL, X);
  Q3N_REFUSE(!a->l, NULL, L);
  int in_place = a->x == a->b && a->x_batch == a->b_batch && a->x_row == a->b_row;
  Q3N_REFUSE(q3n_overlap(a->x, nx * 4, a->l, nl * 4), ALIAS, X);
  Q3N_REFUSE(!in_place && a->b && q3n_overlap(a->x, nx * 4, a->b, nb * 4), ALIAS, X);
  return Q3N_OK;
}

int64_t q3n_solve_tri_items(const q3n_solve_tri_args *a) {
  return a->n ? a->batch * q3n_ceil_div(a->m, Q3N_SOLVE_TRI_COLUMNS) : 0;
}

int64_t q3n_solve_tri_no_scratch(const q3n_solve_tri_args *a) {
  (void)a;
  return 0;
}

#include "solve_tri.inc"
Q3N_DEFINE_OPERATOR(solve_tri, Q3N_SOLVE_TRI_VARIANTS)
Q3N_DEFINE_BEST_FIRST(solve_tri)
