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

/* e^x to within 2 ulp; NaN stays NaN, below -104 it is 0 and above 89 infinite. */
static inline __m512 q3n_exp16(__m512 x) {
  /* the bounds come first: min and max return their second operand where one is NaN */
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), _mm512_min_ps(_mm512_set1_ps(89.0f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p+0f)), 0);
  /* ln 2 in two parts: the first has trailing zeros, so n times it is exact */
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e4p-1f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.7f7d1cp-20f), r);
  __m512 p = _mm512_set1_ps(0x1.6c16c2p-10f); /* 1/720 ... */
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.111112p-7f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.555556p-5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.555556p-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

/* x / (1 + e^-x). */
static inline __m512 q3n_silu16(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(x, _mm512_add_ps(one, q3n_exp16(_mm512_xor_ps(x, _mm512_set1_ps(-0.0f)))));
}

#endif
