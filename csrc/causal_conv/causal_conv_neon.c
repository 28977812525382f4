/* A block of channels over all tokens of a sequence, four channels at a time. A short run of tokens is done for all
   channels of the block before the next one, so that the inputs stay in the first cache. */
#include "../base/check.h"
#include "../simd/neon.h"
#include "causal_conv_block.h"

q3n_status q3n_causal_conv_neon(const q3n_causal_conv_args *a, int64_t begin, int64_t end, void *scratch);

enum { CHANNELS = Q3N_CAUSAL_CONV_CHANNELS, MAX_WIDTH = Q3N_CAUSAL_CONV_MAX_WIDTH, TOKENS = 32 };

/* What one item works on: `width` channels from x, and the inputs before the first token, [age][channel]. */
typedef struct {
  const float *x;
  int64_t x_t, window, width;
  float before[MAX_WIDTH - 1][CHANNELS];
} sequence;

/* The inputs of token t, which may lie before the first one: t >= -window. */
static inline const float *token(const sequence *s, int64_t t) {
  return t < 0 ? s->before[s->window + t] : s->x + t * s->x_t;
}

/* The state after n tokens. */
static void store_state(const sequence *s, int64_t n, float *state, int64_t state_c) {
  for (int64_t i = 0; i < s->window; i++) {
    const float *x = token(s, n - s->window + i);
    for (int64_t c = 0; c < s->width; c++) state[c * state_c + i] = x[c];
  }
}

/* Four taps, tokens t0 .. t1 of the channels from c on: the inputs move through registers. */
static void run_width4(const sequence *s, const float (*taps)[CHANNELS], const float *bias, int silu, int64_t c,
                       int64_t t0, int64_t t1, float *y, int64_t y_t) {
  const float32x4_t start = q3n_load_upto(bias, c, s->width);
  float32x4_t w[4], x[4];
  for (int j = 0; j < 4; j++) w[j] = vld1q_f32(taps[j] + c);
  for (int j = 0; j < 3; j++) x[j] = q3n_load_upto(token(s, t0 - 3 + j), c, s->width);
  for (int64_t t = t0; t < t1; t++) {
    x[3] = q3n_load_upto(token(s, t), c, s->width);
    float32x4_t sum = start;
    for (int j = 0; j < 4; j++) sum = vfmaq_f32(sum, w[j], x[j]);
    q3n_store_upto(y + t * y_t, c, s->width, silu ? q3n_silu4(sum) : sum);
    for (int j = 0; j < 3; j++) x[j] = x[j + 1];
  }
}

/* The same sums for any number of taps. */
static void run_any(const sequence *s, const float (*taps)[CHANNELS], const float *bias, int silu, int64_t c,
                    int64_t t0, int64_t t1, float *y, int64_t y_t) {
  const float32x4_t start = q3n_load_upto(bias, c, s->width);
  for (int64_t t = t0; t < t1; t++) {
    float32x4_t sum = start;
    for (int64_t j = 0; j <= s->window; j++)
      sum = vfmaq_f32(sum, vld1q_f32(taps[j] + c), q3n_load_upto(token(s, t - s->window + j), c, s->width));
    q3n_store_upto(y + t * y_t, c, s->width, silu ? q3n_silu4(sum) : sum);
  }
}

q3n_status q3n_causal_conv_neon(const q3n_causal_conv_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  const int64_t blocks = q3n_ceil_div(a->C, CHANNELS), window = a->width - 1;
  for (int64_t item = begin; item < end; item++) {
    const int64_t b = item / blocks, first = item % blocks * CHANNELS;
    const int64_t packed = a->cu_seqlens ? a->cu_seqlens[b] : 0, row = a->cu_seqlens ? 0 : b;
    const int64_t T = a->cu_seqlens ? a->cu_seqlens[b + 1] - packed : a->T;
    const int64_t width = a->C - first < CHANNELS ? a->C - first : CHANNELS;

    /* Zeros before the first token and for no bias; past `width` too, where vectors of taps are read whole. */
    sequence s = {.x_t = a->x_t, .window = window, .width = width};
    float taps[MAX_WIDTH][CHANNELS] = {{0.0f}}, none[CHANNELS] = {0.0f};
    if (T > 0) s.x = a->x + row * a->x_b + packed * a->x_t + first;
    /* Copied out before anything is stored: the state may be updated in place. */
    if (a->state_in) {
      const float *state = a->state_in + (a->slot_in ? a->slot_in[b] : b) * a->state_slot + first * a->state_c;
      for (int64_t i = 0; i < window; i++)
        for (int64_t c = 0; c < width; c++) s.before[i][c] = state[c * a->state_c + i];
    }
    for (int64_t j = 0; T > 0 && j < a->width; j++)
      for (int64_t c = 0; c < width; c++) taps[j][c] = a->w[(first + c) * a->w_c + j];

    const float *bias = a->bias ? a->bias + first : none;
    float *y = T > 0 ? a->y + row * a->y_b + packed * a->y_t + first : NULL;
    for (int64_t t0 = 0; t0 < T; t0 += TOKENS) {
      const int64_t t1 = T - t0 < TOKENS ? T : t0 + TOKENS;
      for (int64_t c = 0; c < width; c += 4)
        (a->width == 4 ? run_width4 : run_any)(&s, (const float (*)[CHANNELS])taps, bias, a->silu, c, t0, t1, y,
                                               a->y_t);
    }
    for (int64_t t = 0; a->snapshots && t < T; t++)
      store_state(&s, t + 1, a->snapshots + row * a->snap_b + (packed + t) * a->snap_t + first * a->snap_c, a->snap_c);
    if (a->state_out)
      store_state(&s, T, a->state_out + (a->slot_out ? a->slot_out[b] : b) * a->state_slot + first * a->state_c,
                  a->state_c);
  }
  return Q3N_OK;
}
