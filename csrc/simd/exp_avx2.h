/* e^x on 8 floats. Static inline only: this header is included by files that are compiled for AVX2 and FMA. */
#ifndef Q3N_SIMD_EXP_AVX2_H
#define Q3N_SIMD_EXP_AVX2_H

#include <immintrin.h>

/* Below this e^x is no normal number. */
#define Q3N_EXP_LOW -87.3365402f

/* x = n ln 2 + r with |r| <= ln 2 / 2: e^r by a polynomial that is 4e-9 off, and n in *exponent. The error of the whole
   is under 1.5 units of 2^-24; e^0 is 1. NaN stays NaN, and so does an infinity. */
static inline __m256 q3n_exp8_parts(__m256 x, __m256 *exponent) {
  const __m256 n =
      _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(0x1.715476p+0f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.62e4p-1f), x); /* ln 2 to 15 bits: n times it is exact */
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.7f7d1cp-20f), r);
  __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(0x1.6a23dp-10f), r, _mm256_set1_ps(0x1.123a2p-7f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.5558f2p-5f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.555492p-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.fffffcp-2f));
  *exponent = n;
  return _mm256_fmadd_ps(_mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f)), r, _mm256_set1_ps(1.0f));
}

/* 2^n for whole -126 <= n <= 127. A NaN gives 1. */
static inline __m256 q3n_power8(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

/* e^x for x <= 0 in the lanes of `wanted`, 0 in the others and where it is no normal number; NaN stays NaN. */
static inline __m256 q3n_exp8_negative(__m256 wanted, __m256 x) {
  __m256 n;
  const __m256 p = q3n_exp8_parts(x, &n);
  const __m256 normal = _mm256_and_ps(wanted, _mm256_cmp_ps(x, _mm256_set1_ps(Q3N_EXP_LOW), _CMP_NLT_UQ));
  return _mm256_and_ps(normal, _mm256_mul_ps(p, q3n_power8(_mm256_cvtps_epi32(n))));
}

/* 1 / (1 + e^-x) */
static inline __m256 q3n_sigmoid8(__m256 x) {
  __m256 n;
  const __m256 one = _mm256_set1_ps(1.0f);
  /* Past these ends the result no longer changes, or is under 2^-126. The order of the operands keeps a NaN. */
  const __m256 y = _mm256_min_ps(_mm256_set1_ps(104.0f), _mm256_max_ps(_mm256_set1_ps(-104.0f), x));
  const __m256 p = q3n_exp8_parts(_mm256_sub_ps(_mm256_setzero_ps(), y), &n);
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  const __m256 e = _mm256_mul_ps(_mm256_mul_ps(p, q3n_power8(half)), q3n_power8(_mm256_sub_epi32(whole, half)));
  return _mm256_div_ps(one, _mm256_add_ps(one, e));
}

#endif
