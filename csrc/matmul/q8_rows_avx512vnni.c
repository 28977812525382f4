/* The products of q8_rows.h: a block of one row of w at a time against the block of every token, 16 rows before their
   16 sums are brought into the lanes of one vector, where the tile has them too. */
#include "q8_rows.h"

#include "q8_avx512.h"

#define INLINE static inline __attribute__((always_inline))
enum { ROWS = 16, QUAD = 4, TOKENS = 4 };

INLINE __m512i unpacklo32(__m512i a, __m512i b) { return _mm512_unpacklo_epi32(a, b); }
INLINE __m512i unpackhi32(__m512i a, __m512i b) { return _mm512_unpackhi_epi32(a, b); }

/* Of four rows: in every quarter, lane r is the sum of that quarter of row r. */
INLINE __m512i quad_sums(const __m512i x[QUAD]) {
  const __m512i a = _mm512_add_epi32(unpacklo32(x[0], x[1]), unpackhi32(x[0], x[1]));
  const __m512i b = _mm512_add_epi32(unpacklo32(x[2], x[3]), unpackhi32(x[2], x[3]));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

/* Of the quad_sums of 16 rows: lane r is the sum of quarters 0 and 1 of row r (low), of 2 and 3 (high). */
typedef struct {
  __m512i low, high;
} halves_sum;

INLINE halves_sum half_sums(const __m512i x[4]) {
  /* quarters 0 1 of two quads, quarters 2 3 of two quads */
  const __m512i a = _mm512_shuffle_i32x4(x[0], x[1], 0x44), b = _mm512_shuffle_i32x4(x[2], x[3], 0x44);
  const __m512i c = _mm512_shuffle_i32x4(x[0], x[1], 0xee), d = _mm512_shuffle_i32x4(x[2], x[3], 0xee);
  return (halves_sum){
    _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd)),
    _mm512_add_epi32(_mm512_shuffle_i32x4(c, d, 0x88), _mm512_shuffle_i32x4(c, d, 0xdd)),
  };
}

INLINE __m512i all_sums(const __m512i x[4]) {
  const __m512i a = _mm512_add_epi32(_mm512_shuffle_i32x4(x[0], x[1], 0x44), _mm512_shuffle_i32x4(x[0], x[1], 0xee));
  const __m512i b = _mm512_add_epi32(_mm512_shuffle_i32x4(x[2], x[3], 0x44), _mm512_shuffle_i32x4(x[2], x[3], 0xee));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

/* Two stretches of 32 bytes. */
INLINE __m512i pair(const uint8_t *low, const uint8_t *high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)low)),
                            _mm256_loadu_si256((const __m256i *)high), 1);
}
INLINE __m512i twice(const uint8_t *p) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p));
}
/* a for words of the lower half, b for the upper. */
INLINE __m512i words_pair(int16_t a, int16_t b) {
  return _mm512_inserti64x4(_mm512_set1_epi16(a), _mm256_set1_epi16(b), 1);
}
INLINE __m512i or_masked(__m512i a, __m512i b, __m512i mask) { return _mm512_ternarylogic_epi64(a, b, mask, 0xf8); }

/* Sixteen bytes at offset `at` of 16 rows: vector i has bytes 4 i .. 4 i + 3 of row r in lane r. */
INLINE void heads(__m512i y[4], const uint8_t *const *row, int64_t at) {
  __m512i x[4];
  for (int i = 0; i < 4; i++) {
    __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(row[i] + at)));
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(row[4 + i] + at)), 1);
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(row[8 + i] + at)), 2);
    x[i] = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(row[12 + i] + at)), 3);
  }
  const __m512i a = unpacklo32(x[0], x[1]), b = unpackhi32(x[0], x[1]);
  const __m512i c = unpacklo32(x[2], x[3]), d = unpackhi32(x[2], x[3]);
  y[0] = _mm512_unpacklo_epi64(a, c);
  y[1] = _mm512_unpackhi_epi64(a, c);
  y[2] = _mm512_unpacklo_epi64(b, d);
  y[3] = _mm512_unpackhi_epi64(b, d);
}

/* The f16 at offset `at` of 16 rows. */
INLINE __m512 row_halves(const uint8_t *const *row, int64_t at) {
  uint16_t d[ROWS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++) __builtin_memcpy(&d[r], row[r] + at, 2);
  return halves((const uint8_t *)d);
}

INLINE __m512 times(__m512 d, const uint8_t *dx) { return _mm512_mul_ps(d, _mm512_set1_ps(float_at(dx))); }

/* 64 products of unsigned w and signed x in pairs, then times the scales. No pair leaves 16 bits: 2 63 127 is less. */
INLINE __m512i scaled(__m512i sum, __m512i w, __m512i x, __m512i scale) {
  return _mm512_dpwssd_epi32(sum, _mm512_maddubs_epi16(w, x), scale);
}

