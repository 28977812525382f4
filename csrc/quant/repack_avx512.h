/* Sixteen rows to a group by transposing 16 x 16 units. Static inline: products of rows that are not repacked
   interleave a group in their scratch. */
#ifndef Q3N_QUANT_REPACK_AVX512_H
#define Q3N_QUANT_REPACK_AVX512_H

#include "../simd/avx512.h"
#include "repack_group.h"

/* `units` units of four bytes of every row. */
static inline void q3n_interleave_units(uint8_t *y, const uint8_t *const row[16], int64_t at, int64_t units) {
  for (int64_t u = 0; u < units; u += 16) {
    const int64_t count = units - u < 16 ? units - u : 16;
    const __mmask16 mask = (__mmask16)((1u << count) - 1);
    q3n_v r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_maskz_loadu_ps(mask, row[i] + at + 4 * u);
    q3n_v_transpose(r);
    if (count == 16) {
      for (int i = 0; i < 16; i++) _mm512_storeu_ps(y + 64 * (u + i), r[i]);
    } else {
      for (int i = 0; i < count; i++) _mm512_storeu_ps(y + 64 * (u + i), r[i]);
    }
  }
}

/* A group of rows of `blocks` blocks. */
static inline void q3n_interleave(uint8_t *y, const uint8_t *const row[16], q3n_dtype dtype, int64_t blocks) {
  const int64_t bytes = q3n_dtype_block_bytes(dtype), head = q3n_group_head(dtype), tail = q3n_group_tail(dtype);
  if (!head && !tail) {
    q3n_interleave_units(y, row, 0, blocks * (bytes / 4));
    return;
  }
  for (int64_t b = 0; b < blocks; b++, y += 16 * bytes) {
    const int64_t at = b * bytes, rest = head ? at : at + bytes - tail;
    q3n_interleave_units(y + 16 * head, row, at + head, bytes / 4);
    uint8_t *to = head ? y : y + 16 * (bytes - tail);
    for (int i = 0; i < 16; i++) memcpy(to + (head + tail) * i, row[i] + rest, (size_t)(head + tail));
  }
}

#endif
