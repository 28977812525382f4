/* The integer product for rows of w as files have them, for a few rows of activations: interleaving w first
   (q8_tile.h) would cost more than the product. The same sums in the same order, so the same bits. */
#ifndef Q3N_MATMUL_Q8_ROWS_H
#define Q3N_MATMUL_Q8_ROWS_H

#include "../base/dtype.h"

/* y [M][32] from 32 rows of w (pointers may repeat) and rows x[0..M-1] of `blocks` blocks. `next`: rows that the caller
   takes next, one after the other, fetched into the cache meanwhile; where there are none, row[0]. */
typedef void q3n_q8_rows(float *y, const uint8_t *const *row, const uint8_t *const *x, int64_t blocks,
                         const uint8_t *next);

/* The product for `tokens` (1 .. 4) rows of x and weights of a (row) dtype; NULL where there is none. */
typedef q3n_q8_rows *q3n_q8_rows_of(q3n_dtype dtype, int64_t tokens);
q3n_q8_rows_of q3n_q8_rows_avx512vnni;

#endif