/* Q4_K and Q5_K differ in the fifth bit. */
INLINE void k45(const int M, float *y, const uint8_t *const *row, const uint8_t *const *x, int64_t blocks,
                const uint8_t *next, const int five) {
  const int bytes = five ? 176 : 144, q = five ? 48 : 16;
  const __m512i nibble = _mm512_set1_epi8(15), bit = _mm512_set1_epi8(16);
  const __m512i left42 = words_pair(4, 2), left31 = words_pair(3, 1), right02 = words_pair(0, 2), right13 = words_pair(1, 3);
  /* byte j of every dword to the words of a half */
  const __m512i take02 = _mm512_inserti64x4(_mm512_set1_epi16((short)0x8000), _mm256_set1_epi16((short)0x8002), 1);
  const __m512i take13 = _mm512_inserti64x4(_mm512_set1_epi16((short)0x8001), _mm256_set1_epi16((short)0x8003), 1);
  for (int group = 0; group < 2; group++, row += ROWS, y += ROWS) {
    __m512 total[TOKENS];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) total[m] = _mm512_setzero_ps();
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t at = block * bytes, first = block * Q3N_Q8_X256_BYTES;
      __m512i head[4], a[TOKENS], px[TOKENS][4], quad[TOKENS][4];
      heads(head, row, at);
      const k_scales s = unpack_k_scales(head[1], head[2], head[3]);
      uint32_t scale[2][ROWS];
      _mm512_storeu_si512(scale[0], s.scale[0]);
      _mm512_storeu_si512(scale[1], s.scale[1]);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        const uint8_t *p = x[m] + first;
        px[m][0] = pair(p, p + 64);
        px[m][1] = pair(p + 32, p + 96);
        px[m][2] = pair(p + 128, p + 192);
        px[m][3] = pair(p + 160, p + 224);
      }
#pragma GCC unroll 4
      for (int g = 0; g < 4; g++) {
        __m512i sum[TOKENS][QUAD];
#pragma GCC unroll 4
        for (int r = 0; r < QUAD; r++) {
          const uint8_t *w = row[QUAD * g + r] + at;
          const uint8_t *later = group ? next + (QUAD * g + r) * blocks * bytes : row[ROWS + QUAD * g + r];
          for (int line = 0; line < 3; line++) fetch(later + at, line);
          const __m512i low = load(w + q), high = load(w + q + 64);
          __m512i u[4] = {_mm512_and_si512(low, nibble), _mm512_and_si512(right16(low, 4), nibble),
                          _mm512_and_si512(high, nibble), _mm512_and_si512(right16(high, 4), nibble)};
          if (five) {
            const __m512i h = twice(w + 16);
            u[0] = or_masked(u[0], _mm512_sllv_epi16(h, left42), bit);
            u[1] = or_masked(u[1], _mm512_sllv_epi16(h, left31), bit);
            u[2] = or_masked(u[2], _mm512_srlv_epi16(h, right02), bit);
            u[3] = or_masked(u[3], _mm512_srlv_epi16(h, right13), bit);
          }
          const __m512i s0 = _mm512_set1_epi32((int)scale[0][QUAD * g + r]);
          const __m512i s1 = _mm512_set1_epi32((int)scale[1][QUAD * g + r]);
          const __m512i s[4] = {_mm512_shuffle_epi8(s0, take02), _mm512_shuffle_epi8(s0, take13),
                                _mm512_shuffle_epi8(s1, take02), _mm512_shuffle_epi8(s1, take13)};
#pragma GCC unroll 4
          for (int m = 0; m < M; m++) {
            __m512i v = _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) v = scaled(v, u[i], px[m][i], s[i]);
            sum[m][r] = v;
          }
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) quad[m][g] = quad_sums(sum[m]);
      }
      const __m512 d = low_half(head[0]), dmin = negative(high_half(head[0]));
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        a[m] = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
          a[m] = _mm512_dpwssd_epi32(a[m], words_of(s.min[i / 2], i % 2),
                                     broadcast(x[m] + first + Q3N_Q8_X256_SUM32 + 4 * i));
        const uint8_t *dx = x[m] + first + Q3N_Q8_X256_D;
        total[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(all_sums(quad[m])), times(d, dx), total[m]);
        total[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[m]), times(dmin, dx), total[m]);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) _mm512_storeu_ps(y + 32 * m, total[m]);
  }
}

INLINE void q4_k(const int M, float *y, const uint8_t *const *row, const uint8_t *const *x, int64_t blocks,
                 const uint8_t *next) {
  k45(M, y, row, x, blocks, next, 0);
}

