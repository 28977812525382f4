/* Eight values at a time; the same arithmetic as the scalar form, so the same bits. */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "activations_block.h"

q3n_status q3n_activations_avx2(const q3n_activations_args *a, int64_t begin, int64_t end, void *scratch);

static inline float max8(__m256 v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

/* Writes n values (a multiple of 32, at most 256) and the sum of every 16; returns d. */
static inline __attribute__((always_inline)) float encode(int8_t *q, int *sum16, const float *x, const int n) {
  const __m256 size = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 most = _mm256_setzero_ps(), wild = _mm256_setzero_ps();
  for (int i = 0; i < n; i += 8) {
    const __m256 abs = _mm256_and_ps(_mm256_loadu_ps(x + i), size);
    wild = _mm256_or_ps(wild, _mm256_cmp_ps(abs, _mm256_set1_ps(INFINITY), _CMP_NLT_UQ));
    most = _mm256_max_ps(most, abs);
  }
  const float d = max8(most) / 127.0f;
  const int is_wild = _mm256_movemask_ps(wild);
  if (is_wild || d < 0x1p-126f) {
    memset(q, 0, (size_t)n);
    memset(sum16, 0, sizeof *sum16 * (size_t)(n / 16));
    return is_wild ? NAN : 0.0f;
  }
  const __m256 inverse = _mm256_set1_ps(1.0f / d);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), one = _mm256_set1_epi16(1);
  for (int i = 0; i < n; i += 32) {
    __m256i whole[4];
    for (int j = 0; j < 4; j++)
      whole[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * j), inverse));
    /* Packing takes four values of each in turn, in both halves: fours come out as 0 2 4 6, 1 3 5 7. */
    const __m256i first = _mm256_packs_epi32(whole[0], whole[1]), second = _mm256_packs_epi32(whole[2], whole[3]);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, second), order);
    _mm256_storeu_si256((__m256i *)(void *)(q + i), bytes);
    const __m256i sums = _mm256_hadd_epi32(_mm256_madd_epi16(first, one), _mm256_madd_epi16(second, one));
    const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    sum16[i / 16] = _mm_cvtsi128_si32(half) + _mm_extract_epi32(half, 1);
    sum16[i / 16 + 1] = _mm_extract_epi32(half, 2) + _mm_extract_epi32(half, 3);
  }
  return d;
}

q3n_status q3n_activations_avx2(const q3n_activations_args *a, int64_t begin, int64_t end, void *scratch) {
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
