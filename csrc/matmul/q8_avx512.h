/* What the integer products of tiles and of rows share on AVX-512. Static inline. */
#ifndef Q3N_MATMUL_Q8_AVX512_H
#define Q3N_MATMUL_Q8_AVX512_H

#include <immintrin.h>
#include <stddef.h>

#include "../quant/q8_activations.h"

/* Shifts by a number that gcc and clang both take as an int. */
typedef uint16_t words __attribute__((vector_size(64)));
typedef uint32_t dwords __attribute__((vector_size(64)));
typedef int32_t integers __attribute__((vector_size(64)));
static inline __m512i right16(__m512i v, int n) { return (__m512i)((words)v >> n); }
static inline __m512i left16(__m512i v, int n) { return (__m512i)((words)v << n); }
static inline __m512i right32(__m512i v, int n) { return (__m512i)((dwords)v >> n); }
static inline __m512i left32(__m512i v, int n) { return (__m512i)((dwords)v << n); }
static inline __m512i signed32(__m512i v, int n) { return (__m512i)((integers)v >> n); }

static inline __m512i load(const uint8_t *p) { return _mm512_loadu_si512(p); }

static inline __m512i broadcast(const uint8_t *p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  return _mm512_set1_epi32(four);
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

/* Sixteen f16 values. */
static inline __m512 halves(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline __m512 low_half(__m512i v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }
static inline __m512 high_half(__m512i v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(v, 16))); }
static inline __m512 negative(__m512 v) { return _mm512_xor_ps(v, _mm512_set1_ps(-0.0f)); }

/* Byte i of every row, as an integer. */
static inline __m512i byte_of(__m512i v, int i) {
  return _mm512_and_si512(right32(v, 8 * i), _mm512_set1_epi32(255));
}
static inline __m512i signed_byte_of(__m512i v, int i) {
  return signed32(left32(v, 24 - 8 * i), 24);
}
/* Bytes i and i + 2 of every row as 16-bit integers: the order in which the sums of the activations lie. */
static inline __m512i words_of(__m512i v, int i) {
  return _mm512_and_si512(right32(v, 8 * i), _mm512_set1_epi32(0x00ff00ff));
}
static inline __m512i signed_words_of(__m512i v, int i) {
  return _mm512_srai_epi16(i ? v : _mm512_slli_epi16(v, 8), 8);
}

/* Bit `at`, the same in all lanes, of every byte as the value 16. A rotation, or a shift by one count for the whole
   vector, would take a multiplier's turn on Zen 5. */
static inline __m512i fifth_bit(__m512i v, __m512i at) {
  return _mm512_and_si512(left16(_mm512_srlv_epi16(v, at), 4), _mm512_set1_epi8(16));
}

/* Bits `at` and at + 1 of every byte moved to bits 4 and 5; the others are noise. */
static inline __m512i bits_to_4(__m512i v, int at) {
  return at < 4 ? left16(v, 4 - at) : right16(v, at - 4);
}

/* The eight 6-bit scales and minima of 16 rows, a byte each (q3n_k_scale, q3n_k_min). */
typedef struct {
  __m512i scale[2], min[2];
} k_scales;

/* From bytes 0..3, 4..7 and 8..11 of the packed ones. */
static inline k_scales unpack_k_scales(__m512i a, __m512i b, __m512i c) {
  const __m512i six = _mm512_set1_epi8(63), four = _mm512_set1_epi8(15), top = _mm512_set1_epi8(0x30);
  k_scales s;
  s.scale[0] = _mm512_and_si512(a, six);
  s.min[0] = _mm512_and_si512(b, six);
  s.scale[1] = _mm512_or_si512(_mm512_and_si512(c, four), _mm512_and_si512(_mm512_srli_epi16(a, 2), top));
  s.min[1] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(c, 4), four),
                             _mm512_and_si512(_mm512_srli_epi16(b, 2), top));
  return s;
}

/* Out of a group: scales 2 pair and 2 pair + 1 of 16 rows, in bytes 0 and 1; minima of sub-blocks, two a row, in the
   order of words_of. */
static inline __m512i k_scales_of(const uint8_t *w, int pair) {
  const __m512i six = _mm512_set1_epi8(63), four = _mm512_set1_epi8(15), top = _mm512_set1_epi8(0x30);
  const __m512i a = load(w + 64);
  const __m512i scales = pair < 2 ? _mm512_and_si512(a, six)
                                  : _mm512_or_si512(_mm512_and_si512(load(w + 192), four),
                                                    _mm512_and_si512(_mm512_srli_epi16(a, 2), top));
  return _mm512_srl_epi32(scales, _mm_cvtsi32_si128(16 * (pair % 2)));
}
static inline __m512i k_mins(const uint8_t *w, int i) {
  const __m512i four = _mm512_set1_epi16(15), top = _mm512_set1_epi16(0x30), six = _mm512_set1_epi16(63);
  if (i < 2) return _mm512_and_si512(right32(load(w + 128), 8 * i), six);
  return _mm512_or_si512(_mm512_and_si512(right32(load(w + 192), 8 * i - 12), four),
                         _mm512_and_si512(right32(load(w + 128), 8 * i - 14), top));
}

#endif
