/* Triangular solve: X from L X = B, for each of `batch` lower triangular L [n][n] and right-hand sides B [n][m].

     x_i = (b_i - sum_{j<i} L_ij x_j) / L_ii          (unit_diagonal: no division, L_ii is not read)

   Elements of L above the diagonal are never read. A zero on the diagonal divides by zero: infinities and NaN come
   out, as IEEE says, in that batch entry alone. Columns of B are independent of each other.
   b = NULL stands for the identity (m = n): X is then the inverse of L, its upper triangle exactly 0. */
#ifndef Q3N_SOLVE_TRI_H
#define Q3N_SOLVE_TRI_H

#include "../base/operator.h"
#include "../cuda/cuda.h"

typedef struct q3n_solve_tri_args {
  uint64_t struct_bytes; /* sizeof(q3n_solve_tri_args) */
  float *x;              /* [batch][n][m]; may be b itself with the same strides (solve in place) */
  const float *l;        /* [batch][n][n] */
  const float *b;        /* [batch][n][m], or NULL */
  int32_t unit_diagonal;
  int64_t x_batch, x_row; /* strides in elements, >= 0; columns are contiguous */
  int64_t l_batch, l_row;
  int64_t b_batch, b_row;
  int64_t batch, n, m; /* n <= 256 */
} q3n_solve_tri_args;

Q3N_DECLARE_OPERATOR(solve_tri);
Q3N_DECLARE_CUDA(solve_tri, solve_tri);

#endif
