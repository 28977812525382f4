/* Forward substitution, four rows at a time over sixteen columns: sixteen sums stay in registers while every finished
   row of X passes once. An element's sum takes the finished rows from the first on, whatever the blocking. */
#include "../base/check.h"
#include "../simd/neon.h"
#include "solve_tri_block.h"

q3n_status q3n_solve_tri_neon(const q3n_solve_tri_args *a, int64_t begin, int64_t end, void *scratch);

enum { COLUMNS = Q3N_SOLVE_TRI_COLUMNS, VECTORS = COLUMNS / 4, ROWS = 4, MAX_N = 256 };

/* One item: `width` columns from `first` on of a batch entry. x is [n][row]. */
typedef struct {
  const q3n_solve_tri_args *a;
  const float *l, *b; /* b NULL: the identity */
  float *x;
  int64_t x_row, first, width;
} block;

/* Row i of the right-hand side, columns past `width` 0. */
static inline void load_row(const block *s, int64_t i, float32x4_t acc[VECTORS]) {
  float row[COLUMNS] = {0.0f};
  if (!s->b)
    for (int64_t c = 0; c < COLUMNS; c++) row[c] = s->first + c == i ? 1.0f : 0.0f;
  else if (s->width < COLUMNS)
    memcpy(row, s->b + i * s->a->b_row, (size_t)s->width * sizeof *row);
  const float *from = s->b && s->width == COLUMNS ? s->b + i * s->a->b_row : row;
  for (int v = 0; v < VECTORS; v++) acc[v] = vld1q_f32(from + 4 * v);
}

/* acc - l x_j over the vectors of row j. */
static inline void subtract(float32x4_t acc[VECTORS], float l, const float32x4_t x[VECTORS]) {
  for (int v = 0; v < VECTORS; v++) acc[v] = vfmsq_n_f32(acc[v], x[v], l);
}

/* The division, and the store. */
static inline void finish_row(const block *s, int64_t i, float32x4_t acc[VECTORS]) {
  const float *l = s->l + i * s->a->l_row;
  if (!s->a->unit_diagonal)
    for (int v = 0; v < VECTORS; v++) acc[v] = vdivq_f32(acc[v], vdupq_n_f32(l[i]));
  /* The inverse is lower triangular: above the diagonal 0 * inf must not become NaN. */
  if (!s->b) {
    static const int32_t lane[4] = {0, 1, 2, 3};
    for (int v = 0; v < VECTORS; v++) {
      const int32x4_t column = vaddq_s32(vld1q_s32(lane), vdupq_n_s32((int32_t)s->first + 4 * v));
      const uint32x4_t below = vcleq_s32(column, vdupq_n_s32((int32_t)i));
      acc[v] = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(acc[v]), below));
    }
  }
  for (int v = 0; v < VECTORS; v++) vst1q_f32(s->x + i * s->x_row + 4 * v, acc[v]);
}

static inline void load_x(const block *s, int64_t j, float32x4_t x[VECTORS]) {
  for (int v = 0; v < VECTORS; v++) x[v] = vld1q_f32(s->x + j * s->x_row + 4 * v);
}

/* Rows i .. i + 3, i a multiple of 4. */
static void four_rows(const block *s, int64_t i) {
  const int64_t l_row = s->a->l_row;
  const float *l = s->l + i * l_row;
  float32x4_t acc[ROWS][VECTORS];
  for (int r = 0; r < ROWS; r++) load_row(s, i + r, acc[r]);
  for (int64_t j = 0; j < i; j++) {
    float32x4_t x[VECTORS];
    load_x(s, j, x);
    for (int r = 0; r < ROWS; r++) subtract(acc[r], l[r * l_row + j], x);
  }
  for (int r = 0; r < ROWS; r++) {
    for (int q = 0; q < r; q++) subtract(acc[r], l[r * l_row + i + q], acc[q]);
    finish_row(s, i + r, acc[r]);
  }
}

/* One of the up to three rows that are left. */
static void one_row(const block *s, int64_t i) {
  float32x4_t acc[VECTORS], x[VECTORS];
  load_row(s, i, acc);
  for (int64_t j = 0; j < i; j++) {
    load_x(s, j, x);
    subtract(acc, s->l[i * s->a->l_row + j], x);
  }
  finish_row(s, i, acc);
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
