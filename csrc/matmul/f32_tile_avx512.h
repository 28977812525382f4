/* Eight rows of w against up to three rows of x in f32 on AVX-512. Static inline: matmul and moe compile it. */
#ifndef Q3N_MATMUL_F32_TILE_AVX512_H
#define Q3N_MATMUL_F32_TILE_AVX512_H

#include "../simd/avx512.h"
#include "dot.h"
#include "matmul_block.h"

/* y[8 m + r] = x[m] . w[r]. Sixteen running sums a dot, added as a tree: the bits depend on the two rows alone. */
static inline __attribute__((always_inline)) void q3n_f32_tile_of(float *y, const float *const *w, const float *const *x,
                                                                  int64_t n, const int tokens) {
  const float *x0 = x[0], *x1 = tokens > 1 ? x[1] : x0, *x2 = tokens > 2 ? x[2] : x0;
#define SUMS(m)                                                                                                \
  __m512 s##m##0 = _mm512_setzero_ps(), s##m##1 = s##m##0, s##m##2 = s##m##0, s##m##3 = s##m##0, s##m##4 = s##m##0, \
         s##m##5 = s##m##0, s##m##6 = s##m##0, s##m##7 = s##m##0;
  SUMS(0)
  SUMS(1)
  SUMS(2)
#undef SUMS
#define STEP(r)                                                 \
  {                                                             \
    const __m512 row = _mm512_maskz_loadu_ps(mask, w[r] + i);   \
    s0##r = _mm512_fmadd_ps(row, a, s0##r);                     \
    if (tokens > 1) s1##r = _mm512_fmadd_ps(row, b, s1##r);     \
    if (tokens > 2) s2##r = _mm512_fmadd_ps(row, c, s2##r);     \
  }
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = q3n_mask16(n, i / 16);
    const __m512 a = _mm512_maskz_loadu_ps(mask, x0 + i);
    const __m512 b = tokens > 1 ? _mm512_maskz_loadu_ps(mask, x1 + i) : a;
    const __m512 c = tokens > 2 ? _mm512_maskz_loadu_ps(mask, x2 + i) : a;
    STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7)
  }
#undef STEP
#define STORE(m)                                                                \
  if (tokens > m) {                                                             \
    _mm_storeu_ps(y + 8 * m, q3n_sum4x16(s##m##0, s##m##1, s##m##2, s##m##3));  \
    _mm_storeu_ps(y + 8 * m + 4, q3n_sum4x16(s##m##4, s##m##5, s##m##6, s##m##7)); \
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
  for (int64_t r = 0; r < rows; r += 8) {
    float part[8 * Q3N_F32_TOKENS];
    q3n_f32_tile(part, w + r, x, n, tokens);
    for (int64_t m = 0; m < tokens; m++) memcpy(y + m * Q3N_TILE_ROWS + r, part + 8 * m, 8 * sizeof *y);
  }
}

/* q3n_rows for up to Q3N_TILE_ROWS rows; entries past `count` repeat the first row. */
static inline void q3n_tile_rows(const float **rows, int64_t count, const void *w, q3n_dtype dtype, int64_t first,
                                 int64_t stride, int64_t n, float *scratch) {
  q3n_rows(rows, count, w, dtype, first, stride, n, scratch);
  for (int64_t r = count; r < Q3N_TILE_ROWS; r++) rows[r] = rows[0];
}

#endif
