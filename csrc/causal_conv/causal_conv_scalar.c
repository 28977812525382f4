/* A block of channels over all tokens of a sequence; the inner loops run over channels, which are contiguous. */
#include <math.h>

#include "../base/check.h"
#include "causal_conv_block.h"

q3n_status q3n_causal_conv_scalar(const q3n_causal_conv_args *a, int64_t begin, int64_t end, void *scratch);

enum { CHANNELS = Q3N_CAUSAL_CONV_CHANNELS, MAX_WIDTH = Q3N_CAUSAL_CONV_MAX_WIDTH };

/* What one item works on: `width` channels from x, and the inputs before the first token, [age][channel]. */
typedef struct {
  const float *x;
  int64_t x_t, window, width;
  float before[MAX_WIDTH - 1][CHANNELS];
} sequence;

/* The inputs of token t, which may lie before the first one: t >= -window. */
static const float *token(const sequence *s, int64_t t) { return t < 0 ? s->before[s->window + t] : s->x + t * s->x_t; }

/* The state after n tokens. */
static void store_state(const sequence *s, int64_t n, float *state, int64_t state_c) {
  for (int64_t i = 0; i < s->window; i++) {
    const float *x = token(s, n - s->window + i);
    for (int64_t c = 0; c < s->width; c++) state[c * state_c + i] = x[c];
  }
}

q3n_status q3n_causal_conv_scalar(const q3n_causal_conv_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  const int64_t blocks = q3n_ceil_div(a->C, CHANNELS), window = a->width - 1;
  for (int64_t item = begin; item < end; item++) {
    const int64_t b = item / blocks, first = item % blocks * CHANNELS;
    const int64_t packed = a->cu_seqlens ? a->cu_seqlens[b] : 0, row = a->cu_seqlens ? 0 : b;
    const int64_t T = a->cu_seqlens ? a->cu_seqlens[b + 1] - packed : a->T;
    const int64_t width = a->C - first < CHANNELS ? a->C - first : CHANNELS;

    sequence s = {.x_t = a->x_t, .window = window, .width = width};
    if (T > 0) s.x = a->x + row * a->x_b + packed * a->x_t + first;
    /* Copied out before anything is stored: the state may be updated in place. */
    if (a->state_in) {
      const float *state = a->state_in + (a->slot_in ? a->slot_in[b] : b) * a->state_slot + first * a->state_c;
      for (int64_t i = 0; i < window; i++)
        for (int64_t c = 0; c < width; c++) s.before[i][c] = state[c * a->state_c + i];
    }

    float taps[MAX_WIDTH][CHANNELS];
    for (int64_t j = 0; T > 0 && j < a->width; j++)
      for (int64_t c = 0; c < width; c++) taps[j][c] = a->w[(first + c) * a->w_c + j];

    for (int64_t t = 0; t < T; t++) {
      float acc[CHANNELS];
      for (int64_t c = 0; c < width; c++) acc[c] = a->bias ? a->bias[first + c] : 0.0f;
      for (int64_t j = 0; j < a->width; j++) {
        const float *x = token(&s, t - window + j);
        for (int64_t c = 0; c < width; c++) acc[c] += taps[j][c] * x[c];
      }
      float *y = a->y + row * a->y_b + (packed + t) * a->y_t + first;
      for (int64_t c = 0; c < width; c++) y[c] = a->silu ? acc[c] / (1.0f + expf(-acc[c])) : acc[c];

      if (a->snapshots)
        store_state(&s, t + 1, a->snapshots + row * a->snap_b + (packed + t) * a->snap_t + first * a->snap_c,
                    a->snap_c);
    }
    if (a->state_out)
      store_state(&s, T, a->state_out + (a->slot_out ? a->slot_out[b] : b) * a->state_slot + first * a->state_c,
                  a->state_c);
  }
  return Q3N_OK;
}
