/* Forward substitution, four rows at a time over sixteen columns: sixteen sums stay in registers while every finished
   row of X passes once. An element's sum takes the finished rows from the first on, whatever the blocking. */
#include <string.h>

#include "../base/check.h"
#include "../simd/neon.h"
#include "solve_tri_block.h"

q3n_status q3n_solve_tri_neon(const q3n_solve_tri_args *a, int64_t begin, int64_t end, void *scratch);

enum { COLUMNS = Q3N_SOLVE_TRI_COLUMNS, ROWS = 4, MAX_N = 256 };
_Static_assert(COLUMNS == 16, "row16 holds a row of the block");

/* One item: `width` columns from `first` on of a batch entry. x is [n][row]. */
typedef struct {
  const q3n_solve_tri_args *a;
  const float *l, *b; /* b NULL: the identity */
  float *x;
  int64_t x_row, first, width;
} block;

/* A row of the block, by value: it stays in registers. */
typedef struct {
  float32x4_t a, b, c, d;
} row16;

static inline row16 load16(const float *x) {
  return (row16){vld1q_f32(x), vld1q_f32(x + 4), vld1q_f32(x + 8), vld1q_f32(x + 12)};
}

/* Row i of the right-hand side, columns past `width` 0. */
static inline row16 right_side(const block *s, int64_t i) {
  if (s->b && s->width == COLUMNS) return load16(s->b + i * s->a->b_row);
  float row[COLUMNS] = {0.0f};
  if (s->b)
    memcpy(row, s->b + i * s->a->b_row, (size_t)s->width * sizeof *row);
  else if (i >= s->first && i < s->first + COLUMNS)
    row[i - s->first] = 1.0f;
  return load16(row);
}

/* sum - l x. */
static inline row16 subtract(row16 sum, float l, row16 x) {
  return (row16){vfmsq_n_f32(sum.a, x.a, l), vfmsq_n_f32(sum.b, x.b, l), vfmsq_n_f32(sum.c, x.c, l),
                 vfmsq_n_f32(sum.d, x.d, l)};
}

/* Zeros right of column i. */
static inline float32x4_t until(float32x4_t x, int64_t first, int64_t i) {
  static const int32_t lane[4] = {0, 1, 2, 3};
  const int32x4_t column = vaddq_s32(vld1q_s32(lane), vdupq_n_s32((int32_t)first));
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), vcleq_s32(column, vdupq_n_s32((int32_t)i))));
}

/* The division, and the store; returns row i of X. */
static inline row16 finish(const block *s, int64_t i, row16 x) {
  if (!s->a->unit_diagonal) {
    const float32x4_t l = vdupq_n_f32(s->l[i * s->a->l_row + i]);
    x = (row16){vdivq_f32(x.a, l), vdivq_f32(x.b, l), vdivq_f32(x.c, l), vdivq_f32(x.d, l)};
  }
  /* The inverse is lower triangular: above the diagonal 0 * inf must not become NaN. */
  if (!s->b)
    x = (row16){until(x.a, s->first, i), until(x.b, s->first + 4, i), until(x.c, s->first + 8, i),
                until(x.d, s->first + 12, i)};
  float *to = s->x + i * s->x_row;
  vst1q_f32(to, x.a);
  vst1q_f32(to + 4, x.b);
  vst1q_f32(to + 8, x.c);
  vst1q_f32(to + 12, x.d);
  return x;
}

/* Rows i .. i + 3. */
static void four_rows(const block *s, int64_t i) {
  const int64_t l_row = s->a->l_row;
  const float *l0 = s->l + i * l_row, *l1 = l0 + l_row, *l2 = l1 + l_row, *l3 = l2 + l_row;
  row16 x0 = right_side(s, i), x1 = right_side(s, i + 1), x2 = right_side(s, i + 2), x3 = right_side(s, i + 3);
  for (int64_t j = 0; j < i; j++) {
    const row16 x = load16(s->x + j * s->x_row);
    x0 = subtract(x0, l0[j], x);
    x1 = subtract(x1, l1[j], x);
    x2 = subtract(x2, l2[j], x);
    x3 = subtract(x3, l3[j], x);
  }
  x0 = finish(s, i, x0);
  x1 = finish(s, i + 1, subtract(x1, l1[i], x0));
  x2 = finish(s, i + 2, subtract(subtract(x2, l2[i], x0), l2[i + 1], x1));
  finish(s, i + 3, subtract(subtract(subtract(x3, l3[i], x0), l3[i + 1], x1), l3[i + 2], x2));
}

/* One of the up to three rows that are left. */
static void one_row(const block *s, int64_t i) {
  row16 x = right_side(s, i);
  for (int64_t j = 0; j < i; j++) x = subtract(x, s->l[i * s->a->l_row + j], load16(s->x + j * s->x_row));
  finish(s, i, x);
}

q3n_status q3n_solve_tri_neon(const q3n_solve_tri_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  const int64_t blocks = q3n_ceil_div(a->m, COLUMNS);
  for (int64_t item = begin; item < end; item++) {
    const int64_t entry = item / blocks, first = item % blocks * COLUMNS;
    const int64_t width = a->m - first < COLUMNS ? a->m - first : COLUMNS;
    float *x = a->x + entry * a->x_batch + first;
    /* Fewer columns than a block are solved among zeros, in a place of their own: those beside them are not ours. */
    float own[MAX_N * COLUMNS];
    const block s = {.a = a, .l = a->l + entry * a->l_batch, .b = a->b ? a->b + entry * a->b_batch + first : NULL,
                     .x = width < COLUMNS ? own : x, .x_row = width < COLUMNS ? COLUMNS : a->x_row,
                     .first = first, .width = width};
    int64_t i = 0;
    for (; i + ROWS <= a->n; i += ROWS) four_rows(&s, i);
    for (; i < a->n; i++) one_row(&s, i);
    if (width < COLUMNS)
      for (i = 0; i < a->n; i++) memcpy(x + i * a->x_row, own + i * COLUMNS, (size_t)width * sizeof *x);
  }
  return Q3N_OK;
}
