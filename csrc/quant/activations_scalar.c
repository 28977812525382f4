/* One block after the other. */
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "activations_block.h"

q3n_status q3n_activations_scalar(const q3n_activations_args *a, int64_t begin, int64_t end, void *scratch);

/* Writes n values; returns d. */
static float encode(int8_t *q, const float *x, size_t n) {
  float most = 0.0f;
  int finite = 1;
  for (size_t i = 0; i < n; i++) {
    const float size = fabsf(x[i]);
    finite &= size < INFINITY;
    most = size > most ? size : most;
  }
  memset(q, 0, n);
  if (!finite) return NAN;
  const float d = most / 127.0f;
  if (d < 0x1p-126f) return 0.0f;
  /* d is at least 2^-126, so its reciprocal is finite; rounding may carry a value to 127 and no further */
  const float inverse = 1.0f / d;
  for (size_t i = 0; i < n; i++) q[i] = (int8_t)rintf(x[i] * inverse);
  return d;
}

static int sum(const int8_t *q, int n) {
  int s = 0;
  for (int i = 0; i < n; i++) s += q[i];
  return s;
}

static void to_x32(q3n_block_q8_x32 *b, const float *x) {
  b->d = encode(b->q, x, 32);
  b->sum = sum(b->q, 32);
}

static void to_x256(q3n_block_q8_x256 *b, const float *x) {
  b->d = encode(b->q, x, 256);
  for (int i = 0; i < 8; i++) b->sum32[q3n_q8_sum_at(i)] = (int16_t)sum(b->q + 32 * i, 32);
  for (int i = 0; i < 16; i++) b->sum16[q3n_q8_sum_at(i)] = (int16_t)sum(b->q + 16 * i, 16);
  memset(b->unused, 0, sizeof b->unused);
}

q3n_status q3n_activations_scalar(const q3n_activations_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  for (int64_t row = begin; row < end; row++) {
    const float *x = a->x + row * a->x_row;
    if (a->dtype == Q3N_Q8_X32) {
      q3n_block_q8_x32 *y = (q3n_block_q8_x32 *)a->y + row * (a->N / 32);
      for (int64_t i = 0; i < a->N / 32; i++) to_x32(y + i, x + 32 * i);
    } else {
      q3n_block_q8_x256 *y = (q3n_block_q8_x256 *)a->y + row * (a->N / 256);
      for (int64_t i = 0; i < a->N / 256; i++) to_x256(y + i, x + 256 * i);
    }
  }
  return Q3N_OK;
}
