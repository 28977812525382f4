/* Forward substitution by tiles over the vectors of csrc/simd: TALL rows of a panel of columns stay in registers while
   all finished rows are subtracted from them, then the tile's own triangle is solved there. The finished rows of the
   panel are kept in scratch, one behind the other. */
#include "../base/check.h"
#include "solve_tri_block.h"

enum {
  LANES = Q3N_LANES,
  WIDE = 2,             /* vectors across a tile */
  TALL = LANES / 2,     /* its rows */
  PANEL = WIDE * LANES  /* columns of an item */
};

static inline int64_t panel_items(const q3n_solve_tri_args *a) {
  return a->n ? a->batch * q3n_ceil_div(a->m, PANEL) : 0;
}

static inline int64_t panel_scratch(const q3n_solve_tri_args *a) {
  return q3n_align(q3n_ceil_div(a->n, TALL) * TALL * PANEL * 4);
}

/* acc -= L x over the finished rows from .. to - 1; l[m] is row m of the tile. */
static inline void subtract_rows(q3n_v acc[TALL][WIDE], const float *const l[TALL], const float *x, int64_t from,
                                 int64_t to) {
  for (int64_t j = from; j < to; j++) {
    const q3n_v x0 = q3n_v_load(x + j * PANEL), x1 = q3n_v_load(x + j * PANEL + LANES);
    for (int m = 0; m < TALL; m++) {
      const q3n_v lm = q3n_v_set(l[m][j]);
      acc[m][0] = q3n_v_nfma(lm, x0, acc[m][0]);
      acc[m][1] = q3n_v_nfma(lm, x1, acc[m][1]);
    }
  }
}

/* The tile's own triangle, `tall` rows from row i on. Right of the diagonal an inverse is exactly 0, whatever l holds.
   */
static inline void substitute(q3n_v acc[TALL][WIDE], const float *const l[TALL], int64_t i, int64_t tall, int unit,
                              int inverse, int64_t first) {
  for (int r = 0; r < TALL; r++) {
    if (r >= tall) break;
    for (int w = 0; w < WIDE; w++) {
      if (!unit) acc[r][w] = q3n_v_div(acc[r][w], q3n_v_set(l[r][i + r]));
      if (inverse) {
        const q3n_v_mask below = q3n_v_first(i + r + 1 - first - w * LANES);
        acc[r][w] = q3n_v_select(below, acc[r][w], q3n_v_zero());
      }
    }
    for (int m = r + 1; m < TALL; m++)
      if (m < tall) {
        const q3n_v lm = q3n_v_set(l[m][i + r]);
        for (int w = 0; w < WIDE; w++) acc[m][w] = q3n_v_nfma(lm, acc[r][w], acc[m][w]);
      }
  }
}

/* Rows i .. i + tall - 1 of a panel of `width` columns from `first` on. */
static inline void solve_tile(const q3n_solve_tri_args *a, int64_t entry, int64_t first, int64_t width, int64_t i,
                              int64_t tall, int64_t from, float *kept) {
  const q3n_v_mask low = q3n_v_first(width), high = q3n_v_first(width - LANES);
  const float *l[TALL];
  q3n_v acc[TALL][WIDE];
  for (int m = 0; m < TALL; m++) {
    /* Rows that the last tile lacks repeat its last one, and are not stored. */
    const int64_t row = m < tall ? i + m : i + tall - 1;
    l[m] = a->l + entry * a->l_batch + row * a->l_row;
    if (a->b) {
      const float *b = a->b + entry * a->b_batch + row * a->b_row + first;
      acc[m][0] = q3n_v_load_some(low, b);
      acc[m][1] = q3n_v_load_some(high, b + LANES);
    } else {
      for (int w = 0; w < WIDE; w++) {
        const int64_t column = row - first - w * LANES;
        const q3n_v upto = q3n_v_select(q3n_v_first(column + 1), q3n_v_set(1.0f), q3n_v_zero());
        acc[m][w] = q3n_v_select(q3n_v_first(column), q3n_v_zero(), upto);
      }
    }
  }
  subtract_rows(acc, l, kept, from, i);
  if (a->unit_diagonal)
    substitute(acc, l, i, tall, 1, !a->b, first);
  else
    substitute(acc, l, i, tall, 0, !a->b, first);
  for (int m = 0; m < TALL; m++) {
    if (m >= tall) break;
    float *x = a->x + entry * a->x_batch + (i + m) * a->x_row + first;
    for (int w = 0; w < WIDE; w++) q3n_v_store(kept + (i + m) * PANEL + w * LANES, acc[m][w]);
    q3n_v_store_some(x, low, acc[m][0]);
    q3n_v_store_some(x + LANES, high, acc[m][1]);
  }
}

static inline q3n_status run_panels(const q3n_solve_tri_args *a, int64_t begin, int64_t end, void *scratch) {
  const int64_t panels = q3n_ceil_div(a->m, PANEL);
  for (int64_t item = begin; item < end; item++) {
    const int64_t entry = item / panels, first = item % panels * PANEL;
    const int64_t width = a->m - first < PANEL ? a->m - first : PANEL;
    /* The inverse's columns are 0 above row `first`. */
    const int64_t from = a->b ? 0 : first;
    for (int64_t i = 0; i < from; i++) {
      float *x = a->x + entry * a->x_batch + i * a->x_row + first;
      q3n_v_store_some(x, q3n_v_first(width), q3n_v_zero());
      q3n_v_store_some(x + LANES, q3n_v_first(width - LANES), q3n_v_zero());
    }
    int64_t i = from;
    for (; i + TALL <= a->n; i += TALL) solve_tile(a, entry, first, width, i, TALL, from, scratch);
    if (i < a->n) solve_tile(a, entry, first, width, i, a->n - i, from, scratch);
  }
  return Q3N_OK;
}
