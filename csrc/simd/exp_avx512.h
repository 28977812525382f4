/* e^x on 16 floats. Static inline only: this header is included by files that are compiled for AVX-512. */
#ifndef Q3N_SIMD_EXP_AVX512_H
#define Q3N_SIMD_EXP_AVX512_H

#include <immintrin.h>

/* Below this e^x is no normal number. */
#define Q3N_EXP_LOW -87.3365402f

/* x = n ln 2 + r with |r| <= ln 2 / 2: e^r by a polynomial that is 4e-9 off, and n in *exponent. The error of the whole
   is under 1.5 units of 2^-24; e^0 is 1. NaN stays NaN, and so does an infinity. */
static inline __m512 q3n_exp16_parts(__m512 x, __m512 *exponent) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p+0f)), _MM_FROUND_TO_NEAREST_INT |
                                                                                               _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e4p-1f), x); /* ln 2 to 15 bits: n times it is exact */
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.7f7d1cp-20f), r);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0x1.6a23dp-10f), r, _mm512_set1_ps(0x1.123a2p-7f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.5558f2p-5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.555492p-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.fffffcp-2f));
  *exponent = n;
  return _mm512_fmadd_ps(_mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f)), r, _mm512_set1_ps(1.0f));
}

/* e^x for x <= 0 in the lanes of `wanted`, 0 in the others and where it is no normal number; NaN stays NaN. */
static inline __m512 q3n_exp16_negative(__mmask16 wanted, __m512 x) {
  __m512 n;
  const __m512 p = q3n_exp16_parts(x, &n);
  const __mmask16 normal = _mm512_mask_cmp_ps_mask(wanted, x, _mm512_set1_ps(Q3N_EXP_LOW), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(normal, p, n);
}

/* 1 / (1 + e^-x) */
static inline __m512 q3n_sigmoid16(__m512 x) {
  __m512 n, one = _mm512_set1_ps(1.0f);
  /* Past these ends the result no longer changes, or is under 2^-126. The order of the operands keeps a NaN. */
  const __m512 y = _mm512_min_ps(_mm512_set1_ps(104.0f), _mm512_max_ps(_mm512_set1_ps(-104.0f), x));
  const __m512 p = q3n_exp16_parts(_mm512_sub_ps(_mm512_setzero_ps(), y), &n);
  return _mm512_div_ps(one, _mm512_add_ps(one, _mm512_scalef_ps(p, n)));
}

#endif
