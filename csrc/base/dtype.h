/* Element and block types of tensors. The values are ggml's type numbers, so a GGUF type maps one to one. */
#ifndef Q3N_BASE_DTYPE_H
#define Q3N_BASE_DTYPE_H

#include <stdint.h>

typedef enum q3n_dtype {
  Q3N_F32 = 0,
  Q3N_F16 = 1,
  Q3N_Q4_0 = 2,
  Q3N_Q4_1 = 3,
  Q3N_Q5_0 = 6,
  Q3N_Q5_1 = 7,
  Q3N_Q8_0 = 8,
  Q3N_Q2_K = 10,
  Q3N_Q3_K = 11,
  Q3N_Q4_K = 12,
  Q3N_Q5_K = 13,
  Q3N_Q6_K = 14,
  Q3N_IQ4_NL = 20,
  Q3N_IQ4_XS = 23,
  Q3N_BF16 = 30,
  Q3N_MXFP4 = 39,
  /* Activations quantised at run time (csrc/quant/activations.h): no ggml type. */
  Q3N_Q8_X32 = 0x201,
  Q3N_Q8_X256 = 0x202
} q3n_dtype;

/* Added to a block type: every 16 rows of a weight are interleaved (csrc/quant/repack.h). Same blocks, same bytes. */
#define Q3N_R16 0x100

/* Elements in a block (1 for plain types), and bytes of one block; 0 for a value that is no supported dtype. */
int64_t q3n_dtype_block(q3n_dtype dtype);
int64_t q3n_dtype_block_bytes(q3n_dtype dtype);

/* Bytes of n elements; -1 where n is negative, no multiple of the block, or the dtype is unsupported. */
int64_t q3n_dtype_bytes(q3n_dtype dtype, int64_t n);

/* The dtype without Q3N_R16. */
q3n_dtype q3n_dtype_rows(q3n_dtype dtype);

/* What activations that meet weights of this dtype are quantised to: Q8_X32 or Q8_X256 by the block; F32 for plain
   types. */
q3n_dtype q3n_dtype_activations(q3n_dtype dtype);

/* "q4_k", "q4_k_r16"; "" for a value that is no supported dtype. */
const char *q3n_dtype_name(q3n_dtype dtype);

#endif
