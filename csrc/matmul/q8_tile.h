/* Tiles of the integer product: up to Q3N_Q8_TOKENS rows of 8-bit activations meet 32 rows of w in two interleaved
   groups (csrc/quant/repack.h). A tile's sums over a block are exact integers; blocks are added in order as
   y = fma(sum, d_w d_x, y), then for types with minima y = fma(-minima, dmin_w d_x, y). So y[m][n] depends on row m
   and row n alone, whatever the tile. */
#ifndef Q3N_MATMUL_Q8_TILE_H
#define Q3N_MATMUL_Q8_TILE_H

#include "../base/dtype.h"

enum { Q3N_Q8_TOKENS = 12 };

/* y [M][32] from groups w0 and w1 (which may be the same) and rows x[0..M-1] of `blocks` blocks. `next`: the two groups
   that the caller takes next, one after the other, fetched into the cache meanwhile; where there are none, w0. */
typedef void q3n_q8_tile(float *y, const uint8_t *w0, const uint8_t *w1, const uint8_t *const *x, int64_t blocks,
                         const uint8_t *next);

/* The tile of `tokens` (1 to 6, 8, 10 or 12) rows for weights of a (row) dtype; NULL where there is none. */
typedef q3n_q8_tile *q3n_q8_tile_of(q3n_dtype dtype, int64_t tokens);
q3n_q8_tile_of q3n_q8_tile_avx512vnni, q3n_q8_tile_avx2, q3n_q8_tile_neon, q3n_q8_tile_neondot;

#endif
