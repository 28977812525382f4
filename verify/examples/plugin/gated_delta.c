/* The gated delta rule as csrc/gated_delta/gated_delta.h states it, written from the header alone: one head after the
   other, dot products in double. The state is rounded to float after every token, so that a call cut in two gives the
   bits of the whole.

     cc -O2 -fPIC -shared -Icsrc verify/examples/plugin/gated_delta.c -lm -o libmine.so
     qwen3next verify --op gated_delta --plugin ./libmine.so:my_gated_delta */
#include <math.h>

#include "q3n.h"

#ifndef TOKEN_OF_DECAY
#define TOKEN_OF_DECAY(t) (t)
#endif

static double dot(const float *x, const float *y, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; i++) sum += (double)x[i] * y[i];
  return sum;
}

/* y = x, of unit length where the args ask for it. */
static void load(const q3n_gated_delta_args *a, const float *x, float *y) {
  const double norm = a->qk_l2norm ? sqrt(dot(x, x, a->K) + (double)a->qk_l2norm_eps) : 1.0;
  for (int64_t c = 0; c < a->K; c++) y[c] = (float)(x[c] / norm);
}

/* An item is one head of one sequence. */
int64_t my_gated_delta_items(const q3n_gated_delta_args *a) { return a->B * a->HV; }

/* A state, a key, a query. */
int64_t my_gated_delta_scratch_bytes(const q3n_gated_delta_args *a) {
  return (a->V + 2) * a->K * (int64_t)sizeof(float);
}

q3n_status my_gated_delta(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch) {
  if (a->dtype != Q3N_F32) return q3n_fail(Q3N_DTYPE, Q3N_ARG_DTYPE);
  const float *all_q = a->q, *all_k = a->k, *all_v = a->v;
  float *all_o = a->o, *s = scratch, *k = s + a->V * a->K, *q = k + a->K;

  for (int64_t item = begin; item < end; item++) {
    const int64_t b = item / a->HV, h = item % a->HV;
    const int64_t hk = a->head_map == Q3N_HEADS_GROUPED ? h / (a->HV / a->HK) : h % a->HK;
    /* With cu_seqlens all sequences lie in one row of tokens. */
    const int64_t row = a->cu_seqlens ? 0 : b, first = a->cu_seqlens ? a->cu_seqlens[b] : 0;
    const int64_t T = a->cu_seqlens ? a->cu_seqlens[b + 1] - first : a->T;
    const int64_t from = a->slot_in ? a->slot_in[b] : b, to = a->slot_out ? a->slot_out[b] : b;

    for (int64_t j = 0; j < a->V; j++)
      for (int64_t c = 0; c < a->K; c++)
        s[j * a->K + c] = a->state_in ? a->state_in[from * a->state_slot + h * a->state_h + j * a->state_v + c] : 0.0f;

    for (int64_t i = 0; i < T; i++) {
      const int64_t t = first + i;
      const float *v = all_v + row * a->v_b + t * a->v_t + h * a->v_h;
      const float beta = a->beta[row * a->beta_b + t * a->beta_t + h * a->beta_h];
      const float *g = a->g ? a->g + row * a->g_b + (first + TOKEN_OF_DECAY(i)) * a->g_t + h * a->g_h : NULL;
      float *o = all_o + row * a->o_b + t * a->o_t + h * a->o_h;
      load(a, all_k + row * a->k_b + t * a->k_t + hk * a->k_h, k);
      load(a, all_q + row * a->q_b + t * a->q_t + hk * a->q_h, q);

      for (int64_t j = 0; j < a->V; j++) {
        float *x = s + j * a->K;
        for (int64_t c = 0; g && c < a->K; c++) x[c] *= expf(g[a->gate == Q3N_GATE_CHANNEL ? c : 0]);
        const double u = beta * (v[j] - dot(x, k, a->K));
        for (int64_t c = 0; c < a->K; c++) x[c] = (float)(x[c] + u * k[c]);
        o[j] = (float)(a->scale * dot(x, q, a->K));
        for (int64_t c = 0; a->snapshots && c < a->K; c++)
          a->snapshots[row * a->snap_b + t * a->snap_t + h * a->snap_h + j * a->snap_v + c] = x[c];
      }
    }

    for (int64_t j = 0; a->state_out && j < a->V; j++)
      for (int64_t c = 0; c < a->K; c++)
        a->state_out[to * a->state_slot + h * a->state_h + j * a->state_v + c] = s[j * a->K + c];
  }
  return Q3N_OK;
}
