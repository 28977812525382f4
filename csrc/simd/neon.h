/* Advanced SIMD helpers for AArch64, where it is part of the base. Static inline only. q3n_v and q3n_d are the vectors that
   the bodies of several instruction sets are written over: avx512.h has the same names. */
#ifndef Q3N_SIMD_NEON_H
#define Q3N_SIMD_NEON_H

#include <arm_neon.h>
#include <stdint.h>

enum { Q3N_LANES = 4, Q3N_REGISTERS = 32 };
typedef float32x4_t q3n_v;
/* How many lanes, the first ones; 4 and more are all, 0 and less none. There are no loads under a mask. */
typedef int64_t q3n_v_mask;

/* The first n of four elements, 0 < n < 4, the others 0; nothing past them is read. By lanes: a call in a loop would take
   its constants out of the registers. */
static inline float32x4_t q3n_load_first(const float *x, int64_t n) {
  float32x4_t v = vld1q_lane_f32(x, vdupq_n_f32(0.0f), 0);
  if (n > 1) v = vld1q_lane_f32(x + 1, v, 1);
  if (n > 2) v = vld1q_lane_f32(x + 2, v, 2);
  return v;
}

/* Stores the first n of four elements, 0 < n < 4. */
static inline void q3n_store_first(float *y, int64_t n, float32x4_t x) {
  vst1q_lane_f32(y, x, 0);
  if (n > 1) vst1q_lane_f32(y + 1, x, 1);
  if (n > 2) vst1q_lane_f32(y + 2, x, 2);
}

/* Four elements, or those that are left of n from i on. */
static inline float32x4_t q3n_load_upto(const float *x, int64_t i, int64_t n) {
  return n - i >= 4 ? vld1q_f32(x + i) : q3n_load_first(x + i, n - i);
}

static inline void q3n_store_upto(float *y, int64_t i, int64_t n, float32x4_t x) {
  if (n - i >= 4)
    vst1q_f32(y + i, x);
  else
    q3n_store_first(y + i, n - i, x);
}

static inline q3n_v_mask q3n_v_first(int64_t n) { return n; }

static inline q3n_v q3n_v_zero(void) { return vdupq_n_f32(0.0f); }
static inline q3n_v q3n_v_set(float x) { return vdupq_n_f32(x); }
static inline q3n_v q3n_v_load(const float *p) { return vld1q_f32(p); }
static inline void q3n_v_store(float *p, q3n_v x) { vst1q_f32(p, x); }
/* Only the lanes of the mask are touched in memory; the others load as 0. */
static inline q3n_v q3n_v_load_some(q3n_v_mask m, const float *p) {
  return m > 0 ? q3n_load_upto(p, 0, m) : vdupq_n_f32(0.0f);
}
static inline void q3n_v_store_some(float *p, q3n_v_mask m, q3n_v x) {
  if (m > 0) q3n_store_upto(p, 0, m, x);
}
/* x in a register. */
static inline q3n_v q3n_v_keep(q3n_v x) {
  __asm__ volatile("" : "+w"(x));
  return x;
}
/* A vector, or the `left` > 0 lanes that are left of a row. */
static inline q3n_v q3n_v_load_upto(const float *p, int64_t left) { return q3n_load_upto(p, 0, left); }
static inline void q3n_v_store_upto(float *p, int64_t left, q3n_v x) { q3n_store_upto(p, 0, left, x); }
static inline q3n_v q3n_v_add(q3n_v x, q3n_v y) { return vaddq_f32(x, y); }
static inline q3n_v q3n_v_mul(q3n_v x, q3n_v y) { return vmulq_f32(x, y); }
/* x y + z and z - x y. */
static inline q3n_v q3n_v_fma(q3n_v x, q3n_v y, q3n_v z) { return vfmaq_f32(z, x, y); }
static inline q3n_v q3n_v_nfma(q3n_v x, q3n_v y, q3n_v z) { return vfmsq_f32(z, x, y); }

/* The sums of four vectors, each in the same order. */
static inline float32x4_t q3n_sum4x4(float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d) {
  return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
}
static inline void q3n_v_sum4(float *y, q3n_v a, q3n_v b, q3n_v c, q3n_v d) { vst1q_f32(y, q3n_sum4x4(a, b, c, d)); }

