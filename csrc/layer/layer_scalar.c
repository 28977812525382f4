/* Loops over rows that compilers vectorise, but for exp and log1p, which are libm's. */
#include <math.h>

#include "../quant/quant.h"
#include "../quant/quant_blocks.h"
#include "layer_rows.h"

q3n_status q3n_gather_scalar(const q3n_gather_args *a, int64_t begin, int64_t end, void *scratch);
q3n_status q3n_add_scalar(const q3n_add_args *a, int64_t begin, int64_t end, void *scratch);
q3n_status q3n_delta_gates_scalar(const q3n_delta_gates_args *a, int64_t begin, int64_t end, void *scratch);
q3n_status q3n_kv_store_scalar(const q3n_kv_store_args *a, int64_t begin, int64_t end, void *scratch);
q3n_status q3n_row_gate_scalar(const q3n_row_gate_args *a, int64_t begin, int64_t end, void *scratch);

static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

q3n_status q3n_gather_scalar(const q3n_gather_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  for (int64_t t = begin; t < end; t++)
    q3n_row_to_float(a->dtype, q3n_element(a->table, a->dtype, a->ids[t] * a->table_row), a->y + t * a->y_t, a->N);
  return Q3N_OK;
}

q3n_status q3n_add_scalar(const q3n_add_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  for (int64_t t = begin; t < end; t++) {
    float *restrict y = a->y + t * a->y_t;
    const float *restrict x = a->x + t * a->x_t;
    for (int64_t i = 0; i < a->N; i++) y[i] += x[i];
  }
  return Q3N_OK;
}

q3n_status q3n_delta_gates_scalar(const q3n_delta_gates_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  const int64_t r = a->HV / a->HK;
  for (int64_t t = begin; t < end; t++) {
    const float *ba = a->ba + t * a->ba_t;
    float *g = a->g + t * a->g_t, *beta = a->beta + t * a->beta_t;
    for (int64_t h = 0; h < a->HV; h++) {
      const float *b = ba + h / r * 2 * r + h % r, x = b[r] + a->dt_bias[h];
      beta[h] = sigmoid(b[0]);
      g[h] = a->a[h] * (x > 20.0f ? x : log1pf(expf(x)));
    }
  }
  return Q3N_OK;
}

static void store_row(q3n_dtype dtype, void *to, const float *restrict x, int64_t n) {
  if (dtype == Q3N_F32) {
    memcpy(to, x, (size_t)n * sizeof *x);
  } else if (dtype == Q3N_F16) {
    uint16_t *restrict y = to;
    for (int64_t i = 0; i < n; i++) y[i] = q3n_f32_to_f16(x[i]);
  } else if (dtype == Q3N_BF16) {
    uint16_t *restrict y = to;
    for (int64_t i = 0; i < n; i++) y[i] = q3n_f32_to_bf16(x[i]);
  } else {
    const q3n_quantize_args row = {.struct_bytes = sizeof row, .y = to, .x = x, .dtype = dtype, .rows = 1, .N = n};
    (void)q3n_quantize_best(&row)->run(&row, 0, 1, NULL);
  }
}

q3n_status q3n_kv_store_scalar(const q3n_kv_store_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  for (int64_t t = begin, b = 0; t < end; t++) {
    while (t >= a->cu_seqlens[b + 1]) b++;
    const int64_t at = a->slot[b] * a->cache_slot + a->pos[t] * a->cache_s;
    void *to = (uint8_t *)a->cache + at / q3n_dtype_block(a->dtype) * q3n_dtype_block_bytes(a->dtype);
    store_row(a->dtype, to, a->x + t * a->x_t, a->N);
  }
  return Q3N_OK;
}

q3n_status q3n_row_gate_scalar(const q3n_row_gate_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  for (int64_t t = begin; t < end; t++) {
    const float *x = a->x + t * a->x_t;
    double s[8] = {0.0};
    int64_t d = 0;
    for (; d + 8 <= a->D; d += 8)
      for (int i = 0; i < 8; i++) s[i] += (double)x[d + i] * (double)a->w[d + i];
    for (int i = 0; d < a->D; d++, i++) s[i] += (double)x[d] * (double)a->w[d];
    a->y[t] = sigmoid((float)(((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]))));
  }
  return Q3N_OK;
}
