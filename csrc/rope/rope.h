/* Partial rotary embedding, NeoX pairing: of each head the first R channels are rotated in pairs (i, i + R/2) by the
   angle pos * base^(-2i/R); the other D - R channels are copied, bit for bit. */
#ifndef Q3N_ROPE_H
#define Q3N_ROPE_H

#include "../base/operator.h"
#include "../cuda/cuda.h"

typedef struct q3n_rope_args {
  uint64_t struct_bytes; /* sizeof(q3n_rope_args) */
  float *y;              /* [T][H][D]; may be x itself with the same strides */
  const float *x;        /* [T][H][D] */
  const int64_t *pos;    /* [T], >= 0 */
  double base;           /* > 0, customary 1e7 here */
  int64_t y_t, y_h;      /* strides in elements, >= 0; D is contiguous */
  int64_t x_t, x_h;
  int64_t T, H, D, R;    /* R even, 0 <= R <= D */
} q3n_rope_args;

Q3N_DECLARE_OPERATOR(rope);
Q3N_DECLARE_CUDA(rope, rope);

#endif
