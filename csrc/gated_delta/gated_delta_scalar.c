/* The recurrence as it is written: the block of state rows stays in scratch over all tokens of the sequence. */
#include "gated_delta_parts.h"

q3n_status q3n_gated_delta_recurrent_scalar(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch);

/* One token on N state rows s[N][K]. Rows do not meet; several at a time only share the loads of k, q and the decay.
   The decayed row is formed twice rather than stored between the two passes: the same bits, half the stores. */
static inline __attribute__((always_inline)) void step(float *s, const int N, int64_t K, const float *decay,
                                                       const float *k, const float *q, float beta, const float *v,
                                                       float *o) {
  float sk[4][8] = {{0}}, sq[4][8] = {{0}}, u[4];
  const int64_t whole = K - K % 8;

  for (int64_t c = 0; c < whole; c += 8)
    for (int r = 0; r < N; r++)
      for (int p = 0; p < 8; p++) sk[r][p] += decay[c + p] * s[r * K + c + p] * k[c + p];
  for (int64_t c = whole; c < K; c++)
    for (int r = 0; r < N; r++) sk[r][c % 8] += decay[c] * s[r * K + c] * k[c];

  for (int r = 0; r < N; r++) u[r] = beta * (v[r] - gd_sum8(sk[r]));

  for (int64_t c = 0; c < whole; c += 8)
    for (int r = 0; r < N; r++)
      for (int p = 0; p < 8; p++) {
        const float x = decay[c + p] * s[r * K + c + p] + u[r] * k[c + p];
        s[r * K + c + p] = x;
        sq[r][p] += x * q[c + p];
      }
  for (int64_t c = whole; c < K; c++)
    for (int r = 0; r < N; r++) {
      const float x = decay[c] * s[r * K + c] + u[r] * k[c];
      s[r * K + c] = x;
      sq[r][c % 8] += x * q[c];
    }

  for (int r = 0; r < N; r++) o[r] = gd_sum8(sq[r]);
}

q3n_status q3n_gated_delta_recurrent_scalar(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch) {
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
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4) step(s + r * K, 4, K, decay, k, q, beta, v + r, o + r);
      for (; r < rows; r++) step(s + r * K, 1, K, decay, k, q, beta, v + r, o + r);
      if (x.snapshots)
        gd_copy_rows(x.snapshots + t * a->snap_t + first * a->snap_v, a->snap_v, s, K, rows, K);
    }
    if (x.state_out) gd_copy_rows(x.state_out + first * a->state_v, a->state_v, s, K, rows, K);
  }
  return Q3N_OK;
}