INLINE void q5_k(const int M, float *y, const uint8_t *const *row, const uint8_t *const *x, int64_t blocks,
                 const uint8_t *next) {
  k45(M, y, row, x, blocks, next, 1);
}

/* Values 0..63 stand for -32..31: -32 times the activations' sums, as twice -16, takes part as if it were products. */
INLINE void q6_k(const int M, float *y, const uint8_t *const *row, const uint8_t *const *x, int64_t blocks,
                 const uint8_t *next) {
  const __m512i nibble = _mm512_set1_epi8(15), two_bits = _mm512_set1_epi8(0x30);
  const __m512i left42 = words_pair(4, 2), right02 = words_pair(0, 2);
  /* word j of the scales to the 8 words of sub-block j */
  const __m512i eight = _mm512_inserti64x4(
    _mm512_castsi256_si512(_mm256_inserti128_si256(_mm256_setzero_si256(), _mm_set1_epi16(1), 1)),
    _mm256_inserti128_si256(_mm256_set1_epi16(2), _mm_set1_epi16(3), 1), 1);
  const __m512i natural = _mm512_inserti64x4(
    _mm512_castsi256_si512(_mm256_setr_epi16(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15)),
    _mm256_setr_epi16(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15), 1);
  for (int group = 0; group < 2; group++, row += ROWS, y += ROWS) {
    __m512 total[TOKENS];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) total[m] = _mm512_setzero_ps();
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t at = block * 210, first = block * Q3N_Q8_X256_BYTES;
      __m512i offset[TOKENS], quad[TOKENS][4];
#pragma GCC unroll 4
      for (int m = 0; m < M; m++)
        offset[m] = _mm512_mullo_epi16(_mm512_permutexvar_epi16(natural, twice(x[m] + first + Q3N_Q8_X256_SUM16)),
                                       _mm512_set1_epi16(-16));
#pragma GCC unroll 4
      for (int g = 0; g < 4; g++) {
        __m512i sum[TOKENS][QUAD];
#pragma GCC unroll 4
        for (int r = 0; r < QUAD; r++) {
          const uint8_t *w = row[QUAD * g + r] + at;
          const uint8_t *later = group ? next + (QUAD * g + r) * blocks * 210 : row[ROWS + QUAD * g + r];
          for (int line = 0; line < 4; line++) fetch(later + at, line);
          const __m512i scales = _mm512_cvtepi8_epi16(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(w + 192))));
          __m512i v[TOKENS];
#pragma GCC unroll 4
          for (int m = 0; m < M; m++) v[m] = _mm512_dpwssd_epi32(_mm512_setzero_si512(), scales, offset[m]);
#pragma GCC unroll 2
          for (int half = 0; half < 2; half++) {
            const __m512i low = load(w + 64 * half), high = twice(w + 128 + 32 * half);
            const __m512i u0 = or_masked(_mm512_and_si512(low, nibble), _mm512_sllv_epi16(high, left42), two_bits);
            const __m512i u1 = or_masked(_mm512_and_si512(right16(low, 4), nibble), _mm512_srlv_epi16(high, right02), two_bits);
            const __m512i s0 = _mm512_permutexvar_epi16(_mm512_add_epi16(eight, _mm512_set1_epi16((short)(8 * half))), scales);
            const __m512i s1 = _mm512_permutexvar_epi16(_mm512_add_epi16(eight, _mm512_set1_epi16((short)(8 * half + 4))), scales);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
              const uint8_t *p = x[m] + first + 128 * half;
              v[m] = scaled(scaled(v[m], u0, load(p), s0), u1, load(p + 64), s1);
            }
          }
#pragma GCC unroll 4
          for (int m = 0; m < M; m++) sum[m][r] = v[m];
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) quad[m][g] = quad_sums(sum[m]);
      }
      const __m512 d = row_halves(row, at + 208);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++)
        total[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(all_sums(quad[m])), times(d, x[m] + first + Q3N_Q8_X256_D), total[m]);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) _mm512_storeu_ps(y + 32 * m, total[m]);
  }
}

/* Two blocks at a time, side by side. Bytes are moved to 0..255, nibbles stand for -8..7: the shift times the
   activations' sum is taken off. */
