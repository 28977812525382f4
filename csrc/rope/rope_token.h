/* How rope is cut into work items: one token each, so that its heads share a table of sines and cosines. */
#ifndef Q3N_ROPE_TOKEN_H
#define Q3N_ROPE_TOKEN_H

#include "rope.h"

int64_t q3n_rope_items(const q3n_rope_args *a);

/* R/2 frequencies in double, then R/2 cosines and R/2 sines in float. */
int64_t q3n_rope_scratch(const q3n_rope_args *a);

/* The same, the frequencies in whole vectors. */
int64_t q3n_rope_avx512_scratch(const q3n_rope_args *a);
int64_t q3n_rope_avx2_scratch(const q3n_rope_args *a);
int64_t q3n_rope_neon_scratch(const q3n_rope_args *a);

#endif
