/* How matmul is cut into work items: blocks of rows of w. */
#ifndef Q3N_MATMUL_BLOCK_H
#define Q3N_MATMUL_BLOCK_H

#include "matmul.h"

/* Eight rows of 2048 floats are 64 KB: they stay in the second cache while every row of x passes by. */
enum { Q3N_MATMUL_ROWS = 8 };

/* SIMD variants take 32 rows of w at a time, and up to three rows of x in f32. */
enum { Q3N_TILE_ROWS = 32, Q3N_F32_TOKENS = 3 };

int64_t q3n_matmul_items(const q3n_matmul_args *a);
int64_t q3n_matmul_row_scratch(const q3n_matmul_args *a);  /* rows of w, then one of x */
int64_t q3n_matmul_tile_items(const q3n_matmul_args *a);
int64_t q3n_matmul_tile_scratch(const q3n_matmul_args *a); /* rows of w, then rows of x; or groups of 16 rows of w */

#endif
