/* Blocks of the K or V cache as rows of float. */
#ifndef Q3N_ATTENTION_KV_H
#define Q3N_ATTENTION_KV_H

#include <string.h>

#include "attention.h"

static inline float q3n_attention_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

/* Without branches, so that loops over it vectorise: the exponent is moved by a multiplication, which also normalises
   the subnormals of half. */
static inline float q3n_attention_half(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, magnitude = (uint32_t)(h & 0x7fffu) << 13;
  const float scaled = q3n_attention_float(magnitude) * 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &scaled, sizeof bits);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u; /* infinity or NaN */
  return q3n_attention_float(bits | special | sign);
}

/* Rows of n keys from `offset` elements into the cache, `stride` elements apart. An f32 cache is read where it lies;
   others are converted into `block` [n][D]. Returns the first row, and the distance of rows in *row. */
static inline const float *q3n_attention_rows(const void *cache, q3n_dtype dtype, int64_t offset, int64_t stride,
                                              int64_t n, int64_t D, float *block, int64_t *row) {
  if (dtype == Q3N_F32) {
    *row = stride;
    return (const float *)cache + offset;
  }
  *row = D;
  for (int64_t j = 0; j < n; j++) {
    float *to = block + j * D;
    const int64_t at = offset + j * stride;
    if (dtype == Q3N_F16) {
      const uint16_t *from = (const uint16_t *)cache + at;
      for (int64_t d = 0; d < D; d++) to[d] = q3n_attention_half(from[d]);
    } else if (dtype == Q3N_BF16) {
      const uint16_t *from = (const uint16_t *)cache + at;
      for (int64_t d = 0; d < D; d++) to[d] = q3n_attention_float((uint32_t)from[d] << 16);
    } else {
      /* Q8_0: 32 values in 34 bytes, an f16 scale before them. */
      const unsigned char *from = (const unsigned char *)cache + at / 32 * 34;
      for (int64_t d = 0; d < D; d += 32, from += 34) {
        const float scale = q3n_attention_half((uint16_t)(from[0] | from[1] << 8));
        for (int i = 0; i < 32; i++) to[d + i] = scale * (float)(int8_t)from[2 + i];
      }
    }
  }
  return block;
}

#endif
