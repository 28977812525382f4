/* Rows of w against up to three rows of x in f32, over the vectors of csrc/simd, which is included before this. Static
   inline: matmul and moe compile it. */
#ifndef Q3N_MATMUL_F32_TILE_SIMD_H
#define Q3N_MATMUL_F32_TILE_SIMD_H

#include "dot.h"
#include "matmul_block.h"

/* Rows of w in one tile: three sums of each, a row and three vectors of x fill the registers. */
enum { Q3N_F32_ROWS = Q3N_REGISTERS / 4 };

/* y[Q3N_F32_ROWS m + r] = x[m] . w[r]. A vector of running sums a dot, added as a tree: the bits depend on the two rows
   alone. */
static inline __attribute__((always_inline)) void q3n_f32_tile_of(float *y, const float *const *w,
                                                                  const float *const *x, int64_t n, const int tokens) {
  const float *x0 = x[0], *x1 = tokens > 1 ? x[1] : x0, *x2 = tokens > 2 ? x[2] : x0;
#define SUMS(m)                                                                                                      \
  q3n_v s##m##0 = q3n_v_zero(), s##m##1 = s##m##0, s##m##2 = s##m##0, s##m##3 = s##m##0, s##m##4 = s##m##0,          \
        s##m##5 = s##m##0, s##m##6 = s##m##0, s##m##7 = s##m##0;
  SUMS(0)
  SUMS(1)
  SUMS(2)
#undef SUMS
#define ROW(left, r)                                                       \
  if (r < Q3N_F32_ROWS) {                                                  \
    const q3n_v row = q3n_v_keep(q3n_v_load_upto(w[r] + i, left));         \
    s0##r = q3n_v_fma(row, a, s0##r);                                      \
    if (tokens > 1) s1##r = q3n_v_fma(row, b, s1##r);                      \
    if (tokens > 2) s2##r = q3n_v_fma(row, c, s2##r);                      \
  }
#define COLUMNS(left)                                                                                           \
  {                                                                                                             \
    const q3n_v a = q3n_v_load_upto(x0 + i, left);                                                              \
    const q3n_v b = tokens > 1 ? q3n_v_load_upto(x1 + i, left) : a;                                             \
    const q3n_v c = tokens > 2 ? q3n_v_load_upto(x2 + i, left) : a;                                             \
    ROW(left, 0) ROW(left, 1) ROW(left, 2) ROW(left, 3) ROW(left, 4) ROW(left, 5) ROW(left, 6) ROW(left, 7)     \
  }
  int64_t i = 0;
  /* sixteen registers leave none for a mask */
  for (; Q3N_REGISTERS == 16 && i + Q3N_LANES <= n; i += Q3N_LANES) COLUMNS(Q3N_LANES)
  for (; i < n; i += Q3N_LANES) COLUMNS(n - i)
#undef COLUMNS
#undef ROW
#define STORE(m)                                                                                                \
  if (tokens > m) {                                                                                             \
    q3n_v_sum4(y + Q3N_F32_ROWS * m, s##m##0, s##m##1, s##m##2, s##m##3);                                       \
    if (Q3N_F32_ROWS > 4) q3n_v_sum4(y + Q3N_F32_ROWS * m + 4, s##m##4, s##m##5, s##m##6, s##m##7);             \
  }
  STORE(0)
  STORE(1)
  STORE(2)
#undef STORE
}

static inline void q3n_f32_tile(float *y, const float *const *w, const float *const *x, int64_t n, int64_t tokens) {
  switch (tokens) {
    case 1: q3n_f32_tile_of(y, w, x, n, 1); return;
    case 2: q3n_f32_tile_of(y, w, x, n, 2); return;
    default: q3n_f32_tile_of(y, w, x, n, 3); return;
  }
}

/* y [tokens][Q3N_TILE_ROWS] of `rows` decoded rows; w has entries up to the next multiple of eight. */
static inline void q3n_f32_tiles(float *y, const float *const *w, int64_t rows, const float *const *x, int64_t n,
                                 int64_t tokens) {
  for (int64_t r = 0; r < rows; r += Q3N_F32_ROWS) {
    float part[Q3N_F32_ROWS * Q3N_F32_TOKENS];
    q3n_f32_tile(part, w + r, x, n, tokens);
    for (int64_t m = 0; m < tokens; m++)
      memcpy(y + m * Q3N_TILE_ROWS + r, part + Q3N_F32_ROWS * m, Q3N_F32_ROWS * sizeof *y);
  }
}

/* q3n_rows for up to Q3N_TILE_ROWS rows; entries past `count` repeat the first row. */
static inline void q3n_tile_rows(const float **rows, int64_t count, const void *w, q3n_dtype dtype, int64_t first,
                                 int64_t stride, int64_t n, float *scratch) {
  q3n_rows(rows, count, w, dtype, first, stride, n, scratch);
  for (int64_t r = count; r < Q3N_TILE_ROWS; r++) rows[r] = rows[0];
}

#endif
