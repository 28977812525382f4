/* Where the bytes of a row lie in a group of 16 (repack.h). Static inline: rooms that read groups compile it. */
#ifndef Q3N_QUANT_REPACK_GROUP_H
#define Q3N_QUANT_REPACK_GROUP_H

#include <string.h>

#include "../base/dtype.h"
#include "repack.h"

/* Rows of a group; bytes of the largest block. */
enum { Q3N_GROUP = Q3N_GROUP_ROWS, Q3N_BLOCK_BYTES_MAX = 320 };

/* Bytes of a block before its first unit of four, and past the last. */
static inline int64_t q3n_group_head(q3n_dtype dtype) {
  return q3n_dtype_block(dtype) == 32 ? q3n_dtype_block_bytes(dtype) % 4 : 0;
}

static inline int64_t q3n_group_tail(q3n_dtype dtype) {
  return q3n_dtype_block(dtype) == 32 ? 0 : q3n_dtype_block_bytes(dtype) % 4;
}

/* One block of row `row` of a group, to or from its place among the 16 blocks at `group`. */
static inline void q3n_group_copy(uint8_t *group, uint8_t *block, q3n_dtype dtype, int64_t row, int into_group) {
  const int64_t bytes = q3n_dtype_block_bytes(dtype), head = q3n_group_head(dtype), tail = q3n_group_tail(dtype);
  for (int64_t at = 0, size; at < bytes; at += size) {
    size = at < head ? head : at < bytes - tail ? 4 : tail;
    uint8_t *there = group + Q3N_GROUP * at + size * row;
    memcpy(into_group ? there : block + at, into_group ? block + at : there, (size_t)size);
  }
}

int64_t q3n_repack_items(const q3n_repack_args *a);
int64_t q3n_repack_no_scratch(const q3n_repack_args *a);

#endif
