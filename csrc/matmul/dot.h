/* What matmul and moe share: rows of a weight matrix as f32, and one dot product. Static inline, as all of it is
   hot. */
#ifndef Q3N_MATMUL_DOT_H
#define Q3N_MATMUL_DOT_H

#include "../quant/quant_blocks.h"
#include "../quant/repack_group.h"

enum { Q3N_DOT_LANES = 16 };

/* Sixteen running sums, then a tree: the order depends on n alone. */
static inline float q3n_dot(const float *a, const float *b, int64_t n) {
  float sum[Q3N_DOT_LANES] = {0};
  const int64_t whole = n - n % Q3N_DOT_LANES;
  for (int64_t i = 0; i < whole; i += Q3N_DOT_LANES)
    for (int l = 0; l < Q3N_DOT_LANES; l++) sum[l] += a[i + l] * b[i + l];
  for (int64_t i = whole; i < n; i++) sum[i - whole] += a[i] * b[i];
  for (int half = Q3N_DOT_LANES / 2; half > 0; half /= 2)
    for (int l = 0; l < half; l++) sum[l] += sum[l + half];
  return sum[0];
}

/* n elements at element `first` of x as f32: where they lie if they are aligned f32, else decoded into scratch. */
static inline const float *q3n_floats(const void *x, q3n_dtype dtype, int64_t first, int64_t n, float *scratch) {
  const void *row = q3n_element(x, dtype, first);
  if (dtype == Q3N_F32 && (uintptr_t)row % sizeof(float) == 0) return (const float *)row;
  q3n_row_to_float(dtype, row, scratch, n);
  return scratch;
}

/* Row `row` of a group of 16 interleaved rows of n elements. */
static inline void q3n_group_row_to_float(q3n_dtype dtype, const uint8_t *group, int64_t row, int64_t n, float *y) {
  const int64_t block = q3n_dtype_block(dtype), bytes = q3n_dtype_block_bytes(dtype);
  uint8_t one[Q3N_BLOCK_BYTES_MAX];
  for (int64_t b = 0; b < n / block; b++) {
    q3n_group_copy((uint8_t *)group + b * Q3N_GROUP * bytes, one, dtype, row, 0);
    q3n_row_to_float(dtype, one, y + b * block, block);
  }
}

/* rows[r] = row first + r of w, [..][n] of dtype with `stride` elements from row to row, as q3n_floats gives it;
   scratch holds count * n floats. */
static inline void q3n_rows(const float **rows, int64_t count, const void *w, q3n_dtype dtype, int64_t first,
                            int64_t stride, int64_t n, float *scratch) {
  for (int64_t r = 0; r < count; r++) {
    float *to = scratch + r * n;
    const int64_t row = first + r;
    if (dtype & Q3N_R16) {
      const uint8_t *group = q3n_element(w, q3n_dtype_rows(dtype), row / Q3N_GROUP * Q3N_GROUP * stride);
      q3n_group_row_to_float(q3n_dtype_rows(dtype), group, row % Q3N_GROUP, n, to);
      rows[r] = to;
    } else {
      rows[r] = q3n_floats(w, dtype, row * stride, n, to);
    }
  }
}

#endif
