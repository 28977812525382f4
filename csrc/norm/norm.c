#include "norm.h"

#include "../base/check.h"
#include "norm_rows.h"

q3n_status q3n_norm_check(const q3n_norm_args *a) {
  Q3N_REFUSE(!a, NULL, ARGS);
  Q3N_REFUSE(a->struct_bytes != sizeof *a, ABI, STRUCT_BYTES);
  Q3N_REFUSE(a->T < 0, SIZE, T);
  Q3N_REFUSE(a->H < 0, SIZE, H);
  Q3N_REFUSE(a->D < 0, SIZE, D);
  Q3N_REFUSE(a->kind != Q3N_NORM_RMS && a->kind != Q3N_NORM_RMS_PLUS1 && a->kind != Q3N_NORM_RMS_GATED &&
                 a->kind != Q3N_NORM_L2,
             VALUE, KIND);
  Q3N_REFUSE(!(a->eps >= 0.0f), VALUE, EPS);
  Q3N_REFUSE(a->kind == Q3N_NORM_L2 && a->w, VALUE, W);
  Q3N_REFUSE(a->kind != Q3N_NORM_RMS_GATED && a->z, VALUE, Z);

  const q3n_axis y[] = {{a->T, a->y_t}, {a->H, a->y_h}, {a->D, 1}};
  const q3n_axis x[] = {{a->T, a->x_t}, {a->H, a->x_h}, {a->D, 1}};
  const q3n_axis z[] = {{a->T, a->z_t}, {a->H, a->z_h}, {a->D, 1}};
  int64_t ny = q3n_extent(y, 3), nx = q3n_extent(x, 3), nz = a->z ? q3n_extent(z, 3) : 0;
  Q3N_REFUSE(ny < 0 || !q3n_disjoint(y, 3), STRIDE, Y);
  Q3N_REFUSE(nx < 0, STRIDE, X);
  Q3N_REFUSE(nz < 0, STRIDE, Z);
  if (ny == 0) return Q3N_OK;

  Q3N_REFUSE(!a->y, NULL, Y);
  Q3N_REFUSE(!a->x, NULL, X);
  Q3N_REFUSE(a->kind == Q3N_NORM_RMS_PLUS1 && !a->w, NULL, W);
  Q3N_REFUSE(a->kind == Q3N_NORM_RMS_GATED && !a->z, NULL, Z);
  int in_place = a->y == a->x && a->y_t == a->x_t && a->y_h == a->x_h;
  Q3N_REFUSE(!in_place && q3n_overlap(a->y, ny * 4, a->x, nx * 4), ALIAS, Y);
  Q3N_REFUSE(a->w && q3n_overlap(a->y, ny * 4, a->w, a->D * 4), ALIAS, Y);
  Q3N_REFUSE(q3n_overlap(a->y, ny * 4, a->z, nz * 4), ALIAS, Y);
  return Q3N_OK;
}

/* No overflow: the elements of y do not overlap, so T * H * D is at most its extent. */
int64_t q3n_norm_items(const q3n_norm_args *a) { return a->D ? a->T * a->H : 0; }

int64_t q3n_norm_no_scratch(const q3n_norm_args *a) {
  (void)a;
  return 0;
}

#include "norm.inc"
Q3N_DEFINE_OPERATOR(norm, Q3N_NORM_VARIANTS)
Q3N_DEFINE_BEST_FIRST(norm)
