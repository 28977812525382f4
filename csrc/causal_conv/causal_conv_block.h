/* How causal_conv is cut into work items: (sequence, block of channels). */
#ifndef Q3N_CAUSAL_CONV_BLOCK_H
#define Q3N_CAUSAL_CONV_BLOCK_H

#include "causal_conv.h"

enum { Q3N_CAUSAL_CONV_CHANNELS = 64, Q3N_CAUSAL_CONV_MAX_WIDTH = 16 };

int64_t q3n_causal_conv_items(const q3n_causal_conv_args *a);
int64_t q3n_causal_conv_no_scratch(const q3n_causal_conv_args *a);

#endif
