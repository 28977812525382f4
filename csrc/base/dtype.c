#include "dtype.h"

#include <stddef.h>

typedef struct {
  q3n_dtype dtype;
  int32_t block, bytes;
  const char *name;
} dtype_row;

static const dtype_row rows[] = {
    {Q3N_F32, 1, 4, "f32"},           {Q3N_F16, 1, 2, "f16"},           {Q3N_BF16, 1, 2, "bf16"},
    {Q3N_Q8_0, 32, 34, "q8_0"},       {Q3N_Q4_0, 32, 18, "q4_0"},       {Q3N_Q4_1, 32, 20, "q4_1"},
    {Q3N_Q5_0, 32, 22, "q5_0"},       {Q3N_Q5_1, 32, 24, "q5_1"},       {Q3N_Q2_K, 256, 84, "q2_k"},
    {Q3N_Q3_K, 256, 110, "q3_k"},     {Q3N_Q4_K, 256, 144, "q4_k"},     {Q3N_Q5_K, 256, 176, "q5_k"},
    {Q3N_Q6_K, 256, 210, "q6_k"},     {Q3N_IQ4_NL, 32, 18, "iq4_nl"},   {Q3N_IQ4_XS, 256, 136, "iq4_xs"},
    {Q3N_MXFP4, 32, 17, "mxfp4"},
};

static const dtype_row *find(q3n_dtype dtype) {
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
    if (rows[i].dtype == dtype) return &rows[i];
  return NULL;
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
  return r ? r->name : "";
}
