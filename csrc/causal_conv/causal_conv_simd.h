/* Spans of channels over all tokens of a sequence, on the vectors of csrc/simd. A range of items that are neighbours
   goes as one span as far as that fits: a token is then read and written in pieces of 2 KiB instead of 256 bytes. */
#include <string.h>

#include "../base/check.h"
#include "causal_conv_block.h"

enum { LANES = Q3N_LANES, SPAN = 8 * Q3N_CAUSAL_CONV_CHANNELS, MAX_WIDTH = Q3N_CAUSAL_CONV_MAX_WIDTH };

/* What a span works on: `width` channels from x; taps, and the inputs before the first token by age. */
typedef struct span {
  const float *x, *bias;
  int64_t x_t, window, width;
  float before[MAX_WIDTH - 1][SPAN], taps[MAX_WIDTH][SPAN];
} span;

/* The inputs of token t, which may lie before the first one: t >= -window. */
static inline const float *token(const span *s, int64_t t) {
  return t < 0 ? s->before[s->window + t] : s->x + t * s->x_t;
}

/* rows[n][channels] = x[channels][n], the channels x_row apart. */
static void from_channels(float rows[][SPAN], const float *x, int64_t x_row, int64_t n, int64_t channels) {
  int64_t c = 0;
  if (n == 4 && x_row == 4)
    for (; c + LANES <= channels; c += LANES) {
      q3n_v part[4];
      for (int i = 0; i < 4; i++) part[i] = q3n_v_load(x + 4 * c + i * LANES);
      q3n_v_deal4(part);
      for (int i = 0; i < 4; i++) q3n_v_store(rows[i] + c, part[i]);
    }
  if (n == 3)
    for (; c < channels; c++) {
      const float *xc = x + c * x_row;
      rows[0][c] = xc[0], rows[1][c] = xc[1], rows[2][c] = xc[2];
    }
  for (; c < channels; c++)
    for (int64_t i = 0; i < n; i++) rows[i][c] = x[c * x_row + i];
}

/* The state after n tokens. */
static void store_state(const span *s, int64_t n, float *state, int64_t state_c) {
  const float *x[MAX_WIDTH - 1];
  int64_t c = 0;
  for (int64_t i = 0; i < s->window; i++) x[i] = token(s, n - s->window + i);
  if (s->window == 3)
    for (; c < s->width; c++) {
      float *at = state + c * state_c;
      at[0] = x[0][c], at[1] = x[1][c], at[2] = x[2][c];
    }
  for (; c < s->width; c++)
    for (int64_t i = 0; i < s->window; i++) state[c * state_c + i] = x[i][c];
}

/* A vector of channels: the sum starts at the bias and takes the taps from the oldest input to the newest. */
static inline q3n_v convolve_part(const span *s, const float *const x[MAX_WIDTH], int64_t c, int64_t taps, int silu,
                                  int whole, q3n_v_mask some) {
  q3n_v acc = q3n_v_zero();
  if (s->bias) acc = whole ? q3n_v_load(s->bias + c) : q3n_v_load_some(some, s->bias + c);
  for (int64_t j = 0; j < taps; j++) {
    const q3n_v xj = whole ? q3n_v_load(x[j] + c) : q3n_v_load_some(some, x[j] + c);
    acc = q3n_v_fma(q3n_v_load(s->taps[j] + c), xj, acc);
  }
  return silu ? q3n_v_silu(acc) : acc;
}

/* `ahead` and `y_ahead` are what a later token reads and writes: a piece of a row is too short for the processor to see
   it coming. */
static inline void convolve(const span *s, const float *const x[MAX_WIDTH], int64_t taps, int silu, float *y,
                            const float *ahead, float *y_ahead) {
  const int64_t whole = s->width / LANES * LANES;
  const q3n_v_mask rest = q3n_v_first(s->width - whole);
  for (int64_t c = 0; c < whole; c += LANES) {
    __builtin_prefetch(ahead + c, 0);
    __builtin_prefetch(y_ahead + c, 1);
    q3n_v_store(y + c, convolve_part(s, x, c, taps, silu, 1, rest));
  }
  if (whole < s->width) q3n_v_store_some(y + whole, rest, convolve_part(s, x, whole, taps, silu, 0, rest));
}

/* One token. Four taps with the activation is Qwen3-Next's: a loop of its own, unrolled. */
static void convolve_token(const span *s, int64_t t, int64_t taps, int silu, float *y, const float *ahead,
                           float *y_ahead) {
  const float *x[MAX_WIDTH];
  for (int64_t j = 0; j < taps; j++) x[j] = token(s, t - s->window + j);
  if (taps == 4 && silu) {
    const float *const four[MAX_WIDTH] = {x[0], x[1], x[2], x[3]};
    convolve(s, four, 4, 1, y, ahead, y_ahead);
  } else {
    convolve(s, x, taps, silu, y, ahead, y_ahead);
  }
}

static inline q3n_status run_spans(const q3n_causal_conv_args *a, int64_t begin, int64_t end) {
  const int64_t blocks = q3n_ceil_div(a->C, Q3N_CAUSAL_CONV_CHANNELS), window = a->width - 1;
  /* no initialiser: it would clear 60 KB a call */
  span s;
  s.x_t = a->x_t;
  s.window = window;
  for (int64_t item = begin; item < end;) {
    const int64_t b = item / blocks, from = item % blocks, at_most = SPAN / Q3N_CAUSAL_CONV_CHANNELS;
    int64_t together = blocks - from < end - item ? blocks - from : end - item;
    if (together > at_most) together = at_most;
    item += together;

    const int64_t first = from * Q3N_CAUSAL_CONV_CHANNELS, span_end = (from + together) * Q3N_CAUSAL_CONV_CHANNELS;
    const int64_t packed = a->cu_seqlens ? a->cu_seqlens[b] : 0, row = a->cu_seqlens ? 0 : b;
    const int64_t T = a->cu_seqlens ? a->cu_seqlens[b + 1] - packed : a->T;
    s.width = (span_end < a->C ? span_end : a->C) - first;
    s.bias = a->bias && T > 0 ? a->bias + first : NULL;
    s.x = T > 0 ? a->x + row * a->x_b + packed * a->x_t + first : NULL;
    /* Copied out before anything is stored: the state may be updated in place. */
    if (a->state_in)
      from_channels(s.before, a->state_in + (a->slot_in ? a->slot_in[b] : b) * a->state_slot + first * a->state_c,
                    a->state_c, window, s.width);
    else
      for (int64_t i = 0; i < window; i++) memset(s.before[i], 0, sizeof s.before[i]);
    if (T > 0) from_channels(s.taps, a->w + first * a->w_c, a->w_c, a->width, s.width);
    /* Whole vectors of taps are read. */
    for (int64_t j = 0; T > 0 && j < a->width; j++)
      for (int64_t c = s.width; c % LANES; c++) s.taps[j][c] = 0.0f;

    for (int64_t t = 0; t < T; t++) {
      float *y = a->y + row * a->y_b + (packed + t) * a->y_t + first;
      const int64_t ahead = T - t > 2 ? 2 : 0;
      convolve_token(&s, t, a->width, a->silu, y, s.x + (t + ahead) * s.x_t, y + ahead * a->y_t);
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