INLINE void q8_q4(const int M, float *y, const uint8_t *const *row, const uint8_t *const *x, int64_t blocks,
                  const uint8_t *next, const int four_bits) {
  const int bytes = four_bits ? 18 : 34, shift = four_bits ? 3 : 7;
  const __m512i nibble = _mm512_set1_epi8(15), middle = _mm512_set1_epi8((char)0x80);
  const __m512i right04 = _mm512_broadcast_i64x4(_mm256_inserti128_si256(_mm256_setzero_si256(), _mm_set1_epi16(4), 1));
  for (int group = 0; group < 2; group++, row += ROWS, y += ROWS) {
    __m512 total[TOKENS];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) total[m] = _mm512_setzero_ps();
    for (int64_t block = 0; block < blocks; block += 2) {
      /* the last of an odd number meets itself, and the second result is left */
      const int64_t second = block + 1 < blocks;
      const int64_t at = block * bytes, after = at + second * bytes;
      const int64_t first = block * Q3N_Q8_X32_BYTES, then = first + second * Q3N_Q8_X32_BYTES;
      __m512i px[TOKENS], quad[TOKENS][4];
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) px[m] = pair(x[m] + first + Q3N_Q8_X32_Q, x[m] + then + Q3N_Q8_X32_Q);
#pragma GCC unroll 4
      for (int g = 0; g < 4; g++) {
        __m512i sum[TOKENS][QUAD];
#pragma GCC unroll 4
        for (int r = 0; r < QUAD; r++) {
          const uint8_t *w = row[QUAD * g + r];
          const uint8_t *later = group ? next + (QUAD * g + r) * blocks * bytes : row[ROWS + QUAD * g + r];
          fetch(later + at, 0);
          __m512i u;
          if (four_bits) {
            const __m128i low = _mm_loadu_si128((const __m128i *)(w + at + 2));
            const __m128i high = _mm_loadu_si128((const __m128i *)(w + after + 2));
            u = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_broadcastsi128_si256(low)),
                                   _mm256_broadcastsi128_si256(high), 1);
            u = _mm512_and_si512(_mm512_srlv_epi16(u, right04), nibble);
          } else {
            u = _mm512_xor_si512(pair(w + at + 2, w + after + 2), middle);
          }
#pragma GCC unroll 4
          for (int m = 0; m < M; m++) sum[m][r] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), u, px[m]);
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) quad[m][g] = quad_sums(sum[m]);
      }
      const __m512 d0 = row_halves(row, at), d1 = row_halves(row, after);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        const halves_sum sums = half_sums(quad[m]);
        const uint8_t *p = x[m] + first, *p1 = x[m] + then;
        const __m512i s0 = _mm512_sub_epi32(sums.low, left32(broadcast(p + Q3N_Q8_X32_SUM), shift));
        total[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s0), times(d0, p), total[m]);
        if (!second) continue;
        const __m512i s1 = _mm512_sub_epi32(sums.high, left32(broadcast(p1 + Q3N_Q8_X32_SUM), shift));
        total[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s1), times(d1, p1), total[m]);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) _mm512_storeu_ps(y + 32 * m, total[m]);
  }
}

INLINE void q8_0(const int M, float *y, const uint8_t *const *row, const uint8_t *const *x, int64_t blocks,
                 const uint8_t *next) {
  q8_q4(M, y, row, x, blocks, next, 0);
}

INLINE void q4_0(const int M, float *y, const uint8_t *const *row, const uint8_t *const *x, int64_t blocks,
                 const uint8_t *next) {
  q8_q4(M, y, row, x, blocks, next, 1);
}

#define FOR_TOKENS(op, M)                                                                                           \
  static void op##_##M(float *y, const uint8_t *const *row, const uint8_t *const *x, int64_t blocks,               \
                       const uint8_t *next) {                                                                       \
    op(M, y, row, x, blocks, next);                                                                                 \
  }
#define FOR_TYPE(op) FOR_TOKENS(op, 1) FOR_TOKENS(op, 2) FOR_TOKENS(op, 3) FOR_TOKENS(op, 4)
FOR_TYPE(q4_k)
FOR_TYPE(q5_k)
FOR_TYPE(q6_k)
FOR_TYPE(q8_0)
FOR_TYPE(q4_0)

#define PRODUCTS(op) {op##_1, op##_2, op##_3, op##_4}

q3n_q8_rows *q3n_q8_rows_avx512vnni(q3n_dtype dtype, int64_t tokens) {
  static q3n_q8_rows *const k4[] = PRODUCTS(q4_k), *const k5[] = PRODUCTS(q5_k), *const k6[] = PRODUCTS(q6_k);
  static q3n_q8_rows *const b8[] = PRODUCTS(q8_0), *const b4[] = PRODUCTS(q4_0);
  switch (dtype) {
    case Q3N_Q4_K: return k4[tokens - 1];
    case Q3N_Q5_K: return k5[tokens - 1];
    case Q3N_Q6_K: return k6[tokens - 1];
    case Q3N_Q8_0: return b8[tokens - 1];
    case Q3N_Q4_0: return b4[tokens - 1];
    default: return NULL;
  }
}
