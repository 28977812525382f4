/* How dequantize and quantize are cut into work items: one row each. */
#ifndef Q3N_QUANT_BLOCK_H
#define Q3N_QUANT_BLOCK_H

#include "quant.h"

int64_t q3n_dequantize_items(const q3n_dequantize_args *a);
int64_t q3n_dequantize_no_scratch(const q3n_dequantize_args *a);
int64_t q3n_quantize_items(const q3n_quantize_args *a);
int64_t q3n_quantize_no_scratch(const q3n_quantize_args *a);

#endif
