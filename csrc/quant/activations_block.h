/* How activations is cut into work items: one row each. */
#ifndef Q3N_QUANT_ACTIVATIONS_BLOCK_H
#define Q3N_QUANT_ACTIVATIONS_BLOCK_H

#include "activations.h"
#include "q8_activations.h"

int64_t q3n_activations_items(const q3n_activations_args *a);
int64_t q3n_activations_no_scratch(const q3n_activations_args *a);

#endif
