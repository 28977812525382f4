/* Rows of an array that are needed soon, asked for a few lines at a time while other work goes on: they lie apart, and
   the hardware does not guess them. Static inline only. */
#ifndef Q3N_SIMD_AHEAD_H
#define Q3N_SIMD_AHEAD_H

#include <stdint.h>

typedef struct q3n_ahead {
  const char *at, *past; /* the rest of a row */
  int64_t bytes, stride; /* of a row, between rows */
  int64_t rows;          /* that begin after this one */
  int64_t lines, steps;  /* all of them are asked for in so many steps, evenly */
  int64_t due;           /* lines x steps so far - steps x lines asked for */
} q3n_ahead;

/* `rows` >= 0 rows of `bytes` from `first` on, `stride` bytes apart, in `steps` > 0 steps. */
static inline q3n_ahead q3n_ahead_of(const void *first, int64_t bytes, int64_t stride, int64_t rows, int64_t steps) {
  const char *row = first;
  return (q3n_ahead){row, rows > 0 ? row + bytes : row, bytes, stride, rows - 1, rows * ((bytes + 63) / 64), steps, 0};
}

/* Inlined, because gcc drops a call that does nothing but ask. */
static inline __attribute__((always_inline)) void q3n_ahead_ask(q3n_ahead *x) {
  for (x->due += x->lines; x->due >= x->steps; x->due -= x->steps) {
    if (x->at >= x->past) {
      if (x->rows <= 0) return;
      x->rows--;
      x->at = x->past - x->bytes + x->stride;
      x->past = x->at + x->bytes;
    }
    __builtin_prefetch(x->at);
    x->at += 64;
  }
}

#endif
