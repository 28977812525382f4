/* Y = X W^T with W in any dtype: y[m][n] = sum_k x[m][k] w[n][k]. The value of y[m][n] depends on row m of x and row
   n of w alone, so a batch gives the same bits as its rows one at a time. w may start at any address. */
#ifndef Q3N_MATMUL_H
#define Q3N_MATMUL_H

#include "../base/dtype.h"
#include "../base/operator.h"

typedef struct q3n_matmul_args {
  uint64_t struct_bytes; /* sizeof(q3n_matmul_args) */
  float *y;              /* [M][N]; must not overlap an input */
  const float *x;        /* [M][K] */
  const void *w;         /* [N][K] of dtype */
  q3n_dtype dtype;
  int64_t y_m, x_m, w_n; /* strides in elements, >= 0; w_n a multiple of the dtype's block */
  int64_t M, N, K;       /* K a multiple of the dtype's block */
} q3n_matmul_args;

Q3N_DECLARE_OPERATOR(matmul);

#endif
