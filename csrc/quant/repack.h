/* Run-time repack: rows of a block type to groups of 16 interleaved rows (the dtype with Q3N_R16), so that one vector
   load brings the same four bytes of 16 rows. Nothing is decoded: the bytes of block b of rows 16 g .. 16 g + 15 lie
   together, cut into units of four bytes, unit by unit, and within a unit row by row. Blocks of 32 start with what
   their size leaves over four (the scale), super-blocks end with it; it lies row by row as well.
   Items are groups. */
#ifndef Q3N_QUANT_REPACK_H
#define Q3N_QUANT_REPACK_H

#include "../base/dtype.h"
#include "../base/operator.h"

enum { Q3N_GROUP_ROWS = 16 };

typedef struct q3n_repack_args {
  uint64_t struct_bytes; /* sizeof(q3n_repack_args) */
  void *y;               /* [rows][N] of dtype | Q3N_R16, packed; must not overlap x */
  const void *x;         /* [rows][N] of dtype */
  q3n_dtype dtype;       /* a block type, without Q3N_R16 */
  int64_t x_row;         /* stride in elements, a multiple of the block */
  int64_t rows, N;       /* rows a multiple of 16, N of the block */
} q3n_repack_args;

Q3N_DECLARE_OPERATOR(repack);

#endif
