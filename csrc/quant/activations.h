/* Rows of f32 activations to 8 bits: x = d q with d = max |x| / 127 of a block and q to nearest, ties to even. A block
   with a NaN or an infinity gets d = NaN, so all that meets it becomes NaN; a block of zeros (or one whose d would be
   below 2^-126) gets d = 0. q8_activations.h has the layout. Items are rows. */
#ifndef Q3N_QUANT_ACTIVATIONS_H
#define Q3N_QUANT_ACTIVATIONS_H

#include "../base/dtype.h"
#include "../base/operator.h"
#include "../cuda/cuda.h"
#include "q8_activations.h"

typedef struct q3n_activations_args {
  uint64_t struct_bytes; /* sizeof(q3n_activations_args) */
  void *y;               /* [rows][N] of dtype, rows packed; 4-byte aligned; must not overlap x */
  const float *x;        /* [rows][N] */
  q3n_dtype dtype;       /* Q3N_Q8_X32 or Q3N_Q8_X256 */
  int64_t x_row;         /* stride in elements */
  int64_t rows, N;       /* N a multiple of the block */
} q3n_activations_args;

Q3N_DECLARE_OPERATOR(activations);
Q3N_DECLARE_CUDA(activations, activations);

#endif
