/* The tiles of q8_tile.h on vpdpbusd: unsigned weights times signed activations, four columns of 16 rows at once. */
#include "q8_tile.h"

#include <string.h>

#include "q8_avx512.h"

#define M 1
#define EACH(X) X(0)
#include "q8_tile_avx512vnni.inc"
#define M 2
#define EACH(X) X(0) X(1)
#include "q8_tile_avx512vnni.inc"
#define M 3
#define EACH(X) X(0) X(1) X(2)
#include "q8_tile_avx512vnni.inc"
#define M 4
#define EACH(X) X(0) X(1) X(2) X(3)
#include "q8_tile_avx512vnni.inc"
#define M 5
#define EACH(X) X(0) X(1) X(2) X(3) X(4)
#include "q8_tile_avx512vnni.inc"
#define M 6
#define EACH(X) X(0) X(1) X(2) X(3) X(4) X(5)
#include "q8_tile_avx512vnni.inc"

/* 2 m rows by two tiles, each of which fetches one of the two groups that come next. */
#define TWICE(op, m, rows, bytes)                                                                               \
  static void op##_##rows(float *y, const uint8_t *w0, const uint8_t *w1, const uint8_t *const *x,              \
                          int64_t blocks, const uint8_t *next) {                                                \
    op##_half_##m(y, w0, w1, x, blocks, next);                                                                  \
    op##_half_##m(y + 32 * m, w0, w1, x + m, blocks, next + blocks * 16 * (bytes));                             \
  }
#define TWICES(op, bytes) TWICE(op, 4, 8, bytes) TWICE(op, 5, 10, bytes) TWICE(op, 6, 12, bytes)
TWICES(q4_k, 144)
TWICES(q5_k, 176)
TWICES(q6_k, 210)
TWICES(q8_0, 34)
TWICES(q4_0, 18)

#define TILES(op) \
  {op##_1, op##_2, op##_3, op##_4, op##_5, op##_6, NULL, op##_8, NULL, op##_10, NULL, op##_12}

q3n_q8_tile *q3n_q8_tile_avx512vnni(q3n_dtype dtype, int64_t tokens) {
  static q3n_q8_tile *const q4_k[] = TILES(q4_k), *const q5_k[] = TILES(q5_k), *const q6_k[] = TILES(q6_k);
  static q3n_q8_tile *const q8_0[] = TILES(q8_0), *const q4_0[] = TILES(q4_0);
  switch (dtype) {
    case Q3N_Q4_K: return q4_k[tokens - 1];
    case Q3N_Q5_K: return q5_k[tokens - 1];
    case Q3N_Q6_K: return q6_k[tokens - 1];
    case Q3N_Q8_0: return q8_0[tokens - 1];
    case Q3N_Q4_0: return q4_0[tokens - 1];
    default: return NULL;
  }
}
