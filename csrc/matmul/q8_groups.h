/* What matmul and moe share around the integer tiles: 32 rows of w as two groups, and how tokens are cut into tiles.
   Static inline; vectors of csrc/simd are included before this. */
#ifndef Q3N_MATMUL_Q8_GROUPS_H
#define Q3N_MATMUL_Q8_GROUPS_H

#include "../quant/quant_blocks.h"
#include "../quant/repack_simd.h"
#include "q8_tile.h"

/* Two groups of 16 rows; where fewer than 17 rows are left both are the first. */
typedef struct {
  const uint8_t *group[2];
} q3n_groups;

/* Rows first .. first + count - 1 (count <= 32) of w: where they lie if w is interleaved, else interleaved into
   scratch (32 rows of blocks). Rows past the count repeat the last. */
static inline q3n_groups q3n_groups_of(const void *w, q3n_dtype dtype, int64_t first, int64_t count, int64_t stride,
                                       int64_t n, uint8_t *scratch) {
  const q3n_dtype type = q3n_dtype_rows(dtype);
  const int64_t block = q3n_dtype_block(type), group_bytes = Q3N_GROUP * (n / block) * q3n_dtype_block_bytes(type);
  q3n_groups g;
  for (int64_t i = 0; i < 2; i++) {
    if (Q3N_GROUP * i >= count) {
      g.group[i] = g.group[0];
    } else if (dtype & Q3N_R16) {
      g.group[i] = (const uint8_t *)q3n_element(w, type, (first + Q3N_GROUP * i) * stride);
    } else {
      const uint8_t *row[Q3N_GROUP];
      for (int64_t r = 0; r < Q3N_GROUP; r++) {
        const int64_t at = Q3N_GROUP * i + r;
        row[r] = (const uint8_t *)q3n_element(w, type, (first + (at < count ? at : count - 1)) * stride);
      }
      q3n_interleave(scratch + i * group_bytes, row, type, n / block);
      g.group[i] = scratch + i * group_bytes;
    }
  }
  return g;
}

/* Where rows `first` .. of w lie, to be fetched while the tile before them is computed; `otherwise` where there are
   none or rows of n elements are not packed. */
static inline const uint8_t *q3n_groups_next(const void *w, q3n_dtype dtype, int64_t first, int64_t rows, int64_t stride,
                                             int64_t n, const uint8_t *otherwise) {
  return first < rows && stride == n ? (const uint8_t *)q3n_element(w, dtype, first * stride) : otherwise;
}

/* How many of `left` tokens the next tile takes: there are tiles of 1 to 6, 8 and 10, and even cuts waste least. */
static inline int64_t q3n_q8_take(int64_t left) {
  static const int8_t take[] = {0, 1, 2, 3, 4, 5, 6, 4, 8, 5, 10, 6, 6, 8, 8, 10, 8};
  return left < 17 ? take[left] : 10;
}

#endif
