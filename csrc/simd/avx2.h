/* AVX2 and FMA helpers. Static inline only: this header is included by files that are compiled for them. Names that
   begin with q3n_v_ mean the same in avx512.h, so that a kernel can be written once over both. */
#ifndef Q3N_SIMD_AVX2_H
#define Q3N_SIMD_AVX2_H

#include <immintrin.h>
#include <stdint.h>

enum { Q3N_LANES = 8, Q3N_REGISTERS = 16 };
typedef __m256 q3n_v;
typedef __m256i q3n_v_mask;

/* The first n lanes, n of any size. */
static inline q3n_v_mask q3n_v_first(int64_t n) {
  const int lanes = n >= 8 ? 8 : n <= 0 ? 0 : (int)n;
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

static inline q3n_v q3n_v_zero(void) { return _mm256_setzero_ps(); }
static inline q3n_v q3n_v_set(float x) { return _mm256_set1_ps(x); }
static inline q3n_v q3n_v_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void q3n_v_store(float *p, q3n_v x) { _mm256_storeu_ps(p, x); }
/* Only the lanes of the mask are touched in memory; the others load as 0. */
static inline q3n_v q3n_v_load_some(q3n_v_mask m, const float *p) { return _mm256_maskload_ps(p, m); }
static inline void q3n_v_store_some(float *p, q3n_v_mask m, q3n_v x) {
#if defined(__has_feature)
#if __has_feature(memory_sanitizer)
  /* It does not know that maskstore writes. */
  for (int i = 0; i < 8; i++)
    if (((__v8si)m)[i]) p[i] = x[i];
  return;
#endif
#endif
  _mm256_maskstore_ps(p, m, x);
}
/* x in a register: of a vector that is used several times gcc would make as many operands in memory. */
static inline q3n_v q3n_v_keep(q3n_v x) {
  __asm__("" : "+x"(x));
  return x;
}
/* A vector, or the `left` > 0 lanes that are left of a row. */
static inline q3n_v q3n_v_load_upto(const float *p, int64_t left) {
  return left >= Q3N_LANES ? q3n_v_load(p) : q3n_v_load_some(q3n_v_first(left), p);
}
static inline void q3n_v_store_upto(float *p, int64_t left, q3n_v x) {
  if (left >= Q3N_LANES)
    q3n_v_store(p, x);
  else
    q3n_v_store_some(p, q3n_v_first(left), x);
}
static inline q3n_v q3n_v_add(q3n_v x, q3n_v y) { return _mm256_add_ps(x, y); }
static inline q3n_v q3n_v_sub(q3n_v x, q3n_v y) { return _mm256_sub_ps(x, y); }
static inline q3n_v q3n_v_mul(q3n_v x, q3n_v y) { return _mm256_mul_ps(x, y); }
static inline q3n_v q3n_v_div(q3n_v x, q3n_v y) { return _mm256_div_ps(x, y); }
/* x y + z and z - x y. */
static inline q3n_v q3n_v_fma(q3n_v x, q3n_v y, q3n_v z) { return _mm256_fmadd_ps(x, y, z); }
static inline q3n_v q3n_v_nfma(q3n_v x, q3n_v y, q3n_v z) { return _mm256_fnmadd_ps(x, y, z); }
/* x where the mask is set, else y. */
static inline q3n_v q3n_v_select(q3n_v_mask m, q3n_v x, q3n_v y) {
  return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(m));
}
/* The larger; y where either is NaN. */
static inline q3n_v q3n_v_max(q3n_v x, q3n_v y) { return _mm256_max_ps(x, y); }
/* The largest lane; no lane is NaN. */
static inline float q3n_v_largest(q3n_v x) {
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}
/* Where x is not y: a NaN is not itself. */
static inline q3n_v_mask q3n_v_differs(q3n_v x, q3n_v y) {
  return _mm256_castps_si256(_mm256_cmp_ps(x, y, _CMP_NEQ_UQ));
}
static inline q3n_v_mask q3n_v_finite(q3n_v x) {
  const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
  return _mm256_castps_si256(_mm256_cmp_ps(size, _mm256_set1_ps(__builtin_inff()), _CMP_LT_OQ));
}
static inline q3n_v_mask q3n_v_both(q3n_v_mask m, q3n_v_mask n) { return _mm256_and_si256(m, n); }
/* Bit i is set where lane i is. */
static inline uint32_t q3n_v_bits(q3n_v_mask m) { return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(m)); }
/* Numbers of other types, one after the other. */
static inline q3n_v q3n_v_load_f16(const uint16_t *p) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}
static inline q3n_v q3n_v_set_f16(uint16_t x) { return _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(x))); }
static inline q3n_v q3n_v_load_bf16(const uint16_t *p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline q3n_v q3n_v_load_i8(const int8_t *p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p)));
}
/* Lane i everywhere. */
static inline q3n_v q3n_v_lane(q3n_v x, int i) { return _mm256_permutevar8x32_ps(x, _mm256_set1_epi32(i)); }
/* The lower and the upper half change places. */
static inline q3n_v q3n_v_swap(q3n_v x) { return _mm256_permute2f128_ps(x, x, 1); }

