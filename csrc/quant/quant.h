/* Block formats: rows of float to and from a q3n_dtype.

   Dequantising gives the values that gguf-py gives, bit for bit. Quantising rounds as the reference quantisers of
   ggml do (nearest; Q8_0, Q4_0: absmax scale; the K types: a least-squares search over scales). f32 <-> f32 copies. */
#ifndef Q3N_QUANT_H
#define Q3N_QUANT_H

#include "../base/dtype.h"
#include "../base/operator.h"

typedef struct q3n_dequantize_args {
  uint64_t struct_bytes; /* sizeof(q3n_dequantize_args) */
  float *y;              /* [rows][N] */
  const void *x;         /* [rows][N] of dtype */
  q3n_dtype dtype;
  int64_t y_row, x_row;  /* strides in elements; x_row a multiple of the dtype's block */
  int64_t rows, N;       /* N a multiple of the dtype's block */
} q3n_dequantize_args;

Q3N_DECLARE_OPERATOR(dequantize);

typedef struct q3n_quantize_args {
  uint64_t struct_bytes; /* sizeof(q3n_quantize_args) */
  void *y;               /* [rows][N] of dtype */
  const float *x;        /* [rows][N] */
  q3n_dtype dtype;
  int64_t y_row, x_row;
  int64_t rows, N;
} q3n_quantize_args;

Q3N_DECLARE_OPERATOR(quantize);

#endif
