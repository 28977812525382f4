/* Block formats: rows of float to and from a q3n_dtype. Items are rows. x and y of a block type may start at any
   address.

   Dequantising gives the values that gguf-py gives, bit for bit. Quantising: f16 and bf16 round to nearest even, past
   the largest value to infinity, and keep NaN. Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 and MXFP4 give ggml's bytes: the extremes
   set the scale. The K types and IQ4 search scales for the least squared error and are never worse than the scale that
   the extremes set. A block with a NaN or an infinity, or too large for its f16 scale, has no finite scale: all of it
   decodes to NaN or infinity, never to wrong finite values. MXFP4 has no NaN, and its scale reaches every finite
   value; a block with a NaN or an infinity decodes to infinities. f32 <-> f32 copies. */
#ifndef Q3N_QUANT_H
#define Q3N_QUANT_H

#include "../base/dtype.h"
#include "../base/operator.h"
#include "../cuda/cuda.h"

typedef struct q3n_dequantize_args {
  uint64_t struct_bytes; /* sizeof(q3n_dequantize_args) */
  float *y;              /* [rows][N] */
  const void *x;         /* [rows][N] of dtype */
  q3n_dtype dtype;
  int64_t y_row, x_row;  /* strides in elements; x_row a multiple of the dtype's block */
  int64_t rows, N;       /* N a multiple of the dtype's block */
} q3n_dequantize_args;

Q3N_DECLARE_OPERATOR(dequantize);
Q3N_DECLARE_CUDA(dequantize, dequantize);

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
