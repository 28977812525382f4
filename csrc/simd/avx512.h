/* AVX-512 helpers. Static inline only: this header is included by files that are compiled for AVX-512. Names that begin
   with q3n_v_ mean the same in avx2.h, so that a kernel can be written once over both. */
#ifndef Q3N_SIMD_AVX512_H
#define Q3N_SIMD_AVX512_H

#include <immintrin.h>
#include <stdint.h>

enum { Q3N_LANES = 16, Q3N_REGISTERS = 32 };
typedef __m512 q3n_v;
typedef __mmask16 q3n_v_mask;

/* The mask of the present ones among elements 16 i .. 16 i + 15 of a row of n. */
static inline __mmask16 q3n_mask16(int64_t n, int64_t i) {
  const int64_t left = n - 16 * i;
  return left >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << left) - 1);
}

/* The first n lanes, n of any size. */
static inline q3n_v_mask q3n_v_first(int64_t n) {
  return n >= 16 ? (__mmask16)0xffff : n <= 0 ? (__mmask16)0 : (__mmask16)((1u << n) - 1);
}

static inline q3n_v q3n_v_zero(void) { return _mm512_setzero_ps(); }
static inline q3n_v q3n_v_set(float x) { return _mm512_set1_ps(x); }
static inline q3n_v q3n_v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void q3n_v_store(float *p, q3n_v x) { _mm512_storeu_ps(p, x); }
/* Only the lanes of the mask are touched in memory; the others load as 0. */
static inline q3n_v q3n_v_load_some(q3n_v_mask m, const float *p) { return _mm512_maskz_loadu_ps(m, p); }
static inline void q3n_v_store_some(float *p, q3n_v_mask m, q3n_v x) { _mm512_mask_storeu_ps(p, m, x); }
/* x in a register: of a vector that is used several times gcc would make as many operands in memory. */
static inline q3n_v q3n_v_keep(q3n_v x) {
  __asm__("" : "+v"(x));
  return x;
}
/* A vector, or the `left` > 0 lanes that are left of a row. */
static inline q3n_v q3n_v_load_upto(const float *p, int64_t left) { return q3n_v_load_some(q3n_v_first(left), p); }
static inline void q3n_v_store_upto(float *p, int64_t left, q3n_v x) { q3n_v_store_some(p, q3n_v_first(left), x); }
static inline q3n_v q3n_v_add(q3n_v x, q3n_v y) { return _mm512_add_ps(x, y); }
static inline q3n_v q3n_v_sub(q3n_v x, q3n_v y) { return _mm512_sub_ps(x, y); }
static inline q3n_v q3n_v_mul(q3n_v x, q3n_v y) { return _mm512_mul_ps(x, y); }
static inline q3n_v q3n_v_div(q3n_v x, q3n_v y) { return _mm512_div_ps(x, y); }
/* x y + z and z - x y. */
static inline q3n_v q3n_v_fma(q3n_v x, q3n_v y, q3n_v z) { return _mm512_fmadd_ps(x, y, z); }
static inline q3n_v q3n_v_nfma(q3n_v x, q3n_v y, q3n_v z) { return _mm512_fnmadd_ps(x, y, z); }
/* x where the mask is set, else y. */
static inline q3n_v q3n_v_select(q3n_v_mask m, q3n_v x, q3n_v y) { return _mm512_mask_blend_ps(m, y, x); }
/* The larger; y where either is NaN. */
static inline q3n_v q3n_v_max(q3n_v x, q3n_v y) { return _mm512_max_ps(x, y); }
/* The largest lane; no lane is NaN. */
static inline float q3n_v_largest(q3n_v x) { return _mm512_reduce_max_ps(x); }
/* Where x is not y: a NaN is not itself. */
static inline q3n_v_mask q3n_v_differs(q3n_v x, q3n_v y) { return _mm512_cmp_ps_mask(x, y, _CMP_NEQ_UQ); }
static inline q3n_v_mask q3n_v_finite(q3n_v x) {
  return _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
}
static inline q3n_v_mask q3n_v_both(q3n_v_mask m, q3n_v_mask n) { return m & n; }
/* Bit i is set where lane i is. */
static inline uint32_t q3n_v_bits(q3n_v_mask m) { return m; }
/* Numbers of other types, one after the other. */
static inline q3n_v q3n_v_load_f16(const uint16_t *p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
static inline q3n_v q3n_v_set_f16(uint16_t x) { return _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(x))); }
static inline q3n_v q3n_v_load_bf16(const uint16_t *p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline q3n_v q3n_v_load_i8(const int8_t *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
}
/* Lane i everywhere. */
static inline q3n_v q3n_v_lane(q3n_v x, int i) { return _mm512_permutexvar_ps(_mm512_set1_epi32(i), x); }
/* The lower and the upper half change places. */
static inline q3n_v q3n_v_swap(q3n_v x) { return _mm512_shuffle_f32x4(x, x, 0x4e); }

/* Lane i of the result is the sum of vector i: halves, quarters, pairs, for every i alike. */
static inline q3n_v q3n_v_sums(const q3n_v x[16]) {
  __m512 half[8], quarter[4], pair[2];
  for (int i = 0; i < 8; i++) {
    const __m512 a = x[i / 4 * 8 + i % 4], b = x[i / 4 * 8 + 4 + i % 4];
    half[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  for (int i = 0; i < 4; i++)
    quarter[i] = _mm512_add_ps(_mm512_shuffle_f32x4(half[i], half[4 + i], 0x88),
                               _mm512_shuffle_f32x4(half[i], half[4 + i], 0xdd));
  for (int i = 0; i < 2; i++) {
    const __m512 a = quarter[2 * i], b = quarter[2 * i + 1];
    pair[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }
  return _mm512_add_ps(_mm512_shuffle_ps(pair[0], pair[1], 0x88), _mm512_shuffle_ps(pair[0], pair[1], 0xdd));
}

/* The sum of the lanes, in the order of q3n_v_sums. */
static inline float q3n_v_sum(q3n_v x) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

/* y[0..3] = the sums of four vectors, each in the same order: halves, quarters, pairs. */
static inline void q3n_v_sum4(float *y, q3n_v a, q3n_v b, q3n_v c, q3n_v d) {
  const __m512 x[4] = {a, b, c, d};
  __m128 part[4];
  for (int i = 0; i < 4; i++) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x[i]), _mm512_extractf32x8_ps(x[i], 1));
    part[i] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  _mm_storeu_ps(y, _mm_hadd_ps(_mm_hadd_ps(part[0], part[1]), _mm_hadd_ps(part[2], part[3])));
}

/* Rows become columns. */
static inline void q3n_v_transpose(q3n_v x[16]) {
  __m512 y[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512 a = _mm512_unpacklo_ps(x[i], x[i + 1]), b = _mm512_unpackhi_ps(x[i], x[i + 1]);
    const __m512 c = _mm512_unpacklo_ps(x[i + 2], x[i + 3]), d = _mm512_unpackhi_ps(x[i + 2], x[i + 3]);
    y[i] = _mm512_shuffle_ps(a, c, 0x44);
    y[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    y[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    y[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; i++) {
    const __m512 a = _mm512_shuffle_f32x4(y[i], y[4 + i], 0x88), b = _mm512_shuffle_f32x4(y[8 + i], y[12 + i], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(y[i], y[4 + i], 0xdd), d = _mm512_shuffle_f32x4(y[8 + i], y[12 + i], 0xdd);
    x[i] = _mm512_shuffle_f32x4(a, b, 0x88);
    x[8 + i] = _mm512_shuffle_f32x4(a, b, 0xdd);
    x[4 + i] = _mm512_shuffle_f32x4(c, d, 0x88);
    x[12 + i] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
}

/* Of 4 vectors that hold 16 rows of 4, vector i becomes column i. */
static inline void q3n_v_deal4(q3n_v x[4]) {
  const __m512 a = _mm512_shuffle_f32x4(x[0], x[1], 0x88), b = _mm512_shuffle_f32x4(x[2], x[3], 0x88);
  const __m512 c = _mm512_shuffle_f32x4(x[0], x[1], 0xdd), d = _mm512_shuffle_f32x4(x[2], x[3], 0xdd);
  const __m512 r0 = _mm512_shuffle_f32x4(a, b, 0x88), r2 = _mm512_shuffle_f32x4(a, b, 0xdd);
  const __m512 r1 = _mm512_shuffle_f32x4(c, d, 0x88), r3 = _mm512_shuffle_f32x4(c, d, 0xdd);
  const __m512 e = _mm512_unpacklo_ps(r0, r1), f = _mm512_unpackhi_ps(r0, r1);
  const __m512 g = _mm512_unpacklo_ps(r2, r3), h = _mm512_unpackhi_ps(r2, r3);
  x[0] = _mm512_shuffle_ps(e, g, 0x44);
  x[1] = _mm512_shuffle_ps(e, g, 0xee);
  x[2] = _mm512_shuffle_ps(f, h, 0x44);
  x[3] = _mm512_shuffle_ps(f, h, 0xee);
}

/* e^x within 1 ulp, for subnormal results within half of the least number more; 0, infinity and NaN where they belong.
   x = n ln 2 + r with |r| <= ln 2 / 2, and e^r = 1 + r + r^2 q(r) with q minimax: off by 2^-28 of e^r. */
static inline q3n_v q3n_v_exp(q3n_v x) {
  /* The bounds stand first: with a NaN in x both return it. */
  x = _mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_max_ps(_mm512_set1_ps(-105.0f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p+0f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e4p-1f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.7f7d1cp-20f), r);
  __m512 q = _mm512_set1_ps(0x1.6a23cep-10f);
  q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0x1.123a2p-7f));
  q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0x1.5558f2p-5f));
  q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0x1.555492p-3f));
  q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0x1.fffffcp-2f));
  const __m512 e = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(r, r), q, r), _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(e, n);
}

