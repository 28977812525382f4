#include <immintrin.h>

#include "peak.h"

uint32_t q3n_peak_read_avx512(const void *data, int64_t n);
uint32_t q3n_peak_f32_avx512(const void *data, int64_t n);
uint32_t q3n_peak_int8_avx512(const void *data, int64_t n);

static uint32_t fold(__m512i x) { return (uint32_t)_mm512_reduce_add_epi32(x); }

uint32_t q3n_peak_read_avx512(const void *data, int64_t n) {
  const char *p = data;
  __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t i = 0; i < n; i++, p += 512)
    for (int j = 0; j < 8; j++) sum[j % 4] = _mm512_xor_si512(sum[j % 4], _mm512_load_si512(p + 64 * j));
  return fold(_mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3])));
}

enum { CHAINS = 16 /* independent sums: more than latency times units */ };

uint32_t q3n_peak_f32_avx512(const void *data, int64_t n) {
  const float *x = data;
  const __m512 a = _mm512_load_ps(x), b = _mm512_load_ps(x + 16);
  __m512 sum[CHAINS];
  for (int j = 0; j < CHAINS; j++) sum[j] = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i++)
    for (int j = 0; j < CHAINS; j++) sum[j] = _mm512_fmadd_ps(a, b, sum[j]);
  for (int j = 1; j < CHAINS; j++) sum[0] = _mm512_add_ps(sum[0], sum[j]);
  return fold(_mm512_castps_si512(sum[0]));
}

uint32_t q3n_peak_int8_avx512(const void *data, int64_t n) {
  const char *x = data;
  __m512i a = _mm512_load_si512(x), sum[8];
  const __m512i b = _mm512_load_si512(x + 64), one = _mm512_set1_epi16(1);
  for (int j = 0; j < 8; j++) sum[j] = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i++)
    for (int j = 0; j < 8; j++) {
      /* hides that a stays the same: its products are not computed ahead */
      __asm__ volatile("" : "+v"(a));
      sum[j] = _mm512_add_epi32(sum[j], _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), one));
    }
  for (int j = 1; j < 8; j++) sum[0] = _mm512_add_epi32(sum[0], sum[j]);
  return fold(sum[0]);
}
