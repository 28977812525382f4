/* What matmul and moe share: rows of a weight matrix as f32, and one dot product. Static inline, as all of it is
   hot. */
#ifndef Q3N_MATMUL_DOT_H
#define Q3N_MATMUL_DOT_H

#include "../quant/quant_blocks.h"

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

/* rows[r] = row first + r of w, [..][n] of dtype with `stride` elements from row to row: where it lies if that is
   aligned f32, else dequantised into scratch (count * n floats). */
static inline void q3n_rows(const float **rows, int64_t count, const void *w, q3n_dtype dtype, int64_t first,
                            int64_t stride, int64_t n, float *scratch) {
  for (int64_t r = 0; r < count; r++) {
    const void *row = q3n_element(w, dtype, (first + r) * stride);
    if (dtype == Q3N_F32 && (uintptr_t)row % sizeof(float) == 0) {
      rows[r] = (const float *)row;
    } else {
      q3n_row_to_float(dtype, row, scratch + r * n, n);
      rows[r] = scratch + r * n;
    }
  }
}

#endif
