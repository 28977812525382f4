/* Four values at a time; the same arithmetic as the scalar form, so the same bits. */
#include <arm_neon.h>
#include <math.h>
#include <string.h>

#include "activations_block.h"

q3n_status q3n_activations_neon(const q3n_activations_args *a, int64_t begin, int64_t end, void *scratch);

/* Sixteen values as whole numbers of a byte. */
static inline int8x16_t levels(const float *x, float32x4_t inverse) {
  int32x4_t v[4];
  for (int i = 0; i < 4; i++) v[i] = vcvtnq_s32_f32(vmulq_f32(vld1q_f32(x + 4 * i), inverse));
  const int16x8_t low = vmovn_high_s32(vmovn_s32(v[0]), v[1]), high = vmovn_high_s32(vmovn_s32(v[2]), v[3]);
  return vmovn_high_s16(vmovn_s16(low), high);
}

/* Writes n values (a multiple of 32) and the sum of every 16; returns d. */
static inline float encode(int8_t *q, int16_t *sum16, const float *x, int n) {
  float32x4_t most[4];
  uint32x4_t finite = vdupq_n_u32(UINT32_MAX);
  for (int j = 0; j < 4; j++) most[j] = vdupq_n_f32(0.0f);
  for (int i = 0; i < n; i += 16)
    for (int j = 0; j < 4; j++) {
      const float32x4_t size = vabsq_f32(vld1q_f32(x + i + 4 * j));
      finite = vandq_u32(finite, vcltq_f32(size, vdupq_n_f32(INFINITY)));
      most[j] = vmaxq_f32(most[j], size);
    }
  const int wild = vminvq_u32(finite) == 0;
  const float d = vmaxvq_f32(vmaxq_f32(vmaxq_f32(most[0], most[1]), vmaxq_f32(most[2], most[3]))) / 127.0f;
  if (wild || d < 0x1p-126f) {
    memset(q, 0, (size_t)n);
    memset(sum16, 0, sizeof *sum16 * (size_t)(n / 16));
    return wild ? NAN : 0.0f;
  }
  const float32x4_t inverse = vdupq_n_f32(1.0f / d);
  for (int i = 0; i < n; i += 16) {
    const int8x16_t v = levels(x + i, inverse);
    vst1q_s8(q + i, v);
    sum16[i / 16] = vaddlvq_s8(v);
  }
  return d;
}

q3n_status q3n_activations_neon(const q3n_activations_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  int16_t sum[16];
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
        for (int j = 0; j < 16; j++) y[i].sum16[q3n_q8_sum_at(j)] = sum[j];
        memset(y[i].unused, 0, sizeof y[i].unused);
      }
    }
  }
  return Q3N_OK;
}
