#include <immintrin.h>

#include "peak.h"

uint32_t q3n_peak_bf16_avx512bf16(const void *data, int64_t n);

enum { CHAINS = 16 /* independent sums: more than latency times units */ };

uint32_t q3n_peak_bf16_avx512bf16(const void *data, int64_t n) {
  const char *x = data;
  const __m512bh a = (__m512bh)_mm512_load_si512(x), b = (__m512bh)_mm512_load_si512(x + 64);
  __m512 sum[CHAINS];
  for (int j = 0; j < CHAINS; j++) sum[j] = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i++)
    for (int j = 0; j < CHAINS; j++) sum[j] = _mm512_dpbf16_ps(sum[j], a, b);
  for (int j = 1; j < CHAINS; j++) sum[0] = _mm512_add_ps(sum[0], sum[j]);
  return (uint32_t)_mm512_reduce_add_epi32(_mm512_castps_si512(sum[0]));
}
