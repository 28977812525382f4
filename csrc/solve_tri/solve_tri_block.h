/* How solve_tri is cut into work items: (batch entry, block of columns of the right-hand side). */
#ifndef Q3N_SOLVE_TRI_BLOCK_H
#define Q3N_SOLVE_TRI_BLOCK_H

#include "solve_tri.h"

enum { Q3N_SOLVE_TRI_COLUMNS = 16 };

int64_t q3n_solve_tri_items(const q3n_solve_tri_args *a);
int64_t q3n_solve_tri_no_scratch(const q3n_solve_tri_args *a);
int64_t q3n_solve_tri_avx512_items(const q3n_solve_tri_args *a); /* blocks of 32 columns; AVX2: of 16 */
int64_t q3n_solve_tri_avx512_scratch(const q3n_solve_tri_args *a);
int64_t q3n_solve_tri_avx2_items(const q3n_solve_tri_args *a);
int64_t q3n_solve_tri_avx2_scratch(const q3n_solve_tri_args *a);

#endif
