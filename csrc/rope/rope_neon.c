/* Frequencies once a call, sines and cosines once a token, as in rope_scalar.c; then four pairs of a head at a time. */
#include <math.h>
#include <string.h>

#include "../base/check.h"
#include "../simd/neon.h"
#include "rope_token.h"

q3n_status q3n_rope_neon(const q3n_rope_args *a, int64_t begin, int64_t end, void *scratch);

/* The rotated channels of one head; y may be x. */
static void rotate(float *y, const float *x, const float *cosine, const float *sine, int64_t half) {
  for (int64_t i = 0; i < half; i += 4) {
    const float32x4_t c = q3n_load_upto(cosine, i, half), s = q3n_load_upto(sine, i, half);
    const float32x4_t first = q3n_load_upto(x, i, half), second = q3n_load_upto(x + half, i, half);
    q3n_store_upto(y, i, half, vfmsq_f32(vmulq_f32(first, c), second, s));
    q3n_store_upto(y + half, i, half, vfmaq_f32(vmulq_f32(first, s), second, c));
  }
}

q3n_status q3n_rope_neon(const q3n_rope_args *a, int64_t begin, int64_t end, void *scratch) {
  const int64_t half = a->R / 2, tail = a->D - a->R;
  double *frequency = scratch;
  float *cosine = half ? (float *)((char *)scratch + q3n_align(half * 8)) : NULL;
  float *sine = half ? cosine + half : NULL;
  for (int64_t i = 0; i < half; i++) frequency[i] = pow(a->base, -2.0 * (double)i / (double)a->R);

  for (int64_t t = begin; t < end; t++) {
    /* In double: at position 1e6 a float angle is off by up to 0.03 rad. */
    for (int64_t i = 0; i < half; i++) {
      const double angle = (double)a->pos[t] * frequency[i];
      cosine[i] = (float)cos(angle);
      sine[i] = (float)sin(angle);
    }
    for (int64_t h = 0; h < a->H; h++) {
      const float *x = a->x + t * a->x_t + h * a->x_h;
      float *y = a->y + t * a->y_t + h * a->y_h;
      rotate(y, x, cosine, sine, half);
      if (tail && y != x) memcpy(y + a->R, x + a->R, (size_t)tail * sizeof *y);
    }
  }
  return Q3N_OK;
}
