/* 16-bit floats to and from f32 in portable C. Static inline and free of branches, so that loops over them
   vectorise. */
#ifndef Q3N_BASE_HALF_H
#define Q3N_BASE_HALF_H

#include <stdint.h>
#include <string.h>

static inline uint32_t q3n_float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

static inline float q3n_bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

/* if_true where c is 1, if_false where it is 0, by masks: a conditional over floats would keep loops scalar. */
static inline uint32_t q3n_select(int c, uint32_t if_true, uint32_t if_false) {
  const uint32_t mask = 0u - (uint32_t)c;
  return (if_true & mask) | (if_false & ~mask);
}

/* A 16-bit value at any address. */
static inline uint16_t q3n_load_u16(const void *p) {
  uint16_t v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline void q3n_store_u16(void *p, uint16_t v) { memcpy(p, &v, sizeof v); }

/* Exact; a NaN keeps sign and payload. No f32 subnormal appears on the way, so flush-to-zero modes change nothing. */
static inline float q3n_f16_to_f32(uint16_t h) {
  const uint32_t m = h & 0x7fffu;
  const uint32_t rebias = (m << 13) + (112u << 23);
  /* below 2^-14 the value is m 2^-24, and 2^-24 is the spacing of floats in [0.5, 1) */
  const uint32_t tiny = q3n_float_bits(q3n_bits_float(0x3f000000u + m) - 0.5f);
  const uint32_t finite = q3n_select(m < 0x400u, tiny, rebias);
  return q3n_bits_float(q3n_select(m < 0x7c00u, finite, rebias + (112u << 23)) | (uint32_t)(h & 0x8000u) << 16);
}

/* To nearest, ties to even; from 65520 on infinity; a NaN stays a (quiet) NaN. */
static inline uint16_t q3n_f32_to_f16(float x) {
  const uint32_t u = q3n_float_bits(x), a = u & 0x7fffffffu;
  const uint32_t normal = (a - (112u << 23) + 0xfffu + (a >> 13 & 1u)) >> 13;
  /* the addition rounds to multiples of 2^-24; larger a do not use it and must not disturb it */
  const uint32_t tiny = q3n_float_bits(q3n_bits_float(q3n_select(a < 0x38800000u, a, 0u)) + 0.5f) - 0x3f000000u;
  const uint32_t nan = 0x7e00u | (a >> 13 & 0x3ffu);
  const uint32_t finite = q3n_select(a < 0x38800000u, tiny, normal);
  const uint32_t big = q3n_select(a > 0x7f800000u, nan, 0x7c00u);
  return (uint16_t)(q3n_select(a < 0x477ff000u, finite, big) | (u >> 16 & 0x8000u));
}

static inline float q3n_bf16_to_f32(uint16_t h) { return q3n_bits_float((uint32_t)h << 16); }

/* To nearest, ties to even; past the largest bf16 infinity; a NaN stays a (quiet) NaN. */
static inline uint16_t q3n_f32_to_bf16(float x) {
  const uint32_t u = q3n_float_bits(x);
  const uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16, nan = u >> 16 | 0x40u;
  return (uint16_t)q3n_select((u & 0x7fffffffu) > 0x7f800000u, nan, rounded);
}

#endif
