/* The tiles of q8_tile.h on vpmaddubsw: unsigned weights times signed activations, pairs of columns of 8 rows to 16
   bits. A group of 16 rows is taken 256 columns at a time: up to five tokens meet them while they lie in the first
   cache, then the others.

   16 bits hold the sum of a few products: 8 steps of values up to 15 (30480), 4 of 31 (31496), 2 of 63 (32004), one of
   128 (32512). vpmaddwd with the scales brings them to 32. */
#include "q8_tile.h"

#include <immintrin.h>
#include <stddef.h>

#include "../quant/q8_activations.h"

/* Shifts by a number that gcc and clang both take as an int. */
typedef uint16_t words __attribute__((vector_size(32)));
typedef uint32_t dwords __attribute__((vector_size(32)));
static inline __m256i right16(__m256i v, int n) { return (__m256i)((words)v >> n); }
static inline __m256i left16(__m256i v, int n) { return (__m256i)((words)v << n); }
static inline __m256i right32(__m256i v, int n) { return (__m256i)((dwords)v >> n); }

/* Half h (8 rows) of unit or line `line`. */
static inline __m256i load(const uint8_t *p, int line, int h) {
  return _mm256_loadu_si256((const __m256i *)(const void *)(p + 64 * line + 32 * h));
}

static inline __m256i broadcast(const uint8_t *p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  return _mm256_set1_epi32(four);
}

static inline float float_at(const uint8_t *p) {
  float f;
  __builtin_memcpy(&f, p, sizeof f);
  return f;
}

/* Brings line `line` of what comes next closer: the hardware stops at every page, weights do not. By hand, because
   gcc drops the intrinsic from loops that it unrolls. */
static inline void fetch(const uint8_t *next, int64_t line) {
  __asm__ volatile("prefetcht0 %0" : : "m"(next[64 * line]));
}

/* Eight f16 values, of their own or in the low halves of eight integers. */
static inline __m256 halves(const uint8_t *p) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}
static inline __m256 low_half(__m256i v) {
  const __m256i low = _mm256_and_si256(v, _mm256_set1_epi32(0xffff));
  return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}
static inline __m256 negative(__m256 v) { return _mm256_xor_ps(v, _mm256_set1_ps(-0.0f)); }

/* Byte i of every row, twice, as 16-bit integers: unsigned and signed. */
static inline __m256i pairs_of(__m256i v, int i) {
  const __m256i twice = _mm256_setr_epi32(0, 0x00040004, 0x00080008, 0x000c000c, 0, 0x00040004, 0x00080008, 0x000c000c);
  return _mm256_shuffle_epi8(v, _mm256_or_si256(twice, _mm256_set1_epi32((int)0x80008000 | i * 0x00010001)));
}
static inline __m256i signed_pairs_of(__m256i v, int i) {
  const __m256i twice = _mm256_setr_epi32(0, 0x04000400, 0x08000800, 0x0c000c00, 0, 0x04000400, 0x08000800, 0x0c000c00);
  return _mm256_srai_epi16(
      _mm256_shuffle_epi8(v, _mm256_or_si256(twice, _mm256_set1_epi32(0x00800080 | i * 0x01000100))), 8);
}
/* Bytes i and i + 2 of every row as 16-bit integers: the order in which the sums of the activations lie. */
static inline __m256i words_of(__m256i v, int i) {
  return _mm256_and_si256(right32(v, 8 * i), _mm256_set1_epi32(0x00ff00ff));
}
static inline __m256i signed_words_of(__m256i v, int i) {
  return _mm256_srai_epi16(i ? v : _mm256_slli_epi16(v, 8), 8);
}

enum { COLUMNS = 256, UNITS = COLUMNS / 4, BLOCKS = COLUMNS / 32 };

/* Up to COLUMNS columns of 16 rows. Of two vectors that stand together the first holds rows 0 .. 7. */
typedef struct {
  const uint8_t *group;  /* as they lie in memory */
  const uint8_t *next;   /* to be fetched meanwhile, as many bytes */
  int64_t blocks;
  __m256i q[2 * UNITS];  /* Q5_K, Q6_K: unsigned values, four columns each */
  __m256i scale[2 * 16]; /* of a super-block's sub-blocks, twice each */
  __m256i min[2 * 8];    /* minima of two sub-blocks each, or their scales: what the activations' sums meet */
  __m256 d[2 * BLOCKS];  /* of the super-block or of each block */
  __m256 dmin[2];        /* negative */
} columns;

