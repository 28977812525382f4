/* Depthwise causal conv1d with state, then SiLU (exactly once, where asked for):

     y[t][c] = act( bias[c] + sum_{j<W} w[c][j] x[t - (W-1) + j][c] )        act(a) = a / (1 + exp(-a)) or a

   x before the first token comes from the state: state[c][i] is x[i - (W-1)][c], oldest first; NULL means zeros.
   state_out is the same window after the last token, for any T, also T < W-1. Channels and sequences are independent. */
#ifndef Q3N_CAUSAL_CONV_H
#define Q3N_CAUSAL_CONV_H

#include "../base/operator.h"
#include "../cuda/cuda.h"

typedef struct q3n_causal_conv_args {
  uint64_t struct_bytes; /* sizeof(q3n_causal_conv_args) */
  float *y;              /* [B][T][C]; must not overlap an input */
  float *state_out;      /* [slots][C][W-1], a pool; NULL: not wanted. May be state_in itself where slot_out[b] is
                            slot_in[b] for every b */
  float *snapshots;      /* [B][T][C][W-1], the state after every token; NULL: not wanted */
  const float *x;        /* [B][T][C] */
  const float *w;        /* [C][W] */
  const float *bias;     /* [C] or NULL */
  const float *state_in; /* [slots][C][W-1], strides of state_out; NULL: zeros */
  const int64_t *slot_in, *slot_out; /* [B], as in gated_delta.h; NULL: b */
  const int64_t *cu_seqlens;         /* [B+1], as in gated_delta.h; NULL: each sequence has T tokens */
  int32_t silu;
  int64_t y_b, y_t;               /* strides in elements, >= 0; channels are contiguous */
  int64_t x_b, x_t;
  int64_t w_c;                    /* taps are contiguous */
  int64_t state_slot, state_c;    /* the window is contiguous */
  int64_t snap_b, snap_t, snap_c; /* with cu_seqlens, snap_t steps over the packed tokens */
  int64_t slots, B, T, C, width;  /* 1 <= width (W) <= 16 */
} q3n_causal_conv_args;

Q3N_DECLARE_OPERATOR(causal_conv);
Q3N_DECLARE_CUDA(causal_conv, causal_conv);

#endif
