/* The recurrence as it is written: the block of state rows stays in scratch over all tokens of the sequence. */
#include "gated_delta_parts.h"

q3n_status q3n_gated_delta_recurrent_scalar(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch);

/* One token on one state row; returns the row's element of o. Both dot products keep eight partial sums, which the
   compiler makes vectors of. The decayed row is formed twice rather than stored between the two passes: the same bits,
   half the stores. */
static float step(float *restrict s, int64_t K, const float *restrict decay, const float *restrict k,
                  const float *restrict q, float beta, float v) {
  const int64_t whole = K - K % 8;
  float sk[8] = {0}, sq[8] = {0};

  for (int64_t c = 0; c < whole; c += 8)
    for (int p = 0; p < 8; p++) sk[p] += decay[c + p] * s[c + p] * k[c + p];
  for (int64_t c = whole; c < K; c++) sk[c - whole] += decay[c] * s[c] * k[c];

  const float u = beta * (v - gd_sum8(sk));

  for (int64_t c = 0; c < whole; c += 8)
    for (int p = 0; p < 8; p++) {
      s[c + p] = decay[c + p] * s[c + p] + u * k[c + p];
      sq[p] += s[c + p] * q[c + p];
    }
  for (int64_t c = whole; c < K; c++) {
    s[c] = decay[c] * s[c] + u * k[c];
    sq[c - whole] += s[c] * q[c];
  }
  return gd_sum8(sq);
}

q3n_status q3n_gated_delta_recurrent_scalar(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch) {
  Q3N_GATED_DELTA_F32_ALONE(a);
  const int64_t K = a->K, blocks = q3n_ceil_div(a->V, Q3N_GATED_DELTA_ROWS);
  float *s = scratch, *k = s + Q3N_GATED_DELTA_ROWS * K, *q = k + K, *decay = q + K;

  for (int64_t item = begin; item < end; item++) {
    const int64_t first = item % blocks * Q3N_GATED_DELTA_ROWS, head = item / blocks;
    const int64_t rows = a->V - first < Q3N_GATED_DELTA_ROWS ? a->V - first : Q3N_GATED_DELTA_ROWS;
    const gd_head x = gd_find_head(a, head / a->HV, head % a->HV);

    gd_copy_rows(s, K, x.state_in ? x.state_in + first * a->state_v : NULL, a->state_v, rows, K);
    for (int64_t t = 0; t < x.T; t++) {
      const float beta = x.beta[t * a->beta_t], *v = x.v + t * a->v_t + first;
      float *o = x.o + t * a->o_t + first;
      gd_load_vector(a, x.k + t * a->k_t, 1.0f, k);
      gd_load_vector(a, x.q + t * a->q_t, a->scale, q);
      gd_load_decay(a, &x, t, decay);
      for (int64_t r = 0; r < rows; r++) o[r] = step(s + r * K, K, decay, k, q, beta, v[r]);
      if (x.snapshots)
        gd_copy_rows(x.snapshots + t * a->snap_t + first * a->snap_v, a->snap_v, s, K, rows, K);
    }
    if (x.state_out) gd_copy_rows(x.state_out + first * a->state_v, a->state_v, s, K, rows, K);
  }
  return Q3N_OK;
}
