/* The gated delta rule. Per value head h (key head hk given by head_map), with state S[V][K], for t = 0, 1, ...:

     S <- exp(g_t) S                  g <= 0: a log-decay; absent, one per head, or one per key channel
     u <- beta_t (v_t - S k_t)
     S <- S + u k_t^T
     o_t <- S (scale q_t)

   Axes: B sequences, T tokens, HK key heads, HV value heads, K and V channels of a head. The innermost axis of every
   array is contiguous; the others have strides in elements. Sizes of 0 are legal and do nothing (but T = 0
   copies the state, and K = 0 makes o zeros). A NaN or infinity in a head's inputs reaches the outputs of that head and sequence alone; nothing is clamped.
   Derivations, kernels and measured errors: README.md in this folder. */
#ifndef Q3N_GATED_DELTA_H
#define Q3N_GATED_DELTA_H

#include "../base/dtype.h"
#include "../base/operator.h"
#include "../cuda/cuda.h"

typedef enum q3n_gate {
  Q3N_GATE_NONE = 0,   /* DeltaNet: g must be NULL */
  Q3N_GATE_SCALAR = 1, /* Gated DeltaNet: g[B][T][HV] */
  Q3N_GATE_CHANNEL = 2 /* KDA: g[B][T][HV][K] */
} q3n_gate;

typedef enum q3n_head_map {
  Q3N_HEADS_GROUPED = 0, /* hk = h / (HV / HK): Hugging Face, qwen3next GGUF */
  Q3N_HEADS_TILED = 1    /* hk = h % HK: qwen35 GGUF */
} q3n_head_map;

typedef struct q3n_gated_delta_args {
  uint64_t struct_bytes; /* sizeof(q3n_gated_delta_args) */

  /* Outputs. Must not overlap each other or an input, but for state_out as said there. */
  void *o;             /* [B][T][HV][V] of dtype */
  float *state_out;    /* [slots][HV][V][K], a pool; NULL: not wanted. May be state_in itself where slot_out[b] is
                          slot_in[b] for every b (update in place) */
  float *snapshots;    /* [B][T][HV][V][K], the state after every token; NULL: not wanted */

  /* Inputs */
  const void *q;         /* [B][T][HK][K] of dtype */
  const void *k;         /* [B][T][HK][K] of dtype */
  const void *v;         /* [B][T][HV][V] of dtype */
  const float *g;        /* log-decay, see q3n_gate */
  const float *beta;     /* [B][T][HV], after the sigmoid */
  const float *state_in; /* [slots][HV][V][K], a pool with the strides of state_out; NULL: zeros */

  const int64_t *slot_in;    /* [B], pool entry that sequence b starts from; NULL: b */
  const int64_t *slot_out;   /* [B], pool entry that sequence b ends in, all different; NULL: b */
  const int64_t *cu_seqlens; /* [B+1], from 0, not decreasing: sequence b is tokens cu_seqlens[b] .. cu_seqlens[b+1]
                                of one row of T = cu_seqlens[B] tokens (the *_b strides are not used). NULL: each
                                of the B sequences has T tokens */

  q3n_dtype dtype; /* of o, q, k and v: F32; BF16 and F16 in CUDA kernels, others refuse them (Q3N_DTYPE). All
                      arithmetic and the states are f32: o alone is rounded */
  q3n_gate gate;
  q3n_head_map head_map;
  int32_t qk_l2norm; /* 1: q and k are first normalised, x rsqrt(sum x^2 + qk_l2norm_eps) */
  float qk_l2norm_eps;
  float scale;       /* customary: 1 / sqrt(K) */

  /* Strides in elements, >= 0; 0 broadcasts an input. */
  int64_t o_b, o_t, o_h;
  int64_t q_b, q_t, q_h;
  int64_t k_b, k_t, k_h;
  int64_t v_b, v_t, v_h;
  int64_t g_b, g_t, g_h;
  int64_t beta_b, beta_t, beta_h;
  int64_t state_slot, state_h, state_v;
  int64_t snap_b, snap_t, snap_h, snap_v; /* with cu_seqlens, snap_t steps over the packed tokens */

  /* Sizes. HV is a multiple of HK; K, V <= 1024. */
  int64_t slots, B, T, HK, HV, K, V;
} q3n_gated_delta_args;

Q3N_DECLARE_OPERATOR(gated_delta);
Q3N_DECLARE_CUDA(gated_delta, gated_delta_recurrent);
Q3N_DECLARE_CUDA(gated_delta, gated_delta_chunked);
Q3N_DECLARE_CUDA(gated_delta, gated_delta_segmented);
Q3N_DECLARE_CUDA(gated_delta, gated_delta); /* one of these, by the sizes */

#endif
