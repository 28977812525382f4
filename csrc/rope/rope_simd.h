/* Over the vectors of csrc/simd: sines and cosines of a token's R/2 angles in double, then every head by the same
   table. With libm they would take most of the time. */
#include <math.h>
#include <string.h>

#include "../base/check.h"
#include "rope_token.h"

enum { LANES = Q3N_LANES };

/* Larger angles than this are left to libm: up to it the multiple of pi/2 fits 31 bits. */
#define LARGEST 0x1p30

/* Sine and cosine of 0 <= x <= LARGEST within 2^-43 + 2^-52 x: x less n pi/2, then Taylor series up to r^13 and r^14 on
   |r| <= pi/4 (their first missing terms are 2e-14 and 1e-15), then by n's last bits which is which and its sign. */
static inline void sine_cosine(q3n_d x, q3n_d *sine, q3n_d *cosine) {
  static const double s[] = {1.0 / 6227020800.0, -1.0 / 39916800.0, 1.0 / 362880.0,
                             -1.0 / 5040.0,      1.0 / 120.0,       -1.0 / 6.0};
  static const double c[] = {-1.0 / 87178291200.0, 1.0 / 479001600.0, -1.0 / 3628800.0, 1.0 / 40320.0,
                             -1.0 / 720.0,         1.0 / 24.0,         -1.0 / 2.0};
  const q3n_d n = q3n_d_round(q3n_d_mul(x, q3n_d_set(0x1.45f306dc9c883p-1)));
  /* pi/2 in two doubles. */
  const q3n_d r = q3n_d_nfma(n, q3n_d_set(0x1.1a62633145c07p-54), q3n_d_nfma(n, q3n_d_set(0x1.921fb54442d18p+0), x));
  const q3n_d r2 = q3n_d_mul(r, r);
  q3n_d p = q3n_d_set(s[0]), q = q3n_d_set(c[0]);
  for (int i = 1; i < 6; i++) p = q3n_d_fma(p, r2, q3n_d_set(s[i]));
  for (int i = 1; i < 7; i++) q = q3n_d_fma(q, r2, q3n_d_set(c[i]));
  p = q3n_d_fma(q3n_d_mul(p, r2), r, r);
  q = q3n_d_fma(q, r2, q3n_d_set(1.0));
  *sine = q3n_d_negate_if_2(n, q3n_d_if_odd(n, p, q));
  *cosine = q3n_d_negate_if_2(q3n_d_add(n, q3n_d_set(1.0)), q3n_d_if_odd(n, q, p));
}

/* The table of one token. `frequency` has R/2 entries and zeros up to whole vectors. */
static inline void fill_table(float *cosine, float *sine, const double *frequency, double pos, int64_t half) {
  double largest = 0.0;
  for (int64_t i = 0; i < half; i++) largest = frequency[i] > largest ? frequency[i] : largest;
  if (!(pos * largest <= LARGEST)) {
    for (int64_t i = 0; i < half; i++) {
      const double angle = pos * frequency[i];
      cosine[i] = (float)cos(angle);
      sine[i] = (float)sin(angle);
    }
    return;
  }
  const q3n_d p = q3n_d_set(pos);
  for (int64_t i = 0; i < half; i += LANES) {
    const q3n_v_mask some = q3n_v_first(half - i);
    q3n_d s[2], c[2];
    for (int part = 0; part < 2; part++)
      sine_cosine(q3n_d_mul(p, q3n_d_load(frequency + i + part * Q3N_D_LANES)), &s[part], &c[part]);
    q3n_v_store_some(cosine + i, some, q3n_d_join(c[0], c[1]));
    q3n_v_store_some(sine + i, some, q3n_d_join(s[0], s[1]));
  }
}

static inline int64_t padded_half(const q3n_rope_args *a) { return (a->R / 2 + LANES - 1) / LANES * LANES; }

static inline int64_t vector_scratch(const q3n_rope_args *a) {
  return q3n_rope_items(a) ? q3n_align(padded_half(a) * 8) + q3n_align(a->R * 4) : 0;
}

static inline q3n_status run_tokens(const q3n_rope_args *a, int64_t begin, int64_t end, void *scratch) {
  const int64_t half = a->R / 2, tail = a->D - a->R;
  double *frequency = scratch;
  float *cosine = half ? (float *)((char *)scratch + q3n_align(padded_half(a) * 8)) : NULL;
  float *sine = half ? cosine + half : NULL;
  for (int64_t i = 0; i < half; i++) frequency[i] = pow(a->base, -2.0 * (double)i / (double)a->R);
  for (int64_t i = half; i < padded_half(a); i++) frequency[i] = 0.0;

  for (int64_t t = begin; t < end; t++) {
    fill_table(cosine, sine, frequency, (double)a->pos[t], half);
    for (int64_t h = 0; h < a->H; h++) {
      const float *x = a->x + t * a->x_t + h * a->x_h;
      float *y = a->y + t * a->y_t + h * a->y_h;
      for (int64_t i = 0; i < half; i += LANES) {
        const q3n_v_mask some = q3n_v_first(half - i);
        const q3n_v first = q3n_v_load_some(some, x + i), second = q3n_v_load_some(some, x + i + half);
        const q3n_v c = q3n_v_load_some(some, cosine + i), s = q3n_v_load_some(some, sine + i);
        q3n_v_store_some(y + i, some, q3n_v_nfma(second, s, q3n_v_mul(first, c)));
        q3n_v_store_some(y + i + half, some, q3n_v_fma(first, s, q3n_v_mul(second, c)));
      }
      if (tail && y != x) memcpy(y + a->R, x + a->R, (size_t)tail * sizeof *y);
    }
  }
  return Q3N_OK;
}