/* Lane i of the result is the sum of vector i: halves, quarters, for every i alike. */
static inline q3n_v q3n_v_sums(const q3n_v x[8]) {
  __m256 half[4], quarter[2];
  for (int i = 0; i < 4; i++)
    half[i] = _mm256_add_ps(_mm256_permute2f128_ps(x[i], x[4 + i], 0x20), _mm256_permute2f128_ps(x[i], x[4 + i], 0x31));
  for (int i = 0; i < 2; i++) {
    const __m256 a = half[2 * i], b = half[2 * i + 1];
    quarter[i] = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  }
  return _mm256_add_ps(_mm256_shuffle_ps(quarter[0], quarter[1], 0x88),
                       _mm256_shuffle_ps(quarter[0], quarter[1], 0xdd));
}

/* The sum of the lanes, in the order of q3n_v_sums. */
static inline float q3n_v_sum(q3n_v x) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

/* y[0..3] = the sums of four vectors, each in the same order: halves, quarters, pairs. */
static inline void q3n_v_sum4(float *y, q3n_v a, q3n_v b, q3n_v c, q3n_v d) {
  const __m256 x[4] = {a, b, c, d};
  __m128 part[4];
  for (int i = 0; i < 4; i++) part[i] = _mm_add_ps(_mm256_castps256_ps128(x[i]), _mm256_extractf128_ps(x[i], 1));
  _mm_storeu_ps(y, _mm_hadd_ps(_mm_hadd_ps(part[0], part[1]), _mm_hadd_ps(part[2], part[3])));
}