/* The eight 6-bit scales and minima (q3n_k_scale, q3n_k_min). */
static inline void decode_k_scales(columns *to) {
  const uint8_t *w = to->group;
  const __m256i six = _mm256_set1_epi8(63), four = _mm256_set1_epi8(15), top = _mm256_set1_epi8(0x30);
  for (int h = 0; h < 2; h++) {
    const __m256i head = load(w, 0, h), a = load(w, 1, h), b = load(w, 2, h), c = load(w, 3, h);
    to->d[h] = low_half(head);
    to->dmin[h] = negative(low_half(right32(head, 16)));
    const __m256i scale[2] = {
        _mm256_and_si256(a, six),
        _mm256_or_si256(_mm256_and_si256(c, four), _mm256_and_si256(right16(a, 2), top)),
    };
    const __m256i min[2] = {
        _mm256_and_si256(b, six),
        _mm256_or_si256(_mm256_and_si256(right16(c, 4), four), _mm256_and_si256(right16(b, 2), top)),
    };
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) to->scale[2 * j + h] = pairs_of(scale[j / 4], j % 4);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) to->min[2 * i + h] = words_of(min[i / 2], i % 2);
  }
}

/* Nibbles are taken where they lie, by the kernels. */
static inline void decode_q4_k(columns *to) { decode_k_scales(to); }

static inline void decode_q5_k(columns *to) {
  const uint8_t *w = to->group, *next = to->next;
  const __m256i nibble = _mm256_set1_epi8(15), fifth = _mm256_set1_epi8(16);
  decode_k_scales(to);
  for (int i = 0; i < 12; i++) fetch(next, i);
  for (int i = 0; i < 8; i++)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      const __m256i high = load(w, 4 + i, h);
#pragma GCC unroll 4
      for (int j = 0; j < 8; j += 2) {
        const __m256i two = load(w, 12 + 4 * j + i, h);
        if (h) fetch(next, 12 + 4 * i + j / 2);
        const __m256i bit0 = j < 4 ? left16(high, 4 - j) : right16(high, j - 4);
        const __m256i bit1 = j < 3 ? left16(high, 3 - j) : right16(high, j - 3);
        to->q[2 * (8 * j + i) + h] = _mm256_or_si256(_mm256_and_si256(two, nibble), _mm256_and_si256(bit0, fifth));
        to->q[2 * (8 * j + 8 + i) + h] =
            _mm256_or_si256(_mm256_and_si256(right16(two, 4), nibble), _mm256_and_si256(bit1, fifth));
      }
    }
}

/* Values 0..63 stand for -32..31: the kernels take 32 times the activations' sums off. */
static inline void decode_q6_k(columns *to) {
  const uint8_t *w = to->group, *next = to->next;
  const __m256i nibble = _mm256_set1_epi8(15), top = _mm256_set1_epi8(0x30);
  for (int h = 0; h < 2; h++) {
    to->d[h] = halves(w + 64 * 52 + 16 * h);
    for (int i = 0; i < 4; i++) {
      const __m256i s = load(w, 48 + i, h);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) to->scale[2 * (4 * i + j) + h] = signed_pairs_of(s, j);
      to->min[2 * (2 * i) + h] = signed_words_of(s, 0);
      to->min[2 * (2 * i + 1) + h] = signed_words_of(s, 1);
    }
  }
  for (int i = 0; i < 5; i++) fetch(next, 48 + i);
  for (int half = 0; half < 2; half++)
    for (int i = 0; i < 8; i++) {
      fetch(next, 24 * half + 3 * i);
      fetch(next, 24 * half + 3 * i + 1);
      fetch(next, 24 * half + 3 * i + 2);
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        const __m256i a = load(w, 16 * half + i, h), b = load(w, 16 * half + 8 + i, h);
        const __m256i c = load(w, 32 + 8 * half + i, h);
        __m256i *q = to->q + 2 * (32 * half + i) + h;
        q[0] = _mm256_or_si256(_mm256_and_si256(a, nibble), _mm256_and_si256(left16(c, 4), top));
        q[16] = _mm256_or_si256(_mm256_and_si256(b, nibble), _mm256_and_si256(left16(c, 2), top));
        q[32] = _mm256_or_si256(_mm256_and_si256(right16(a, 4), nibble), _mm256_and_si256(c, top));
        q[48] = _mm256_or_si256(_mm256_and_si256(right16(b, 4), nibble), _mm256_and_si256(right16(c, 2), top));
      }
    }
}

/* Bytes and nibbles are taken where they lie, by the kernels; 8 times the activations' sums come off for Q4_0. */
static inline void decode_d(columns *to, int64_t bytes) {
  for (int64_t b = 0; b < to->blocks; b++)
    for (int h = 0; h < 2; h++) to->d[2 * b + h] = halves(to->group + bytes * b + 16 * h);
}
static inline void decode_q8_0(columns *to) { decode_d(to, 16 * 34); }
static inline void decode_q4_0(columns *to) { decode_d(to, 16 * 18); }