/* Rows become columns. */
static inline void q3n_v_transpose(q3n_v x[4]) {
  const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(x[0], x[1])), b = vreinterpretq_f64_f32(vtrn2q_f32(x[0], x[1]));
  const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(x[2], x[3])), d = vreinterpretq_f64_f32(vtrn2q_f32(x[2], x[3]));
  x[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
  x[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
  x[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
  x[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
}
/* Of 4 vectors that hold 4 rows of 4, vector i becomes column i. */
static inline void q3n_v_deal4(q3n_v x[4]) { q3n_v_transpose(x); }

/* e^x within 1 unit in the last place (0.98 over a sample of all floats); 1 at 0, 0 below -104, infinity above 88.7, NaN of NaN. With n the integer next to
   x / ln 2: 2^n e^r, where e^r = 1 + r + r^2 q(r), q of degree 4 with the least largest relative error. */
static inline float32x4_t q3n_exp4(float32x4_t x) {
  /* so that both halves of n below are exponents; beyond, the result is 0 or infinity all the same */
  x = vminq_f32(vmaxq_f32(x, vdupq_n_f32(-150.0f)), vdupq_n_f32(130.0f));
  const float32x4_t n = vrndnq_f32(vmulq_f32(x, vdupq_n_f32(1.44269504f)));
  /* ln 2 in two parts, the first with zeros at its end: its product with n is exact */
  float32x4_t r = vfmsq_f32(x, n, vdupq_n_f32(0x1.62e4p-1f));
  r = vfmsq_f32(r, n, vdupq_n_f32(0x1.7f7d1cp-20f));
  float32x4_t q = vdupq_n_f32(0x1.6a2434p-10f);
  q = vfmaq_f32(vdupq_n_f32(0x1.1239e2p-7f), q, r);
  q = vfmaq_f32(vdupq_n_f32(0x1.5558f2p-5f), q, r);
  q = vfmaq_f32(vdupq_n_f32(0x1.555492p-3f), q, r);
  q = vfmaq_f32(vdupq_n_f32(0x1.fffffcp-2f), q, r);
  const float32x4_t e = vaddq_f32(vdupq_n_f32(1.0f), vfmaq_f32(r, vmulq_f32(r, r), q));
  /* 2^n in two factors: one alone would not reach the subnormals. Only the last product rounds. */
  const int32x4_t whole = vcvtq_s32_f32(n), half = vshrq_n_s32(whole, 1), bias = vdupq_n_s32(127);
  const float32x4_t first = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, bias), 23));
  const float32x4_t second = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vsubq_s32(whole, half), bias), 23));
  return vmulq_f32(vmulq_f32(e, first), second);
}

/* x / (1 + e^-x). */
static inline float32x4_t q3n_silu4(float32x4_t x) {
  return vdivq_f32(x, vaddq_f32(vdupq_n_f32(1.0f), q3n_exp4(vnegq_f32(x))));
}
static inline q3n_v q3n_v_silu(q3n_v x) { return q3n_silu4(x); }

/* Doubles: the lower and the upper half of a vector of floats, and back. */
enum { Q3N_D_LANES = 2 };
typedef float64x2_t q3n_d;

static inline q3n_d q3n_d_low(q3n_v x) { return vcvt_f64_f32(vget_low_f32(x)); }
static inline q3n_d q3n_d_high(q3n_v x) { return vcvt_high_f64_f32(x); }
static inline q3n_v q3n_d_join(q3n_d low, q3n_d high) { return vcvt_high_f32_f64(vcvt_f32_f64(low), high); }
static inline q3n_d q3n_d_set(double x) { return vdupq_n_f64(x); }
static inline q3n_d q3n_d_load(const double *p) { return vld1q_f64(p); }
static inline q3n_d q3n_d_add(q3n_d x, q3n_d y) { return vaddq_f64(x, y); }
static inline q3n_d q3n_d_mul(q3n_d x, q3n_d y) { return vmulq_f64(x, y); }
/* x y + z and z - x y. */
static inline q3n_d q3n_d_fma(q3n_d x, q3n_d y, q3n_d z) { return vfmaq_f64(z, x, y); }
static inline q3n_d q3n_d_nfma(q3n_d x, q3n_d y, q3n_d z) { return vfmsq_f64(z, x, y); }
static inline double q3n_d_sum(q3n_d x) { return vaddvq_f64(x); }
static inline q3n_d q3n_d_round(q3n_d x) { return vrndnq_f64(x); }
/* y where the whole number n, of at most 31 bits, is odd, else x. */
static inline q3n_d q3n_d_if_odd(q3n_d n, q3n_d x, q3n_d y) {
  return vbslq_f64(vtstq_s64(vcvtq_s64_f64(n), vdupq_n_s64(1)), y, x);
}
/* -x where bit 1 of the whole number n, of at most 31 bits, is set, else x. */
static inline q3n_d q3n_d_negate_if_2(q3n_d n, q3n_d x) {
  const uint64x2_t bit = vandq_u64(vreinterpretq_u64_s64(vcvtq_s64_f64(n)), vdupq_n_u64(2));
  return vreinterpretq_f64_u64(veorq_u64(vreinterpretq_u64_f64(x), vshlq_n_u64(bit, 62)));
}

#endif
