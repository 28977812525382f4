/* The two forms of matmul over the vectors of csrc/simd, which is included before this, and an instruction set's tiles.
   Static inline. */
#ifndef Q3N_MATMUL_SIMD_H
#define Q3N_MATMUL_SIMD_H

#include "f32_tile_simd.h"
#include "q8_products.h"

/* 32 rows of w are decoded once, then every row of x meets them, three at a time. */
static inline q3n_status q3n_matmul_f32(const q3n_matmul_args *a, int64_t begin, int64_t end, void *scratch) {
  float *decoded = (float *)scratch + Q3N_TILE_ROWS * a->K;
  for (int64_t item = begin; item < end; item++) {
    const int64_t first = item * Q3N_TILE_ROWS;
    const int64_t count = a->N - first < Q3N_TILE_ROWS ? a->N - first : Q3N_TILE_ROWS;
    const float *w[Q3N_TILE_ROWS];
    q3n_tile_rows(w, count, a->w, a->dtype, first, a->w_n, a->K, scratch);

    for (int64_t m = 0; m < a->M; m += Q3N_F32_TOKENS) {
      const int64_t tokens = a->M - m < Q3N_F32_TOKENS ? a->M - m : Q3N_F32_TOKENS;
      const float *x[Q3N_F32_TOKENS];
      float y[Q3N_F32_TOKENS * Q3N_TILE_ROWS];
      for (int64_t t = 0; t < tokens; t++)
        x[t] = q3n_floats(a->x, a->x_dtype, (m + t) * a->x_m, a->K, decoded + t * a->K);
      q3n_f32_tiles(y, w, count, x, a->K, tokens);
      for (int64_t t = 0; t < tokens; t++)
        memcpy(a->y + (m + t) * a->y_m + first, y + t * Q3N_TILE_ROWS, (size_t)count * sizeof *y);
    }
  }
  return Q3N_OK;
}

/* 1 where the activations are integers and there is a tile for the weights. */
static inline int q3n_matmul_has_q8(const q3n_matmul_args *a, q3n_q8_products by) {
  return a->x_dtype != Q3N_F32 && by.tile_of(q3n_dtype_rows(a->dtype), 1) != NULL;
}

/* 8-bit activations against the blocks themselves: as many rows of x as stay in the second cache meet all rows of w,
   32 at a time, then the next rows of x. */
static inline __attribute__((always_inline)) q3n_status q3n_matmul_q8(const q3n_matmul_args *a, int64_t begin,
                                                                      int64_t end, void *scratch,
                                                                      q3n_q8_products by) {
  const q3n_dtype type = q3n_dtype_rows(a->dtype);
  const int64_t blocks = a->K / q3n_dtype_block(type), panel = q3n_q8_panel(q3n_dtype_bytes(a->x_dtype, a->K));
  for (int64_t from = 0; from < a->M; from += panel) {
    const int64_t to = a->M - from < panel ? a->M : from + panel;
    for (int64_t item = begin; item < end; item++) {
      const int64_t first = item * Q3N_TILE_ROWS, after = (item + 1 < end ? item + 1 : begin) * Q3N_TILE_ROWS;
      const int64_t count = a->N - first < Q3N_TILE_ROWS ? a->N - first : Q3N_TILE_ROWS;
      const q3n_q8_weights w = q3n_q8_weights_of(by, a->w, a->dtype, first, count, a->w_n, a->K, a->M, scratch);
      const uint8_t *next = q3n_q8_next(a->w, a->dtype, after, a->N, a->w_n, a->K, &w);
      for (int64_t m = from, tokens; m < to; m += tokens) {
        tokens = q3n_q8_take(by, to - m);
        const uint8_t *x[Q3N_Q8_TOKENS];
        _Alignas(64) float y[Q3N_Q8_TOKENS * Q3N_TILE_ROWS];
        for (int64_t t = 0; t < tokens; t++) {
          x[t] = q3n_element(a->x, a->x_dtype, (m + t) * a->x_m);
          q3n_q8_expect(a->y + (m + t) * a->y_m + first, count);
        }
        q3n_q8_multiply(by, type, y, &w, x, tokens, blocks, m + tokens < to ? w.group[0] : next);
        for (int64_t t = 0; t < tokens; t++)
          memcpy(a->y + (m + t) * a->y_m + first, y + t * Q3N_TILE_ROWS, (size_t)count * sizeof *y);
      }
    }
  }
  return Q3N_OK;
}

#endif