/* Rows become columns. */
static inline void q3n_v_transpose(q3n_v x[8]) {
  __m256 y[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256 a = _mm256_unpacklo_ps(x[i], x[i + 1]), b = _mm256_unpackhi_ps(x[i], x[i + 1]);
    const __m256 c = _mm256_unpacklo_ps(x[i + 2], x[i + 3]), d = _mm256_unpackhi_ps(x[i + 2], x[i + 3]);
    y[i] = _mm256_shuffle_ps(a, c, 0x44);
    y[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    y[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    y[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; i++) {
    x[i] = _mm256_permute2f128_ps(y[i], y[4 + i], 0x20);
    x[4 + i] = _mm256_permute2f128_ps(y[i], y[4 + i], 0x31);
  }
}

/* Of 4 vectors that hold 8 rows of 4, vector i becomes column i. */
static inline void q3n_v_deal4(q3n_v x[4]) {
  const __m256 r0 = _mm256_permute2f128_ps(x[0], x[2], 0x20), r1 = _mm256_permute2f128_ps(x[0], x[2], 0x31);
  const __m256 r2 = _mm256_permute2f128_ps(x[1], x[3], 0x20), r3 = _mm256_permute2f128_ps(x[1], x[3], 0x31);
  const __m256 e = _mm256_unpacklo_ps(r0, r1), f = _mm256_unpackhi_ps(r0, r1);
  const __m256 g = _mm256_unpacklo_ps(r2, r3), h = _mm256_unpackhi_ps(r2, r3);
  x[0] = _mm256_shuffle_ps(e, g, 0x44);
  x[1] = _mm256_shuffle_ps(e, g, 0xee);
  x[2] = _mm256_shuffle_ps(f, h, 0x44);
  x[3] = _mm256_shuffle_ps(f, h, 0xee);
}

/* e^x within 1 ulp, for subnormal results within half of the least number more; 0, infinity and NaN where they belong.
   x = n ln 2 + r with |r| <= ln 2 / 2, and e^r = 1 + r + r^2 q(r) with q minimax: off by 2^-28 of e^r. */
static inline q3n_v q3n_v_exp(q3n_v x) {
  /* The bounds stand first: with a NaN in x both return it. */
  x = _mm256_min_ps(_mm256_set1_ps(89.0f), _mm256_max_ps(_mm256_set1_ps(-105.0f), x));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(0x1.715476p+0f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.62e4p-1f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.7f7d1cp-20f), r);
  __m256 q = _mm256_set1_ps(0x1.6a23cep-10f);
  q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(0x1.123a2p-7f));
  q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(0x1.5558f2p-5f));
  q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(0x1.555492p-3f));
  q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(0x1.fffffcp-2f));
  const __m256 e = _mm256_add_ps(_mm256_fmadd_ps(_mm256_mul_ps(r, r), q, r), _mm256_set1_ps(1.0f));
  /* 2^n in two factors, as n reaches -151 and 128: the first product is exact, the second rounds once. */
  const __m256i whole = _mm256_cvtps_epi32(n), low = _mm256_srai_epi32(whole, 1), high = _mm256_sub_epi32(whole, low);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(low, bias), 23));
  const __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(high, bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(e, first), second);
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
enum { Q3N_D_LANES = 4 };
typedef __m256d q3n_d;

static inline q3n_d q3n_d_low(q3n_v x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
static inline q3n_d q3n_d_high(q3n_v x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
static inline q3n_v q3n_d_join(q3n_d low, q3n_d high) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(low)), _mm256_cvtpd_ps(high), 1);
}
static inline q3n_d q3n_d_set(double x) { return _mm256_set1_pd(x); }
static inline q3n_d q3n_d_load(const double *p) { return _mm256_loadu_pd(p); }
static inline q3n_d q3n_d_add(q3n_d x, q3n_d y) { return _mm256_add_pd(x, y); }
static inline q3n_d q3n_d_mul(q3n_d x, q3n_d y) { return _mm256_mul_pd(x, y); }
/* x y + z and z - x y. */
static inline q3n_d q3n_d_fma(q3n_d x, q3n_d y, q3n_d z) { return _mm256_fmadd_pd(x, y, z); }
static inline q3n_d q3n_d_nfma(q3n_d x, q3n_d y, q3n_d z) { return _mm256_fnmadd_pd(x, y, z); }
static inline double q3n_d_sum(q3n_d x) {
  const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
  return _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
}
static inline q3n_d q3n_d_round(q3n_d x) {
  return _mm256_round_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* y where the whole number n, of at most 31 bits, is odd, else x. */
static inline q3n_d q3n_d_if_odd(q3n_d n, q3n_d x, q3n_d y) {
  const __m256i bits = _mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n));
  return _mm256_blendv_pd(x, y, _mm256_castsi256_pd(_mm256_slli_epi64(bits, 63)));
}
/* -x where bit 1 of the whole number n, of at most 31 bits, is set, else x. */
static inline q3n_d q3n_d_negate_if_2(q3n_d n, q3n_d x) {
  const __m256i bits = _mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n));
  const __m256i sign = _mm256_slli_epi64(_mm256_and_si256(bits, _mm256_set1_epi64x(2)), 62);
  return _mm256_xor_pd(x, _mm256_castsi256_pd(sign));
}

#endif
