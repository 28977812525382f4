/* The small steps between the operators of a layer, so that a forward pass stays in one memory. Strides count elements
   and are >= 0; rows are contiguous. Outputs overlap no input. Items are rows (tokens). */
#ifndef Q3N_LAYER_LAYER_H
#define Q3N_LAYER_LAYER_H

#include "../base/dtype.h"
#include "../base/operator.h"
#include "../cuda/cuda.h"

/* y[t] = row ids[t] of a table of any weight dtype, with the bits that dequantize gives: token embeddings, and, of
   f32, a choice of rows. */
typedef struct q3n_gather_args {
  uint64_t struct_bytes; /* sizeof(q3n_gather_args) */
  float *y;              /* [T][N] */
  const void *table;     /* [rows][N] of dtype; blocks may start at any address */
  const int64_t *ids;    /* [T], 0 <= ids[t] < rows */
  q3n_dtype dtype;
  int64_t y_t;           /* strides; table_row a multiple of the dtype's block */
  int64_t table_row;
  int64_t T, rows, N;    /* N a multiple of the dtype's block */
} q3n_gather_args;

Q3N_DECLARE_OPERATOR(gather);
Q3N_DECLARE_CUDA(gather, gather);

/* y += x. */
typedef struct q3n_add_args {
  uint64_t struct_bytes; /* sizeof(q3n_add_args) */
  float *y;              /* [T][N] */
  const float *x;        /* [T][N] */
  int64_t y_t, x_t;
  int64_t T, N;
} q3n_add_args;

Q3N_DECLARE_OPERATOR(add);
Q3N_DECLARE_CUDA(add, add);

/* The gates of the delta rule, from rows of ba: for each of the HK key heads r = HV / HK values b, then r values
   alpha. For value head h = hk r + i:

     beta[t][h] = sigmoid(b)        g[t][h] = a[h] softplus(alpha + dt_bias[h])

   softplus(x) = log(1 + exp(x)), and x itself where x > 20. */
typedef struct q3n_delta_gates_args {
  uint64_t struct_bytes; /* sizeof(q3n_delta_gates_args) */
  float *g, *beta;       /* [T][HV]; must not overlap each other */
  const float *ba;       /* [T][HK][2 r] */
  const float *a;        /* [HV] */
  const float *dt_bias;  /* [HV] */
  int64_t g_t, beta_t, ba_t;
  int64_t T, HK, HV;     /* HV a multiple of HK */
} q3n_delta_gates_args;

Q3N_DECLARE_OPERATOR(delta_gates);
Q3N_DECLARE_CUDA(delta_gates, delta_gates);

/* Rows of keys or values into a cache: token t of sequence b goes to cache[slot[b]][pos[t]], with the bits that
   quantize gives. Sequence b is the tokens cu_seqlens[b] .. cu_seqlens[b+1] - 1. */
typedef struct q3n_kv_store_args {
  uint64_t struct_bytes;     /* sizeof(q3n_kv_store_args) */
  void *cache;               /* [slots][S][N] of dtype; other rows stay as they are */
  const float *x;            /* [T][N] */
  const int64_t *slot;       /* [B], inside the pool, none twice */
  const int64_t *pos;        /* [T], 0 <= pos[t] < S, increasing within a sequence */
  const int64_t *cu_seqlens; /* [B+1], from 0 to T, none below the one before */
  q3n_dtype dtype;           /* F32, F16, BF16, or Q8_0: then N and the cache's strides are multiples of 32 */
  int64_t cache_slot, cache_s;
  int64_t x_t;
  int64_t slots, S, B, T, N;
} q3n_kv_store_args;

Q3N_DECLARE_OPERATOR(kv_store);
Q3N_DECLARE_CUDA(kv_store, kv_store);

/* y[t] = sigmoid(x[t] . w), the dot product in double: how much of the shared expert a token takes. */
typedef struct q3n_row_gate_args {
  uint64_t struct_bytes; /* sizeof(q3n_row_gate_args) */
  float *y;              /* [T] */
  const float *x;        /* [T][D] */
  const float *w;        /* [D] */
  int64_t x_t;
  int64_t T, D;
} q3n_row_gate_args;

Q3N_DECLARE_OPERATOR(row_gate);
Q3N_DECLARE_CUDA(row_gate, row_gate);

#endif
