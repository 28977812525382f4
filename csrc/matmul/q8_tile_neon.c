/* The tiles of q8_tile.h without dot products: bytes are multiplied to words, and added there as long as 16 bits hold. */
#include "q8_tile_neon.h"

/* Four activations, again and again. */
INLINE int8x16_t four(const uint8_t *x) {
  return vreinterpretq_s8_s32(vld1q_dup_s32((const int32_t *)(const void *)x));
}

/* Adds the dot products of part j of a block, R times four rows from w on, and M rows of activations from byte `at` of
   each: sum[M r + m]. */
INLINE void dots(int32x4_t *sum, q3n_dtype type, const uint8_t *w, int64_t j, const uint8_t *const *x, int64_t at,
                 const int R, const int M) {
  /* a word takes 8 products of 5-bit weights, 4 of 6-bit, 2 of 8-bit, and without overflow its neighbour too up to 4 bits
     (and 6 signed) */
  const int units = type == Q3N_Q8_0 ? 2 : type == Q3N_Q6_K ? 4 : 8;
  int16x8_t low[8], high[8];
  int32x4_t wide_low[8], wide_high[8];
#pragma GCC unroll 8
  for (int i = 0; i < part_columns(type) / 4; i++) {
    int8x16_t a[4];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) a[m] = four(x[m] + at + 4 * i);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const int8x16_t v = weights(type, w + 16 * r, j, i);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        const int n = M * r + m;
        if (i % units == 0) {
          low[n] = vmull_s8(vget_low_s8(v), vget_low_s8(a[m]));
          high[n] = vmull_high_s8(v, a[m]);
        } else {
          low[n] = vmlal_s8(low[n], vget_low_s8(v), vget_low_s8(a[m]));
          high[n] = vmlal_high_s8(high[n], v, a[m]);
        }
        if (type == Q3N_Q8_0 && i % 2) {
          wide_low[n] = i == 1 ? vpaddlq_s16(low[n]) : vpadalq_s16(wide_low[n], low[n]);
          wide_high[n] = i == 1 ? vpaddlq_s16(high[n]) : vpadalq_s16(wide_high[n], high[n]);
        }
      }
      if (M > 1) settle();
    }
    settle();
  }
#pragma GCC unroll 8
  for (int n = 0; n < R * M; n++) {
    if (type == Q3N_Q8_0)
      sum[n] = vaddq_s32(sum[n], vpaddq_s32(wide_low[n], wide_high[n]));
    else if (type == Q3N_Q5_K)
      sum[n] = vaddq_s32(sum[n], vpaddq_s32(vpaddlq_s16(low[n]), vpaddlq_s16(high[n])));
    else
      sum[n] = vpadalq_s16(sum[n], vpaddq_s16(low[n], high[n]));
  }
}

#define TILES(op, type)    \
  TILE(op, type, 4, 1)     \
  TILE(op, type, 2, 2)     \
  TILE(op, type, 2, 3)     \
  TILE(op, type, 2, 4)     \
  TURNS(op, 5, 3, 2)       \
  TURNS(op, 6, 3, 3)       \
  TURNS(op, 8, 4, 4)       \
  TURNS(op, 10, 6, 4)
#include "q8_tile_neon.inc"

q3n_q8_tile *q3n_q8_tile_neon(q3n_dtype dtype, int64_t tokens) { return tile_of(dtype, tokens); }
