#include <arm_neon.h>

#include "peak.h"

uint32_t q3n_peak_int8_neondot(const void *data, int64_t n);

enum { CHAINS = 16 /* independent sums: more than latency times units */ };

uint32_t q3n_peak_int8_neondot(const void *data, int64_t n) {
  const int8_t *x = data;
  const int8x16_t a = vld1q_s8(x), b = vld1q_s8(x + 16);
  int32x4_t sum[CHAINS];
  for (int j = 0; j < CHAINS; j++) sum[j] = vdupq_n_s32(0);
  for (int64_t i = 0; i < n; i++)
    for (int j = 0; j < CHAINS; j++) sum[j] = vdotq_s32(sum[j], a, b);
  for (int j = 1; j < CHAINS; j++) sum[0] = vaddq_s32(sum[0], sum[j]);
  return (uint32_t)vaddvq_s32(sum[0]);
}
