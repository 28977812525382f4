/* What matmul and moe share around the integer products: which of them 32 rows of w meet, and how many tokens at a
   time. Static inline; vectors of csrc/simd are included before this. */
#ifndef Q3N_MATMUL_Q8_PRODUCTS_H
#define Q3N_MATMUL_Q8_PRODUCTS_H

#include "../base/check.h"
#include "../quant/quant_blocks.h"
#include "../quant/repack_simd.h"
#include "matmul_block.h"
#include "q8_rows.h"
#include "q8_tile.h"

/* 32 rows of w: two groups of 16, the same twice where there is one, or the rows as they lie. */
typedef struct {
  const uint8_t *group[2];
  const uint8_t *row[Q3N_TILE_ROWS];
} q3n_q8_weights;

/* An instruction set's products. rows_of may be NULL, and so may what it returns: rows are interleaved then. */
typedef struct {
  q3n_q8_tile_of *tile_of;
  int64_t most; /* rows of x that a tile takes: 10 or 12 */
  q3n_q8_rows_of *rows_of;
} q3n_q8_products;

/* How many of `left` rows of x the next product takes. Measured: README.md. Even cuts waste least; tiles exist for 1 to
   6, 8, 10 and, where `most` is 12, 12 rows. Up to 4 rows in all meet rows that are not interleaved as they lie. */
enum { Q3N_Q8_ROWS_TOKENS = 4 };
static inline int64_t q3n_q8_take(q3n_q8_products by, int64_t left) {
  static const int8_t take[] = {0, 1, 2, 3, 4, 5, 6, 4, 8, 5, 10, 6, 6, 8, 8, 10, 8};
  if (left > 16 || (left == 12 && by.most == 12)) return by.most;
  return take[left];
}

/* How many rows of x, of so many bytes, meet all of w before the next ones come: they stay in the second cache. A
   multiple of what tiles take. */
enum { Q3N_Q8_PANEL_BYTES = 400 * 1024 };
static inline int64_t q3n_q8_panel(int64_t row_bytes) {
  const int64_t rows = row_bytes ? Q3N_Q8_PANEL_BYTES / row_bytes / 60 * 60 : 0;
  return rows ? rows : 60;
}

/* The 32 values at y will be written soon: a few rows are too short a run for the hardware to see. */
static inline void q3n_q8_expect(const float *y, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(y + i, 1);
}

/* Rows first .. first + count - 1 (count <= 32) of w for `tokens` rows of x: where they lie if w is interleaved or the
   tokens are few, else interleaved into scratch (32 rows of blocks). Rows past the count repeat the last. */
static inline q3n_q8_weights q3n_q8_weights_of(q3n_q8_products by, const void *w, q3n_dtype dtype, int64_t first,
                                               int64_t count, int64_t stride, int64_t n, int64_t tokens,
                                               uint8_t *scratch) {
  const q3n_dtype type = q3n_dtype_rows(dtype);
  const int64_t block = q3n_dtype_block(type), group_bytes = Q3N_GROUP * (n / block) * q3n_dtype_block_bytes(type);
  q3n_q8_weights g;
  if (dtype & Q3N_R16) {
    g.group[0] = (const uint8_t *)q3n_element(w, type, first * stride);
    g.group[1] = count > Q3N_GROUP ? g.group[0] + group_bytes : g.group[0];
    return g;
  }
  for (int64_t r = 0; r < Q3N_TILE_ROWS; r++)
    g.row[r] = (const uint8_t *)q3n_element(w, type, (first + (r < count ? r : count - 1)) * stride);
  g.group[0] = g.group[1] = NULL;
  if (tokens <= Q3N_Q8_ROWS_TOKENS && by.rows_of && by.rows_of(type, 1)) return g;
  for (int64_t i = 0; i < 2; i++) {
    g.group[i] = count > Q3N_GROUP * i ? scratch + i * group_bytes : g.group[0];
    if (count > Q3N_GROUP * i) q3n_interleave(scratch + i * group_bytes, g.row + Q3N_GROUP * i, type, n / block);
  }
  return g;
}

/* y [tokens][32]. */
static inline void q3n_q8_multiply(q3n_q8_products by, q3n_dtype type, float *y, const q3n_q8_weights *w,
                                   const uint8_t *const *x, int64_t tokens, int64_t blocks, const uint8_t *next) {
  /* without blocks w may be NULL */
  if (w->group[0] || blocks == 0)
    by.tile_of(type, tokens)(y, w->group[0], w->group[1], x, blocks, next);
  else
    by.rows_of(type, tokens)(y, w->row, x, blocks, next);
}

/* Where rows `first` .. of w lie, to be fetched while those before them are computed; the present ones where there are
   none or rows of n elements are not packed. */
static inline const uint8_t *q3n_q8_next(const void *w, q3n_dtype dtype, int64_t first, int64_t rows, int64_t stride,
                                         int64_t n, const q3n_q8_weights *present) {
  if (first < rows && stride == n) return (const uint8_t *)q3n_element(w, dtype, first * stride);
  return present->group[0] ? present->group[0] : present->row[0];
}

#endif