/* x / (1 + e^-x) within 4 roundings: 2 of the exponential, one of the sum, one of the quotient. */
static inline q3n_v q3n_v_silu(q3n_v x) {
  const q3n_v e = q3n_v_exp(q3n_v_sub(q3n_v_zero(), x));
  return q3n_v_div(x, q3n_v_add(q3n_v_set(1.0f), e));
}

/* 1 / (1 + e^-x), as many. */
static inline q3n_v q3n_v_sigmoid(q3n_v x) {
  const q3n_v one = q3n_v_set(1.0f);
  return q3n_v_div(one, q3n_v_add(one, q3n_v_exp(q3n_v_sub(q3n_v_zero(), x))));
}

/* Doubles: the lower and the upper half of a vector of floats, and back. */
enum { Q3N_D_LANES = 8 };
typedef __m512d q3n_d;

static inline q3n_d q3n_d_low(q3n_v x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
static inline q3n_d q3n_d_high(q3n_v x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
static inline q3n_v q3n_d_join(q3n_d low, q3n_d high) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
}
static inline q3n_d q3n_d_set(double x) { return _mm512_set1_pd(x); }
static inline q3n_d q3n_d_load(const double *p) { return _mm512_loadu_pd(p); }
static inline q3n_d q3n_d_add(q3n_d x, q3n_d y) { return _mm512_add_pd(x, y); }
static inline q3n_d q3n_d_mul(q3n_d x, q3n_d y) { return _mm512_mul_pd(x, y); }
/* x y + z and z - x y. */
static inline q3n_d q3n_d_fma(q3n_d x, q3n_d y, q3n_d z) { return _mm512_fmadd_pd(x, y, z); }
static inline q3n_d q3n_d_nfma(q3n_d x, q3n_d y, q3n_d z) { return _mm512_fnmadd_pd(x, y, z); }
static inline double q3n_d_sum(q3n_d x) {
  const __m256d half = _mm256_add_pd(_mm512_castpd512_pd256(x), _mm512_extractf64x4_pd(x, 1));
  const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(half), _mm256_extractf128_pd(half, 1));
  return _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
}
static inline q3n_d q3n_d_round(q3n_d x) { return _mm512_roundscale_pd(x, 0); }
/* y where the whole number n, of at most 31 bits, is odd, else x. */
static inline q3n_d q3n_d_if_odd(q3n_d n, q3n_d x, q3n_d y) {
  const __mmask8 odd = _mm512_test_epi64_mask(_mm512_cvtpd_epi64(n), _mm512_set1_epi64(1));
  return _mm512_mask_blend_pd(odd, x, y);
}
/* -x where bit 1 of the whole number n, of at most 31 bits, is set, else x. */
static inline q3n_d q3n_d_negate_if_2(q3n_d n, q3n_d x) {
  const __m512i sign = _mm512_slli_epi64(_mm512_and_si512(_mm512_cvtpd_epi64(n), _mm512_set1_epi64(2)), 62);
  return _mm512_xor_pd(x, _mm512_castsi512_pd(sign));
}

#endif
