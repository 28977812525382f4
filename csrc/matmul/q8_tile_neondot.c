/* The tiles of q8_tile.h on sdot: four columns of four rows at once. */
#include "q8_tile_neon.h"

/* sum + v . (four columns of a). */
INLINE int32x4_t dot4(int32x4_t sum, int8x16_t v, int8x16_t a, int columns) {
  switch (columns) {
    case 0: return vdotq_laneq_s32(sum, v, a, 0);
    case 1: return vdotq_laneq_s32(sum, v, a, 1);
    case 2: return vdotq_laneq_s32(sum, v, a, 2);
    default: return vdotq_laneq_s32(sum, v, a, 3);
  }
}

/* Adds the dot products of part j of a block, R times four rows from w on, and M rows of activations from byte `at` of
   each: sum[M r + m]. */
INLINE void dots(int32x4_t *sum, q3n_dtype type, const uint8_t *w, int64_t j, const uint8_t *const *x, int64_t at,
                 const int R, const int M) {
#pragma GCC unroll 2
  for (int c = 0; c < part_columns(type); c += 16) {
    int8x16_t a[Q3N_Q8_TOKENS];
#pragma GCC unroll 10
    for (int m = 0; m < M; m++) a[m] = vld1q_s8((const int8_t *)x[m] + at + c);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const int8x16_t v = weights(type, w + 16 * r, j, c / 4 + i);
#pragma GCC unroll 10
        for (int m = 0; m < M; m++) sum[M * r + m] = dot4(sum[M * r + m], v, a[m], i);
        if (M > 1) settle();
      }
      settle();
    }
  }
}

#define TILES(op, type)    \
  TILE(op, type, 4, 1)     \
  TILE(op, type, 2, 2)     \
  TILE(op, type, 2, 3)     \
  TILE(op, type, 2, 4)     \
  TILE(op, type, 1, 5)     \
  TILE(op, type, 1, 6)     \
  TILE(op, type, 1, 8)     \
  TURNS(op, 10, 5, 5)
#include "q8_tile_neon.inc"

q3n_q8_tile *q3n_q8_tile_neondot(q3n_dtype dtype, int64_t tokens) { return tile_of(dtype, tokens); }
