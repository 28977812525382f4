#include <immintrin.h>

#include "peak.h"

uint32_t q3n_peak_int8_avx512vnni(const void *data, int64_t n);

enum { CHAINS = 16 /* independent sums: more than latency times units */ };

uint32_t q3n_peak_int8_avx512vnni(const void *data, int64_t n) {
  const char *x = data;
  const __m512i a = _mm512_load_si512(x), b = _mm512_load_si512(x + 64);
  __m512i sum[CHAINS];
  for (int j = 0; j < CHAINS; j++) sum[j] = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i++)
    for (int j = 0; j < CHAINS; j++) sum[j] = _mm512_dpbusd_epi32(sum[j], a, b);
  for (int j = 1; j < CHAINS; j++) sum[0] = _mm512_add_epi32(sum[0], sum[j]);
  return (uint32_t)_mm512_reduce_add_epi32(sum[0]);
}
