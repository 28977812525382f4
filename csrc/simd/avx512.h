/* AVX-512 helpers. Static inline only: this header is included by files that are compiled for AVX-512. */
#ifndef Q3N_SIMD_AVX512_H
#define Q3N_SIMD_AVX512_H

#include <immintrin.h>
#include <stdint.h>

/* Elements 16 i .. 16 i + 15 of a row of n, the missing ones 0; and the mask that names the present ones. */
static inline __mmask16 q3n_mask16(int64_t n, int64_t i) {
  const int64_t left = n - 16 * i;
  return left >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << left) - 1);
}

/* The sums of four vectors, each in the same order: halves, quarters, pairs. */
static inline __m128 q3n_sum4x16(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m512 x[4] = {a, b, c, d};
  __m128 y[4];
  for (int i = 0; i < 4; i++) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x[i]), _mm512_extractf32x8_ps(x[i], 1));
    y[i] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  return _mm_hadd_ps(_mm_hadd_ps(y[0], y[1]), _mm_hadd_ps(y[2], y[3]));
}

#endif
