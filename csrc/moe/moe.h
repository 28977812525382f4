/* The sparse feed-forward of Qwen3-Next, in four steps: route, group, up, down.

   The shared expert is the same with E = top_k = 1 and weights = sigmoid(x . w_shared_gate), accumulated; a dense
   feed-forward is the same with weights NULL. Experts that no token chose are never read.
   Activations x and h are f32, or quantised once a row for the weights they meet (csrc/quant/activations.h); weights
   may be interleaved (Q3N_R16: F, of down D, a multiple of 16, and packed rows), as in csrc/matmul/matmul.h.
   Sizes up to T 2^24, D and F 2^22, E and top_k 65536; 0 is legal unless said. */
#ifndef Q3N_MOE_H
#define Q3N_MOE_H

#include "../base/dtype.h"
#include "../base/operator.h"
#include "../cuda/cuda.h"

/* p = softmax over all E logits; the top_k largest, ties to the lower index, in descending order; normalize: weights
   divided by their sum. Items are tokens. The order is that of the logits, so how exp rounds never moves a choice.
   Infinite logits are limits: those at +inf share the mass evenly, -inf has weight 0, and where all are -inf all are
   equal. A NaN among a token's logits is Q3N_NAN; that token and the later ones of the call are not routed. */
typedef struct q3n_moe_route_args {
  uint64_t struct_bytes; /* sizeof(q3n_moe_route_args) */
  int32_t *ids;          /* [T][top_k] */
  float *weights;        /* [T][top_k] */
  int64_t *bad_token;    /* one value, INT64_MAX before; each call that returns Q3N_NAN lowers it (atomically) to the
                            first such token of its range: the lowest of all, once all ranges ran. NULL: not wanted */
  const float *logits;   /* [T][E] */
  int32_t normalize;
  int64_t logits_t;      /* stride in elements */
  int64_t T, E, top_k;   /* 1 <= top_k <= E <= 65536 */
} q3n_moe_route_args;

Q3N_DECLARE_OPERATOR(moe_route);

/* On a device bad_token alone tells of a NaN: the call is queued, not finished, when it returns. Tokens with one get the
   experts 0 .. top_k - 1 with NaN as weights, so that what is queued behind finds experts that there are. */
Q3N_DECLARE_CUDA(moe_route, moe_route);

/* Sorts the T * top_k (token, choice) pairs by expert, stably: order lists them as t * top_k + choice, and those of
   expert e are order[offsets[e]] .. order[offsets[e+1]]. One item. Duplicate ids within a token are ordinary.
   An id outside 0 .. E is Q3N_VALUE, and nothing is written. */
typedef struct q3n_moe_group_args {
  uint64_t struct_bytes; /* sizeof(q3n_moe_group_args) */
  int64_t *order;        /* [T * top_k] */
  int64_t *offsets;      /* [E + 1] */
  const int32_t *ids;    /* [T][top_k], each 0 <= id < E */
  int64_t T, E, top_k;
} q3n_moe_group_args;

Q3N_DECLARE_OPERATOR(moe_group);

/* On a device the first 8 bytes of scratch tell, an int64_t: INT64_MAX, or the lowest pair whose id is outside 0 .. E;
   then neither order nor offsets were written. What moe_route chose is never outside. Where a caller's own ids may be,
   offsets that were zeros before keep up and down that are queued behind from reading order: h and y mean nothing
   then, but nothing else is touched. */
Q3N_DECLARE_CUDA(moe_group, moe_group);

/* h[p] = silu(Wgate_e x_t) * (Wup_e x_t) for each pair p = (t, choice) with expert e. Items are blocks of rows of F.
   order and offsets are trusted: only group makes them. Weights may start at any address. h overlaps no input. */
typedef struct q3n_moe_up_args {
  uint64_t struct_bytes; /* sizeof(q3n_moe_up_args) */
  float *h;              /* [T * top_k][F], contiguous */
  const void *x;         /* [T][D] of x_dtype; 4-byte aligned where not empty */
  const void *gate;      /* [E][F][D] of gate_dtype; in merged gate_up tensors gate and up point into one tensor */
  const void *up;        /* [E][F][D] of up_dtype */
  const int64_t *order;  /* from group */
  const int64_t *offsets;
  q3n_dtype gate_dtype, up_dtype;
  q3n_dtype x_dtype;      /* Q3N_F32, or q3n_dtype_activations of gate and of up */
  int64_t x_t;            /* strides in elements; those of weights are multiples of the block */
  int64_t gate_e, gate_f;
  int64_t up_e, up_f;
  int64_t T, E, top_k, D, F;
} q3n_moe_up_args;

Q3N_DECLARE_OPERATOR(moe_up);
Q3N_DECLARE_CUDA(moe_up, moe_up);

/* y_t = [y_t +] sum over choices c, in order, of weights[t][c] Wdown_e h[(t, c)]. Items are blocks of rows of D.
   A token's result does not depend on the others, bit for bit. y overlaps no input. */
typedef struct q3n_moe_down_args {
  uint64_t struct_bytes; /* sizeof(q3n_moe_down_args) */
  float *y;              /* [T][D] */
  const void *h;         /* [T * top_k][F] of h_dtype, contiguous; 4-byte aligned where not empty */
  const float *weights;  /* [T][top_k], contiguous; NULL: 1 */
  const void *down;      /* [E][D][F] of dtype */
  const int64_t *order;  /* from group */
  const int64_t *offsets;
  q3n_dtype dtype;
  q3n_dtype h_dtype;      /* Q3N_F32 or q3n_dtype_activations(dtype) */
  int32_t accumulate;     /* 1: add to y; 0: y is overwritten */
  int64_t y_t;            /* strides in elements */
  int64_t down_e, down_d;
  int64_t T, E, top_k, D, F;
} q3n_moe_down_args;

Q3N_DECLARE_OPERATOR(moe_down);
Q3N_DECLARE_CUDA(moe_down, moe_down);

#endif
