/* Y = X W^T with W in any dtype: y[m][n] = sum_k x[m][k] w[n][k]. The value of y[m][n] depends on row m of x and row
   n of w alone, so a batch gives the same bits as its rows one at a time. w may start at any address.

   X in f32 meets the decoded weights in f32. X in the activations of w's dtype (csrc/quant/activations.h, made once a
   row and shared by all weights it meets) lets a variant multiply integers, exactly within a block. With
   Q3N_R16 (csrc/quant/repack.h) rows of w lie in groups of 16: the same values, faster to load. */
#ifndef Q3N_MATMUL_H
#define Q3N_MATMUL_H

#include "../base/dtype.h"
#include "../base/operator.h"
#include "../cuda/cuda.h"

typedef struct q3n_matmul_args {
  uint64_t struct_bytes; /* sizeof(q3n_matmul_args) */
  float *y;              /* [M][N]; must not overlap an input */
  const void *x;         /* [M][K] of x_dtype; 4-byte aligned where not empty */
  const void *w;         /* [N][K] of dtype */
  q3n_dtype dtype;       /* of w; with Q3N_R16: N a multiple of 16 and w_n = K */
  q3n_dtype x_dtype;     /* Q3N_F32 or q3n_dtype_activations(dtype) */
  int64_t y_m, x_m, w_n; /* strides in elements, >= 0; w_n and x_m multiples of the dtypes' blocks */
  int64_t M, N, K;       /* K a multiple of the dtype's block */
} q3n_matmul_args;

Q3N_DECLARE_OPERATOR(matmul);
Q3N_DECLARE_CUDA(matmul, matmul);

#endif
