#include <arm_neon.h>

#include "peak.h"

uint32_t q3n_peak_read_neon(const void *data, int64_t n);
uint32_t q3n_peak_f32_neon(const void *data, int64_t n);
uint32_t q3n_peak_int8_neon(const void *data, int64_t n);

enum { CHAINS = 16 /* independent sums: more than latency times units */ };

uint32_t q3n_peak_read_neon(const void *data, int64_t n) {
  const uint8_t *p = data;
  uint8x16_t sum[4] = {vdupq_n_u8(0), vdupq_n_u8(0), vdupq_n_u8(0), vdupq_n_u8(0)};
  for (int64_t i = 0; i < n; i++, p += 512)
    for (int j = 0; j < 32; j++) sum[j % 4] = veorq_u8(sum[j % 4], vld1q_u8(p + 16 * j));
  return vaddvq_u32(vreinterpretq_u32_u8(veorq_u8(veorq_u8(sum[0], sum[1]), veorq_u8(sum[2], sum[3]))));
}

uint32_t q3n_peak_f32_neon(const void *data, int64_t n) {
  const float *x = data;
  const float32x4_t a = vld1q_f32(x), b = vld1q_f32(x + 4);
  float32x4_t sum[CHAINS];
  for (int j = 0; j < CHAINS; j++) sum[j] = vdupq_n_f32(0.0f);
  for (int64_t i = 0; i < n; i++)
    for (int j = 0; j < CHAINS; j++) sum[j] = vfmaq_f32(sum[j], a, b);
  for (int j = 1; j < CHAINS; j++) sum[0] = vaddq_f32(sum[0], sum[j]);
  return vaddvq_u32(vreinterpretq_u32_f32(sum[0]));
}

uint32_t q3n_peak_int8_neon(const void *data, int64_t n) {
  const int8_t *x = data;
  int8x8_t a = vld1_s8(x);
  const int8x8_t b = vld1_s8(x + 8);
  int32x4_t sum[8];
  for (int j = 0; j < 8; j++) sum[j] = vdupq_n_s32(0);
  for (int64_t i = 0; i < n; i++)
    for (int j = 0; j < 8; j++) {
      /* hides that a stays the same: its products are not computed ahead */
      __asm__ volatile("" : "+w"(a));
      sum[j] = vpadalq_s16(sum[j], vmull_s8(a, b));
    }
  for (int j = 1; j < 8; j++) sum[0] = vaddq_s32(sum[0], sum[j]);
  return (uint32_t)vaddvq_s32(sum[0]);
}
