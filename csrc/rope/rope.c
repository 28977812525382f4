#include "rope.h"

#include <math.h>

#include "../base/check.h"
#include "rope_token.h"

q3n_status q3n_rope_check(const q3n_rope_args *a) {
  Q3N_REFUSE(!a, NULL, ARGS);
  Q3N_REFUSE(a->struct_bytes != sizeof *a, ABI, STRUCT_BYTES);
  Q3N_REFUSE(a->T < 0, SIZE, T);
  Q3N_REFUSE(a->H < 0, SIZE, H);
  Q3N_REFUSE(a->D < 0, SIZE, D);
  Q3N_REFUSE(a->R < 0 || a->R > a->D || a->R % 2, SIZE, R);
  Q3N_REFUSE(!(a->base > 0.0) || isinf(a->base), VALUE, BASE);

  const q3n_axis y[] = {{a->T, a->y_t}, {a->H, a->y_h}, {a->D, 1}};
  const q3n_axis x[] = {{a->T, a->x_t}, {a->H, a->x_h}, {a->D, 1}};
  int64_t ny = q3n_extent(y, 3), nx = q3n_extent(x, 3);
  Q3N_REFUSE(ny < 0 || !q3n_disjoint(y, 3), STRIDE, Y);
  Q3N_REFUSE(nx < 0, STRIDE, X);
  if (ny == 0) return Q3N_OK;

  Q3N_REFUSE(!a->y, NULL, Y);
  Q3N_REFUSE(!a->x, NULL, X);
  Q3N_REFUSE(!a->pos, NULL, POS);
  int in_place = a->y == a->x && a->y_t == a->x_t && a->y_h == a->x_h;
  Q3N_REFUSE(!in_place && q3n_overlap(a->y, ny * 4, a->x, nx * 4), ALIAS, Y);
  Q3N_REFUSE(q3n_overlap(a->y, ny * 4, a->pos, a->T * 8), ALIAS, Y);
  for (int64_t t = 0; t < a->T; t++) Q3N_REFUSE(a->pos[t] < 0, VALUE, POS);
  return Q3N_OK;
}

int64_t q3n_rope_items(const q3n_rope_args *a) { return a->H && a->D ? a->T : 0; }

int64_t q3n_rope_scratch(const q3n_rope_args *a) {
  return q3n_rope_items(a) ? q3n_align(a->R / 2 * 8) + q3n_align(a->R * 4) : 0;
}

#include "rope.inc"
Q3N_DEFINE_OPERATOR(rope, Q3N_ROPE_VARIANTS)
Q3N_DEFINE_BEST_FIRST(rope)
