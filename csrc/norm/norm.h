/* Row norms over the last axis, for x[T][H][D]:

     RMS          y = x rsqrt(mean x^2 + eps) w
     RMS_PLUS1    y = x rsqrt(mean x^2 + eps) (1 + w)          zero-centred weights, as Hugging Face stores them
     RMS_GATED    y = x rsqrt(mean x^2 + eps) w silu(z)        norm first, then the gate
     L2           y = x rsqrt(sum x^2 + eps)                   eps inside the sum; w must be NULL

   The sum of squares is taken in double, so rows of any finite size neither overflow nor vanish. */
#ifndef Q3N_NORM_H
#define Q3N_NORM_H

#include "../base/operator.h"
#include "../cuda/cuda.h"

typedef enum q3n_norm_kind {
  Q3N_NORM_RMS = 0,
  Q3N_NORM_RMS_PLUS1 = 1,
  Q3N_NORM_RMS_GATED = 2,
  Q3N_NORM_L2 = 3
} q3n_norm_kind;

typedef struct q3n_norm_args {
  uint64_t struct_bytes; /* sizeof(q3n_norm_args) */
  float *y;              /* [T][H][D]; may be x itself with the same strides */
  const float *x;        /* [T][H][D] */
  const float *w;        /* [D], or NULL for 1 (RMS_PLUS1: required) */
  const float *z;        /* [T][H][D], RMS_GATED only, else NULL */
  q3n_norm_kind kind;
  float eps;          /* >= 0 */
  int64_t y_t, y_h;   /* strides in elements, >= 0; D is contiguous */
  int64_t x_t, x_h;
  int64_t z_t, z_h;
  int64_t T, H, D;
} q3n_norm_args;

Q3N_DECLARE_OPERATOR(norm);
Q3N_DECLARE_CUDA(norm, norm);

#endif