/* Half h of unit i of turn o: two units to a byte; decoded, of eight and of four. */
#define NIBBLES(i, h) _mm256_and_si256(right16(load(w->group, 4 + 8 * o + (i) % 8, h), (i) / 8 * 4), nibble)
#define DECODED_8(i, h) w->q[2 * (8 * o + (i)) + h]
#define DECODED_4(i, h) w->q[2 * (4 * o + (i)) + h]

#define M 1
#define EACH(X) X(0)
#include "q8_tile_avx2.inc"
#define M 2
#define EACH(X) X(0) X(1)
#include "q8_tile_avx2.inc"
#define M 3
#define EACH(X) X(0) X(1) X(2)
#include "q8_tile_avx2.inc"
#define M 4
#define EACH(X) X(0) X(1) X(2) X(3)
#include "q8_tile_avx2.inc"
#define M 5
#define EACH(X) X(0) X(1) X(2) X(3) X(4)
#include "q8_tile_avx2.inc"

/* How many of `left` tokens meet the decoded columns at once. */
static inline int take(int left) { return left <= 5 ? left : left == 6 ? 3 : left == 8 ? 4 : 5; }

/* The tile of a type for any number of tokens, and functions for every number that there is. */
#define TILE(type, bytes, x_bytes)                                                                                 \
  static void type(float *y, const uint8_t *w0, const uint8_t *w1, const uint8_t *const *x, int64_t blocks,        \
                   const uint8_t *next, int tokens) {                                                              \
    const int64_t most = COLUMNS / ((x_bytes) == Q3N_Q8_X256_BYTES ? 256 : 32);                                    \
    columns w;                                                                                                     \
    w.next = next;                                                                                                 \
    for (int i = 0; i < 32 * tokens; i += 8) _mm256_storeu_ps(y + i, _mm256_setzero_ps());                         \
    for (int64_t b = 0; b < blocks; b += most) {                                                                   \
      w.blocks = blocks - b < most ? blocks - b : most;                                                            \
      for (int g = 0; g < 2; g++, w.next += w.blocks * 16 * (bytes)) {                                             \
        w.group = (g ? w1 : w0) + b * 16 * (bytes);                                                                \
        decode_##type(&w);                                                                                         \
        for (int m = 0, n; m < tokens; m += n) {                                                                   \
          n = take(tokens - m);                                                                                    \
          float *to = y + 32 * m + 16 * g;                                                                         \
          switch (n) {                                                                                             \
            case 1: type##_1(to, x + m, &w, b * (x_bytes)); break;                                                 \
            case 2: type##_2(to, x + m, &w, b * (x_bytes)); break;                                                 \
            case 3: type##_3(to, x + m, &w, b * (x_bytes)); break;                                                 \
            case 4: type##_4(to, x + m, &w, b * (x_bytes)); break;                                                 \
            default: type##_5(to, x + m, &w, b * (x_bytes)); break;                                                \
          }                                                                                                        \
        }                                                                                                          \
      }                                                                                                            \
    }                                                                                                              \
  }                                                                                                                \
  OF(type, 1) OF(type, 2) OF(type, 3) OF(type, 4) OF(type, 5) OF(type, 6) OF(type, 8) OF(type, 10)
#define OF(type, tokens)                                                                               \
  static void type##_of_##tokens(float *y, const uint8_t *w0, const uint8_t *w1, const uint8_t *const *x, \
                                 int64_t blocks, const uint8_t *next) {                                \
    type(y, w0, w1, x, blocks, next, tokens);                                                          \
  }

TILE(q4_k, 144, Q3N_Q8_X256_BYTES)
TILE(q5_k, 176, Q3N_Q8_X256_BYTES)
TILE(q6_k, 210, Q3N_Q8_X256_BYTES)
TILE(q8_0, 34, Q3N_Q8_X32_BYTES)
TILE(q4_0, 18, Q3N_Q8_X32_BYTES)

#define TILES(type) \
  {type##_of_1, type##_of_2, type##_of_3, type##_of_4, type##_of_5, type##_of_6, NULL, type##_of_8, NULL, type##_of_10}

q3n_q8_tile *q3n_q8_tile_avx2(q3n_dtype dtype, int64_t tokens) {
  static q3n_q8_tile *const tiles[5][10] = {TILES(q4_k), TILES(q5_k), TILES(q6_k), TILES(q8_0), TILES(q4_0)};
  switch (dtype) {
    case Q3N_Q4_K: return tiles[0][tokens - 1];
    case Q3N_Q5_K: return tiles[1][tokens - 1];
    case Q3N_Q6_K: return tiles[2][tokens - 1];
    case Q3N_Q8_0: return tiles[3][tokens - 1];
    case Q3N_Q4_0: return tiles[4][tokens - 1];
    default: return NULL;
  }
}
