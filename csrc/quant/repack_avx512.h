/* Sixteen rows to a group by transposing 16 x 16 units. Static inline: products of rows that are not repacked
   interleave a group in their scratch. */
#ifndef Q3N_QUANT_REPACK_AVX512_H
#define Q3N_QUANT_REPACK_AVX512_H

#include <immintrin.h>

#include "repack_group.h"

/* r[i][j] becomes r[j][i]. */
static inline void q3n_transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  /* r[4 g + c] holds column c of every 128-bit lane l for rows 4 g .. 4 g + 3: column 4 l + c */
  for (int c = 0; c < 4; c++) {
    const __m512i a = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), b = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd), e = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(a, b, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(a, b, 0xdd);
    t[4 + c] = _mm512_shuffle_i32x4(d, e, 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(d, e, 0xdd);
  }
  for (int i = 0; i < 16; i++) r[i] = t[i];
}

/* `units` units of four bytes of every row. */
static inline void q3n_interleave_units(uint8_t *y, const uint8_t *const row[16], int64_t at, int64_t units) {
  for (int64_t u = 0; u < units; u += 16) {
    const int64_t count = units - u < 16 ? units - u : 16;
    const __mmask16 mask = (__mmask16)((1u << count) - 1);
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_maskz_loadu_epi32(mask, row[i] + at + 4 * u);
    q3n_transpose16(r);
    if (count == 16) {
      for (int i = 0; i < 16; i++) _mm512_storeu_si512(y + 64 * (u + i), r[i]);
    } else {
      for (int i = 0; i < count; i++) _mm512_storeu_si512(y + 64 * (u + i), r[i]);
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
