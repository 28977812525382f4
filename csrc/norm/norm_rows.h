/* How norm is cut into work items: one row (t, h) each. */
#ifndef Q3N_NORM_ROWS_H
#define Q3N_NORM_ROWS_H

#include "norm.h"

int64_t q3n_norm_items(const q3n_norm_args *a);
int64_t q3n_norm_no_scratch(const q3n_norm_args *a);

#endif
