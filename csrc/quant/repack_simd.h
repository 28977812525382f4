/* Sixteen rows to a group by transposing units, over the vectors of csrc/simd, which is included before this. Static
   inline: products of rows that are not repacked interleave a group in their scratch. */
#ifndef Q3N_QUANT_REPACK_SIMD_H
#define Q3N_QUANT_REPACK_SIMD_H

#include "repack_group.h"

/* `units` units of four bytes of every row, as many rows and units at a time as a vector has lanes. Lanes are moved and
   never computed with, so bytes of any kind pass as floats. */
static inline void q3n_interleave_units(uint8_t *y, const uint8_t *const row[16], int64_t at, int64_t units) {
  for (int64_t u = 0; u < units; u += Q3N_LANES)
    for (int64_t first = 0; first < Q3N_GROUP; first += Q3N_LANES) {
      q3n_v r[Q3N_LANES];
      float *to = (float *)(void *)(y + 64 * u) + first;
      if (units - u >= Q3N_LANES) {
        for (int i = 0; i < Q3N_LANES; i++) r[i] = q3n_v_load((const float *)(const void *)(row[first + i] + at + 4 * u));
        q3n_v_transpose(r);
        for (int i = 0; i < Q3N_LANES; i++) q3n_v_store(to + 16 * i, r[i]);
      } else {
        const q3n_v_mask mask = q3n_v_first(units - u);
        for (int i = 0; i < Q3N_LANES; i++)
          r[i] = q3n_v_load_some(mask, (const float *)(const void *)(row[first + i] + at + 4 * u));
        q3n_v_transpose(r);
        for (int i = 0; i < units - u; i++) q3n_v_store(to + 16 * i, r[i]);
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

/* The operator: groups begin .. end - 1. */
static inline q3n_status q3n_repack_groups(const q3n_repack_args *a, int64_t begin, int64_t end) {
  const int64_t bytes = q3n_dtype_block_bytes(a->dtype), blocks = a->N / q3n_dtype_block(a->dtype);
  const int64_t x_row = a->x_row / q3n_dtype_block(a->dtype) * bytes;
  for (int64_t item = begin; item < end; item++) {
    const uint8_t *row[Q3N_GROUP];
    for (int i = 0; i < Q3N_GROUP; i++) row[i] = (const uint8_t *)a->x + (item * Q3N_GROUP + i) * x_row;
    q3n_interleave((uint8_t *)a->y + item * Q3N_GROUP * blocks * bytes, row, a->dtype, blocks);
  }
  return Q3N_OK;
}

#endif
