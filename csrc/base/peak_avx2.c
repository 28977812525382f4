#include <immintrin.h>

#include "peak.h"

uint32_t q3n_peak_read_avx2(const void *data, int64_t n);
uint32_t q3n_peak_f32_avx2(const void *data, int64_t n);
uint32_t q3n_peak_int8_avx2(const void *data, int64_t n);

static uint32_t fold(__m256i x) {
  const __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  return (uint32_t)(_mm_extract_epi32(y, 0) + _mm_extract_epi32(y, 1) + _mm_extract_epi32(y, 2) + _mm_extract_epi32(y, 3));
}

uint32_t q3n_peak_read_avx2(const void *data, int64_t n) {
  const __m256i *p = data;
  __m256i sum[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  for (int64_t i = 0; i < n; i++, p += 16)
    for (int j = 0; j < 16; j++) sum[j % 4] = _mm256_xor_si256(sum[j % 4], _mm256_load_si256(p + j));
  return fold(_mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3])));
}

enum { CHAINS = 12 /* independent sums: more than latency times units */ };

uint32_t q3n_peak_f32_avx2(const void *data, int64_t n) {
  const float *x = data;
  const __m256 a = _mm256_load_ps(x), b = _mm256_load_ps(x + 8);
  __m256 sum[CHAINS];
  for (int j = 0; j < CHAINS; j++) sum[j] = _mm256_setzero_ps();
  for (int64_t i = 0; i < n; i++)
    for (int j = 0; j < CHAINS; j++) sum[j] = _mm256_fmadd_ps(a, b, sum[j]);
  for (int j = 1; j < CHAINS; j++) sum[0] = _mm256_add_ps(sum[0], sum[j]);
  return fold(_mm256_castps_si256(sum[0]));
}

uint32_t q3n_peak_int8_avx2(const void *data, int64_t n) {
  const __m256i *x = data;
  __m256i a = _mm256_load_si256(x), sum[8];
  const __m256i b = _mm256_load_si256(x + 1), one = _mm256_set1_epi16(1);
  for (int j = 0; j < 8; j++) sum[j] = _mm256_setzero_si256();
  for (int64_t i = 0; i < n; i++)
    for (int j = 0; j < 8; j++) {
      /* hides that a stays the same: its products are not computed ahead */
      __asm__ volatile("" : "+x"(a));
      sum[j] = _mm256_add_epi32(sum[j], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), one));
    }
  for (int j = 1; j < 8; j++) sum[0] = _mm256_add_epi32(sum[0], sum[j]);
  return fold(sum[0]);
}
