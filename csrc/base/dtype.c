#include "dtype.h"

#include <stddef.h>

typedef struct {
  q3n_dtype dtype;
  int32_t block, bytes;
  const char *name, *name_r16; /* NULL: no interleaved form */
} dtype_row;

/* ggml's numbers, then the activations: kernels ask for every row they touch, so no search. */
enum { GGML_TYPES = 40 };
static const dtype_row rows[] = {
#define PLAIN(dtype, bytes, name) [dtype] = {dtype, 1, bytes, name, NULL}
#define BLOCKS(dtype, block, bytes, name) [dtype] = {dtype, block, bytes, name, name "_r16"}
#define ACTIVATIONS(dtype, block, bytes, name) \
  [GGML_TYPES - 1 + (dtype & 0xff)] = {dtype, block, bytes, name, NULL}
    PLAIN(Q3N_F32, 4, "f32"),
    PLAIN(Q3N_F16, 2, "f16"),
    PLAIN(Q3N_BF16, 2, "bf16"),
    BLOCKS(Q3N_Q8_0, 32, 34, "q8_0"),
    BLOCKS(Q3N_Q4_0, 32, 18, "q4_0"),
    BLOCKS(Q3N_Q4_1, 32, 20, "q4_1"),
    BLOCKS(Q3N_Q5_0, 32, 22, "q5_0"),
    BLOCKS(Q3N_Q5_1, 32, 24, "q5_1"),
    BLOCKS(Q3N_Q2_K, 256, 84, "q2_k"),
    BLOCKS(Q3N_Q3_K, 256, 110, "q3_k"),
    BLOCKS(Q3N_Q4_K, 256, 144, "q4_k"),
    BLOCKS(Q3N_Q5_K, 256, 176, "q5_k"),
    BLOCKS(Q3N_Q6_K, 256, 210, "q6_k"),
    BLOCKS(Q3N_IQ4_NL, 32, 18, "iq4_nl"),
    BLOCKS(Q3N_IQ4_XS, 256, 136, "iq4_xs"),
    BLOCKS(Q3N_MXFP4, 32, 17, "mxfp4"),
    ACTIVATIONS(Q3N_Q8_X32, 32, 40, "q8_x32"),
    ACTIVATIONS(Q3N_Q8_X256, 256, 320, "q8_x256"),
};

static const dtype_row *find(q3n_dtype dtype) {
  const uint32_t row = (uint32_t)q3n_dtype_rows(dtype);
  const uint32_t at = row < GGML_TYPES ? row : GGML_TYPES - 1 + (row & 0xff);
  if (at >= sizeof rows / sizeof rows[0] || (uint32_t)rows[at].dtype != row || !rows[at].name) return NULL;
  return dtype & Q3N_R16 && !rows[at].name_r16 ? NULL : &rows[at];
}

q3n_dtype q3n_dtype_rows(q3n_dtype dtype) { return (q3n_dtype)((uint32_t)dtype & ~(uint32_t)Q3N_R16); }

q3n_dtype q3n_dtype_activations(q3n_dtype dtype) {
  switch (q3n_dtype_block(dtype)) {
    case 32: return Q3N_Q8_X32;
    case 256: return Q3N_Q8_X256;
    default: return Q3N_F32;
  }
}

int64_t q3n_dtype_block(q3n_dtype dtype) {
  const dtype_row *r = find(dtype);
  return r ? r->block : 0;
}

int64_t q3n_dtype_block_bytes(q3n_dtype dtype) {
  const dtype_row *r = find(dtype);
  return r ? r->bytes : 0;
}

int64_t q3n_dtype_bytes(q3n_dtype dtype, int64_t n) {
  const dtype_row *r = find(dtype);
  if (!r || n < 0 || n % r->block || n / r->block > INT64_MAX / r->bytes) return -1;
  return n / r->block * r->bytes;
}

const char *q3n_dtype_name(q3n_dtype dtype) {
  const dtype_row *r = find(dtype);
  return !r ? "" : dtype & Q3N_R16 ? r->name_r16 : r->name;
}
