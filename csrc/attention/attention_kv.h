/* Blocks of the K or V cache as rows of float. */
#ifndef Q3N_ATTENTION_KV_H
#define Q3N_ATTENTION_KV_H

#include "../quant/quant_blocks.h"
#include "attention.h"

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
      for (int64_t d = 0; d < D; d++) to[d] = q3n_f16_to_f32(from[d]);
    } else if (dtype == Q3N_BF16) {
      const uint16_t *from = (const uint16_t *)cache + at;
      for (int64_t d = 0; d < D; d++) to[d] = q3n_bf16_to_f32(from[d]);
    } else {
      const q3n_block_q8_0 *from = (const q3n_block_q8_0 *)cache + at / 32;
      for (int64_t i = 0; i < D / 32; i++) q3n_q8_0_to_float(from + i, to + 32 * i);
    }
  }
  return block;
}

#endif
