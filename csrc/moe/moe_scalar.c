/* The four steps in plain C. */
#include <math.h>

#include "../matmul/dot.h"
#include "moe_block.h"

q3n_status q3n_moe_route_scalar(const q3n_moe_route_args *a, int64_t begin, int64_t end, void *scratch);
q3n_status q3n_moe_group_scalar(const q3n_moe_group_args *a, int64_t begin, int64_t end, void *scratch);
q3n_status q3n_moe_up_scalar(const q3n_moe_up_args *a, int64_t begin, int64_t end, void *scratch);
q3n_status q3n_moe_down_scalar(const q3n_moe_down_args *a, int64_t begin, int64_t end, void *scratch);

/* *lowest = min(*lowest, token), whatever other calls do to it meanwhile. */
static void lower_to(int64_t *lowest, int64_t token) {
  int64_t seen = __atomic_load_n(lowest, __ATOMIC_RELAXED);
  while (token < seen && !__atomic_compare_exchange_n(lowest, &seen, token, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

/* Units in which a token's exponentials (at most 1) are added: integers, so the total does not depend on the order
   of the experts. 65536 of them fit in 64 bits. */
static const float unit = 0x1p47f;

/* exp(logit - max); logits equal to the maximum count 1, so an infinite maximum is no inf - inf. */
static float unnormalized(float logit, float max) { return logit == max ? 1.0f : expf(logit - max); }

q3n_status q3n_moe_route_scalar(const q3n_moe_route_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  for (int64_t t = begin; t < end; t++) {
    const float *logits = a->logits + t * a->logits_t;
    int32_t *ids = a->ids + t * a->top_k;
    float *weights = a->weights + t * a->top_k;

    /* insertion into the list of the best so far; an equal logit stays behind the earlier one */
    int64_t have = 0;
    for (int64_t e = 0; e < a->E; e++) {
      if (logits[e] != logits[e]) {
        if (a->bad_token) lower_to(a->bad_token, t);
        return q3n_fail(Q3N_NAN, Q3N_ARG_LOGITS);
      }
      if (have == a->top_k && logits[e] <= logits[ids[have - 1]]) continue;
      int64_t at = have < a->top_k ? have++ : have - 1;
      for (; at > 0 && logits[ids[at - 1]] < logits[e]; at--) ids[at] = ids[at - 1];
      ids[at] = (int32_t)e;
    }

    const float max = logits[ids[0]];
    uint64_t units = 0;
    for (int64_t e = 0; e < a->E; e++) units += (uint64_t)(unnormalized(logits[e], max) * unit);
    const double total = (double)units / (double)unit;
    double chosen = 0.0;
    for (int64_t c = 0; c < a->top_k; c++) {
      weights[c] = (float)((double)unnormalized(logits[ids[c]], max) / total);
      chosen += (double)weights[c];
    }
    if (a->normalize)
      for (int64_t c = 0; c < a->top_k; c++) weights[c] = (float)((double)weights[c] / chosen);
  }
  return Q3N_OK;
}

q3n_status q3n_moe_group_scalar(const q3n_moe_group_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)begin, (void)end, (void)scratch;
  const int64_t pairs = a->T * a->top_k;
  for (int64_t p = 0; p < pairs; p++) Q3N_REFUSE(a->ids[p] < 0 || a->ids[p] >= a->E, VALUE, IDS);

  /* offsets[e + 1] counts expert e; summed, offsets[e] is where its pairs start */
  for (int64_t e = 0; e <= a->E; e++) a->offsets[e] = 0;
  for (int64_t p = 0; p < pairs; p++) a->offsets[a->ids[p] + 1]++;
  for (int64_t e = 0; e < a->E; e++) a->offsets[e + 1] += a->offsets[e];
  /* placing moves each start to its end, which is the next one's start: shift back after */
  for (int64_t p = 0; p < pairs; p++) a->order[a->offsets[a->ids[p]]++] = p;
  for (int64_t e = a->E; e > 0; e--) a->offsets[e] = a->offsets[e - 1];
  a->offsets[0] = 0;
  return Q3N_OK;
}

static float silu(float x) { return x / (1.0f + expf(-x)); }

q3n_status q3n_moe_up_scalar(const q3n_moe_up_args *a, int64_t begin, int64_t end, void *scratch) {
  float *gate_rows = scratch, *up_rows = gate_rows + Q3N_MOE_ROWS * a->D, *decoded = up_rows + Q3N_MOE_ROWS * a->D;
  for (int64_t item = begin; item < end; item++) {
    const int64_t first = item * Q3N_MOE_ROWS;
    const int64_t count = a->F - first < Q3N_MOE_ROWS ? a->F - first : Q3N_MOE_ROWS;
    for (int64_t e = 0; e < a->E; e++) {
      const int64_t from = a->offsets[e], to = a->offsets[e + 1];
      if (from == to) continue;
      const float *gate[Q3N_MOE_ROWS], *up[Q3N_MOE_ROWS];
      q3n_rows(gate, count, q3n_element(a->gate, a->gate_dtype, e * a->gate_e), a->gate_dtype, first, a->gate_f, a->D,
               gate_rows);
      q3n_rows(up, count, q3n_element(a->up, a->up_dtype, e * a->up_e), a->up_dtype, first, a->up_f, a->D, up_rows);

      for (int64_t i = from; i < to; i++) {
        const int64_t pair = a->order[i];
        const float *x = q3n_floats(a->x, a->x_dtype, pair / a->top_k * a->x_t, a->D, decoded);
        float *h = a->h + pair * a->F + first;
        for (int64_t r = 0; r < count; r++) h[r] = silu(q3n_dot(gate[r], x, a->D)) * q3n_dot(up[r], x, a->D);
      }
    }
  }
  return Q3N_OK;
}

/* An expert's rows meet all its pairs at once, but a token's choices are added in their own order: so the dots wait in
   scratch, and a token's sum does not depend on who else is in the batch. */
q3n_status q3n_moe_down_scalar(const q3n_moe_down_args *a, int64_t begin, int64_t end, void *scratch) {
  float *down_rows = scratch, *decoded = down_rows + Q3N_MOE_ROWS * a->F;
  float *dots = down_rows + q3n_moe_rows_bytes(Q3N_MOE_ROWS + 1, a->F) / (int64_t)sizeof(float);
  for (int64_t item = begin; item < end; item++) {
    const int64_t first = item * Q3N_MOE_ROWS;
    const int64_t count = a->D - first < Q3N_MOE_ROWS ? a->D - first : Q3N_MOE_ROWS;
    for (int64_t e = 0; e < a->E; e++) {
      const int64_t from = a->offsets[e], to = a->offsets[e + 1];
      if (from == to) continue;
      const float *down[Q3N_MOE_ROWS];
      q3n_rows(down, count, q3n_element(a->down, a->dtype, e * a->down_e), a->dtype, first, a->down_d, a->F, down_rows);
      for (int64_t i = from; i < to; i++) {
        const int64_t pair = a->order[i];
        const float *h = q3n_floats(a->h, a->h_dtype, pair * a->F, a->F, decoded);
        for (int64_t r = 0; r < count; r++) dots[pair * Q3N_MOE_ROWS + r] = q3n_dot(down[r], h, a->F);
      }
    }

    for (int64_t t = 0; t < a->T; t++) {
      float sum[Q3N_MOE_ROWS] = {0};
      for (int64_t pair = t * a->top_k; pair < (t + 1) * a->top_k; pair++) {
        const float weight = a->weights ? a->weights[pair] : 1.0f;
        for (int64_t r = 0; r < count; r++) sum[r] += weight * dots[pair * Q3N_MOE_ROWS + r];
      }
      float *y = a->y + t * a->y_t + first;
      for (int64_t r = 0; r < count; r++) y[r] = a->accumulate ? y[r] + sum[r] : sum[r];
    }
  }
  return Q3N_OK;
}
