/* What the two AVX-512 forms of up and down share: the steps after the dots. Static inline. */
#ifndef Q3N_MOE_TILES_AVX512_H
#define Q3N_MOE_TILES_AVX512_H

#include "../simd/avx512.h"
#include "moe_block.h"

/* The first expert after e that any pair chose; e where there is none. */
static inline int64_t q3n_next_expert(const int64_t *offsets, int64_t e, int64_t E) {
  for (int64_t after = e + 1; after < E; after++)
    if (offsets[after] < offsets[after + 1]) return after;
  return e;
}

/* h = silu(gate) * up for `count` rows of one pair. */
static inline void q3n_moe_swiglu(float *h, const float *gate, const float *up, int64_t count) {
  for (int64_t r = 0; r < count; r += 16) {
    const __mmask16 mask = q3n_mask16(count, r / 16);
    const __m512 g = _mm512_maskz_loadu_ps(mask, gate + r), u = _mm512_maskz_loadu_ps(mask, up + r);
    _mm512_mask_storeu_ps(h + r, mask, _mm512_mul_ps(q3n_v_silu(g), u));
  }
}

/* y of rows first .. first + count - 1 from the dots of all pairs, [T * top_k][Q3N_MOE_DOWN_ROWS]: a token's choices are
   added in their own order. */
static inline void q3n_moe_combine(const q3n_moe_down_args *a, const float *dots, int64_t first, int64_t count) {
  for (int64_t t = 0; t < a->T; t++)
    for (int64_t r = 0; r < count; r += 16) {
      const __mmask16 mask = q3n_mask16(count, r / 16);
      __m512 sum = _mm512_setzero_ps();
      for (int64_t pair = t * a->top_k; pair < (t + 1) * a->top_k; pair++) {
        const __m512 weight = _mm512_set1_ps(a->weights ? a->weights[pair] : 1.0f);
        sum = _mm512_fmadd_ps(weight, _mm512_maskz_loadu_ps(mask, dots + pair * Q3N_MOE_DOWN_ROWS + r), sum);
      }
      float *y = a->y + t * a->y_t + first + r;
      if (a->accumulate) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y), sum);
      _mm512_mask_storeu_ps(y, mask, sum);
    }
}

#endif
