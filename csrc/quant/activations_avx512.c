/* Sixteen values at a time; the same arithmetic as the scalar form, so the same bits. */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "activations_block.h"

q3n_status q3n_activations_avx512(const q3n_activations_args *a, int64_t begin, int64_t end, void *scratch);

/* Writes n values (a multiple of 32, at most 256) and the sum of every 16; returns d. */
static inline __attribute__((always_inline)) float encode(int8_t *q, int *sum16, const float *x, const int n) {
  const __m512 size = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff));
  __m512 v[16], most = _mm512_setzero_ps();
  __mmask16 wild = 0;
  for (int i = 0; i < n / 16; i++) {
    v[i] = _mm512_loadu_ps(x + 16 * i);
    const __m512 abs = _mm512_and_ps(v[i], size);
    wild |= _mm512_cmp_ps_mask(abs, _mm512_set1_ps(INFINITY), _CMP_NLT_UQ);
    most = _mm512_max_ps(most, abs);
  }
  const float d = _mm512_reduce_max_ps(most) / 127.0f;
  if (wild || d < 0x1p-126f) {
    memset(q, 0, (size_t)n);
    memset(sum16, 0, sizeof *sum16 * (size_t)(n / 16));
    return wild ? NAN : 0.0f;
  }
  const __m512 inverse = _mm512_set1_ps(1.0f / d);
  for (int i = 0; i < n / 16; i++) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], inverse));
    _mm_storeu_si128((__m128i *)(q + 16 * i), _mm512_cvtepi32_epi8(whole));
    sum16[i] = _mm512_reduce_add_epi32(whole);
  }
  return d;
}

q3n_status q3n_activations_avx512(const q3n_activations_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  int sum[16];
  for (int64_t row = begin; row < end; row++) {
    const float *x = a->x + row * a->x_row;
    if (a->dtype == Q3N_Q8_X32) {
      q3n_block_q8_x32 *y = (q3n_block_q8_x32 *)a->y + row * (a->N / 32);
      for (int64_t i = 0; i < a->N / 32; i++) {
        y[i].d = encode(y[i].q, sum, x + 32 * i, 32);
        y[i].sum = sum[0] + sum[1];
      }
    } else {
      q3n_block_q8_x256 *y = (q3n_block_q8_x256 *)a->y + row * (a->N / 256);
      for (int64_t i = 0; i < a->N / 256; i++) {
        y[i].d = encode(y[i].q, sum, x + 256 * i, 256);
        for (int j = 0; j < 8; j++) y[i].sum32[q3n_q8_sum_at(j)] = (int16_t)(sum[2 * j] + sum[2 * j + 1]);
        for (int j = 0; j < 16; j++) y[i].sum16[q3n_q8_sum_at(j)] = (int16_t)sum[j];
        memset(y[i].unused, 0, sizeof y[i].unused);
      }
    }
  }
  return Q3N_OK;
}
