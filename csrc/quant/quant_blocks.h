/* How blocks lie in memory, and rows of them to f32. Static inline: every room compiles it with its own ISA flags.
   All members are bytes: blocks come from files and may start at any address. */
#ifndef Q3N_QUANT_BLOCKS_H
#define Q3N_QUANT_BLOCKS_H

#include "../base/dtype.h"
#include "../base/half.h"
#include "q8_activations.h"

typedef struct q3n_block_q8_0 {
  uint8_t d[2];  /* f16 scale */
  int8_t q[32];  /* x = d q */
} q3n_block_q8_0;

typedef struct q3n_block_q4_0 {
  uint8_t d[2];
  uint8_t q[16]; /* x = d (q - 8); elements 0..15 in the low nibbles, 16..31 in the high ones */
} q3n_block_q4_0;

typedef struct q3n_block_q4_1 {
  uint8_t d[2], m[2];
  uint8_t q[16]; /* x = d q + m; nibbles as in q4_0, also below */
} q3n_block_q4_1;

typedef struct q3n_block_q5_0 {
  uint8_t d[2];
  uint8_t high[4]; /* bit i of these 32: the fifth bit of element i */
  uint8_t q[16];   /* x = d (q - 16) */
} q3n_block_q5_0;

typedef struct q3n_block_q5_1 {
  uint8_t d[2], m[2];
  uint8_t high[4];
  uint8_t q[16]; /* x = d q + m */
} q3n_block_q5_1;

typedef struct q3n_block_iq4_nl {
  uint8_t d[2];
  uint8_t q[16]; /* x = d q3n_iq4_levels[q] */
} q3n_block_iq4_nl;

typedef struct q3n_block_mxfp4 {
  uint8_t e;     /* scale 2^(e - 128) */
  uint8_t q[16]; /* x = scale q3n_mxfp4_levels[q] */
} q3n_block_mxfp4;

/* Sixteen sub-blocks of 16: x = (d scale_j) q - (dmin min_j). */
typedef struct q3n_block_q2_k {
  uint8_t scales[16]; /* scale in the low nibble, minimum in the high one */
  uint8_t q[64];      /* per half of 128: 32 bytes; bits 2i and 2i+1 belong to elements 32i..32i+31 */
  uint8_t d[2], dmin[2];
} q3n_block_q2_k;

/* Sixteen sub-blocks of 16: x = (d (scale_j - 32)) (q - 4). */
typedef struct q3n_block_q3_k {
  uint8_t high[32]; /* bit j: the third bit of elements 32j..32j+31 */
  uint8_t low[64];  /* as the q of q2_k */
  uint8_t scales[12]; /* sixteen of 6 bits, see q3n_q3_scale */
  uint8_t d[2];
} q3n_block_q3_k;

/* Eight sub-blocks of 32: x = (d (scale_j - 32)) q3n_iq4_levels[q]. */
typedef struct q3n_block_iq4_xs {
  uint8_t d[2];
  uint8_t scales_high[2]; /* bits 2j and 2j+1 of the 16-bit number: the high bits of scale j */
  uint8_t scales_low[4];  /* nibble j: its low bits */
  uint8_t q[128];         /* 16 bytes a sub-block, nibbles as in q4_0 */
} q3n_block_iq4_xs;

/* Eight sub-blocks of 32: x = (d scale_j) q - (dmin min_j). */
typedef struct q3n_block_q4_k {
  uint8_t d[2], dmin[2];
  uint8_t scales[12]; /* eight 6-bit scales and minima, see q3n_k_scale and q3n_k_min */
  uint8_t q[128];     /* sub-blocks 2i and 2i+1 share 32 bytes: low nibbles, high nibbles */
} q3n_block_q4_k;

typedef struct q3n_block_q5_k {
  uint8_t d[2], dmin[2];
  uint8_t scales[12];
  uint8_t high[32]; /* bit j: the fifth bit of sub-block j */
  uint8_t q[128];
} q3n_block_q5_k;

/* Sixteen sub-blocks of 16: x = (d scale_j) (q - 32). */
typedef struct q3n_block_q6_k {
  uint8_t low[128]; /* per half of 128: 64 bytes; elements 0..63 in the low nibbles, 64..127 in the high ones */
  uint8_t high[64]; /* per half: 32 bytes; bits 2i and 2i+1 belong to elements 32i..32i+31 */
  int8_t scales[16];
  uint8_t d[2];
} q3n_block_q6_k;

static inline float q3n_block_f16(const uint8_t p[2]) { return q3n_f16_to_f32(q3n_load_u16(p)); }

/* The first four of each have their own byte; the others are split over a nibble of bytes 8..11 and the two top bits
   of bytes 0..7. */
static inline int q3n_k_scale(const uint8_t s[12], int j) {
  return j < 4 ? s[j] & 63 : (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
}

static inline int q3n_k_min(const uint8_t s[12], int j) {
  return j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | s[j] >> 6 << 4;
}

/* The low nibbles of the sixteen lie in bytes 0..7 (low halves first), the two high bits in bytes 8..11. */
static inline int q3n_q3_scale(const uint8_t s[12], int j) {
  return (s[j % 8] >> j / 8 * 4 & 15) | (s[8 + j % 4] >> j / 4 * 2 & 3) << 4;
}

static inline int q3n_iq4_xs_scale(const q3n_block_iq4_xs *b, int j) {
  return (b->scales_low[j / 2] >> j % 2 * 4 & 15) | (q3n_load_u16(b->scales_high) >> 2 * j & 3) << 4;
}

static const int8_t q3n_iq4_levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* Twice the values of an e2m1 float, so that they are whole. */
static const int8_t q3n_mxfp4_levels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/* 2^(e - 128); for e below 2 an f32 subnormal. No exponent is a NaN, as in ggml. */
static inline float q3n_mxfp4_scale(uint8_t e) {
  return q3n_bits_float(e < 2 ? 0x00200000u << e : (uint32_t)(e - 1) << 23);
}

static inline void q3n_q8_0_to_float(const q3n_block_q8_0 *b, float *restrict y) {
  const float d = q3n_block_f16(b->d);
  for (int i = 0; i < 32; i++) y[i] = d * (float)b->q[i];
}

static inline void q3n_q4_0_to_float(const q3n_block_q4_0 *b, float *restrict y) {
  const float d = q3n_block_f16(b->d);
  for (int i = 0; i < 16; i++) y[i] = d * (float)((b->q[i] & 15) - 8);
  for (int i = 0; i < 16; i++) y[16 + i] = d * (float)((b->q[i] >> 4) - 8);
}

static inline void q3n_q4_1_to_float(const q3n_block_q4_1 *b, float *restrict y) {
  const float d = q3n_block_f16(b->d), m = q3n_block_f16(b->m);
  for (int i = 0; i < 16; i++) y[i] = d * (float)(b->q[i] & 15) + m;
  for (int i = 0; i < 16; i++) y[16 + i] = d * (float)(b->q[i] >> 4) + m;
}

static inline void q3n_q5_0_to_float(const q3n_block_q5_0 *b, float *restrict y) {
  const float d = q3n_block_f16(b->d);
  for (int i = 0; i < 16; i++) y[i] = d * (float)(((b->q[i] & 15) | (b->high[i / 8] >> i % 8 & 1) << 4) - 16);
  for (int i = 0; i < 16; i++)
    y[16 + i] = d * (float)((b->q[i] >> 4 | (b->high[2 + i / 8] >> i % 8 & 1) << 4) - 16);
}

static inline void q3n_q5_1_to_float(const q3n_block_q5_1 *b, float *restrict y) {
  const float d = q3n_block_f16(b->d), m = q3n_block_f16(b->m);
  for (int i = 0; i < 16; i++) y[i] = d * (float)((b->q[i] & 15) | (b->high[i / 8] >> i % 8 & 1) << 4) + m;
  for (int i = 0; i < 16; i++)
    y[16 + i] = d * (float)(b->q[i] >> 4 | (b->high[2 + i / 8] >> i % 8 & 1) << 4) + m;
}

static inline void q3n_iq4_nl_to_float(const q3n_block_iq4_nl *b, float *restrict y) {
  const float d = q3n_block_f16(b->d);
  for (int i = 0; i < 16; i++) y[i] = d * (float)q3n_iq4_levels[b->q[i] & 15];
  for (int i = 0; i < 16; i++) y[16 + i] = d * (float)q3n_iq4_levels[b->q[i] >> 4];
}

static inline void q3n_mxfp4_to_float(const q3n_block_mxfp4 *b, float *restrict y) {
  const float d = q3n_mxfp4_scale(b->e);
  for (int i = 0; i < 16; i++) y[i] = d * (float)q3n_mxfp4_levels[b->q[i] & 15];
  for (int i = 0; i < 16; i++) y[16 + i] = d * (float)q3n_mxfp4_levels[b->q[i] >> 4];
}

static inline void q3n_q2_k_to_float(const q3n_block_q2_k *b, float *restrict y) {
  const float d = q3n_block_f16(b->d), dmin = q3n_block_f16(b->dmin);
  for (int j = 0; j < 16; j++) {
    const float scale = d * (float)(b->scales[j] & 15), min = dmin * (float)(b->scales[j] >> 4);
    const uint8_t *q = b->q + 32 * (j / 8) + j % 2 * 16;
    const int shift = j / 2 % 4 * 2;
    for (int i = 0; i < 16; i++) y[16 * j + i] = scale * (float)(q[i] >> shift & 3) - min;
  }
}

static inline void q3n_q3_k_to_float(const q3n_block_q3_k *b, float *restrict y) {
  const float d = q3n_block_f16(b->d);
  for (int j = 0; j < 16; j++) {
    const float scale = d * (float)(q3n_q3_scale(b->scales, j) - 32);
    const uint8_t *low = b->low + 32 * (j / 8) + j % 2 * 16, *high = b->high + j % 2 * 16;
    const int shift = j / 2 % 4 * 2;
    for (int i = 0; i < 16; i++)
      y[16 * j + i] = scale * (float)(((low[i] >> shift & 3) | (high[i] >> j / 2 & 1) << 2) - 4);
  }
}

static inline void q3n_iq4_xs_to_float(const q3n_block_iq4_xs *b, float *restrict y) {
  const float d = q3n_block_f16(b->d);
  for (int j = 0; j < 8; j++) {
    const float scale = d * (float)(q3n_iq4_xs_scale(b, j) - 32);
    const uint8_t *q = b->q + 16 * j;
    for (int i = 0; i < 16; i++) y[32 * j + i] = scale * (float)q3n_iq4_levels[q[i] & 15];
    for (int i = 0; i < 16; i++) y[32 * j + 16 + i] = scale * (float)q3n_iq4_levels[q[i] >> 4];
  }
}

static inline void q3n_q4_k_to_float(const q3n_block_q4_k *b, float *restrict y) {
  const float d = q3n_block_f16(b->d), dmin = q3n_block_f16(b->dmin);
  for (int j = 0; j < 8; j++) {
    const float scale = d * (float)q3n_k_scale(b->scales, j), min = dmin * (float)q3n_k_min(b->scales, j);
    const uint8_t *q = b->q + j / 2 * 32;
    const int shift = j % 2 * 4;
    for (int i = 0; i < 32; i++) y[32 * j + i] = scale * (float)(q[i] >> shift & 15) - min;
  }
}

static inline void q3n_q5_k_to_float(const q3n_block_q5_k *b, float *restrict y) {
  const float d = q3n_block_f16(b->d), dmin = q3n_block_f16(b->dmin);
  for (int j = 0; j < 8; j++) {
    const float scale = d * (float)q3n_k_scale(b->scales, j), min = dmin * (float)q3n_k_min(b->scales, j);
    const uint8_t *q = b->q + j / 2 * 32;
    const int shift = j % 2 * 4;
    for (int i = 0; i < 32; i++)
      y[32 * j + i] = scale * (float)((q[i] >> shift & 15) | (b->high[i] >> j & 1) << 4) - min;
  }
}

static inline void q3n_q6_k_to_float(const q3n_block_q6_k *b, float *restrict y) {
  const float d = q3n_block_f16(b->d);
  for (int j = 0; j < 16; j++) {
    const float scale = d * (float)b->scales[j];
    const int half = j / 8, quarter = j / 2 % 4, first = j % 2 * 16;
    const uint8_t *low = b->low + 64 * half + quarter % 2 * 32 + first, *high = b->high + 32 * half + first;
    const int low_shift = quarter / 2 * 4, high_shift = quarter * 2;
    for (int i = 0; i < 16; i++)
      y[16 * j + i] = scale * (float)(((low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4) - 32);
  }
}

/* Activations lie 4-byte aligned. */
static inline void q3n_q8_x32_to_float(const void *src, float *restrict y, int64_t n) {
  const q3n_block_q8_x32 *b = (const q3n_block_q8_x32 *)src;
  for (int64_t i = 0; i < n; i++) y[i] = b[i / 32].d * (float)b[i / 32].q[i % 32];
}

static inline void q3n_q8_x256_to_float(const void *src, float *restrict y, int64_t n) {
  const q3n_block_q8_x256 *b = (const q3n_block_q8_x256 *)src;
  for (int64_t i = 0; i < n; i++) y[i] = b[i / 256].d * (float)b[i / 256].q[i % 256];
}

/* n elements of dtype from src (any address) to f32; n a multiple of the dtype's block. */
static inline void q3n_row_to_float(q3n_dtype dtype, const void *src, float *restrict y, int64_t n) {
  const uint8_t *p = (const uint8_t *)src;
  switch (dtype) {
    case Q3N_F32: memcpy(y, p, (size_t)n * sizeof *y); return;
    case Q3N_F16:
      for (int64_t i = 0; i < n; i++) y[i] = q3n_f16_to_f32(q3n_load_u16(p + 2 * i));
      return;
    case Q3N_BF16:
      for (int64_t i = 0; i < n; i++) y[i] = q3n_bf16_to_f32(q3n_load_u16(p + 2 * i));
      return;
    case Q3N_Q8_0:
      for (int64_t i = 0; i < n / 32; i++) q3n_q8_0_to_float((const q3n_block_q8_0 *)src + i, y + 32 * i);
      return;
    case Q3N_Q4_0:
      for (int64_t i = 0; i < n / 32; i++) q3n_q4_0_to_float((const q3n_block_q4_0 *)src + i, y + 32 * i);
      return;
    case Q3N_Q4_1:
      for (int64_t i = 0; i < n / 32; i++) q3n_q4_1_to_float((const q3n_block_q4_1 *)src + i, y + 32 * i);
      return;
    case Q3N_Q5_0:
      for (int64_t i = 0; i < n / 32; i++) q3n_q5_0_to_float((const q3n_block_q5_0 *)src + i, y + 32 * i);
      return;
    case Q3N_Q5_1:
      for (int64_t i = 0; i < n / 32; i++) q3n_q5_1_to_float((const q3n_block_q5_1 *)src + i, y + 32 * i);
      return;
    case Q3N_IQ4_NL:
      for (int64_t i = 0; i < n / 32; i++) q3n_iq4_nl_to_float((const q3n_block_iq4_nl *)src + i, y + 32 * i);
      return;
    case Q3N_MXFP4:
      for (int64_t i = 0; i < n / 32; i++) q3n_mxfp4_to_float((const q3n_block_mxfp4 *)src + i, y + 32 * i);
      return;
    case Q3N_Q2_K:
      for (int64_t i = 0; i < n / 256; i++) q3n_q2_k_to_float((const q3n_block_q2_k *)src + i, y + 256 * i);
      return;
    case Q3N_Q3_K:
      for (int64_t i = 0; i < n / 256; i++) q3n_q3_k_to_float((const q3n_block_q3_k *)src + i, y + 256 * i);
      return;
    case Q3N_IQ4_XS:
      for (int64_t i = 0; i < n / 256; i++) q3n_iq4_xs_to_float((const q3n_block_iq4_xs *)src + i, y + 256 * i);
      return;
    case Q3N_Q4_K:
      for (int64_t i = 0; i < n / 256; i++) q3n_q4_k_to_float((const q3n_block_q4_k *)src + i, y + 256 * i);
      return;
    case Q3N_Q5_K:
      for (int64_t i = 0; i < n / 256; i++) q3n_q5_k_to_float((const q3n_block_q5_k *)src + i, y + 256 * i);
      return;
    case Q3N_Q6_K:
      for (int64_t i = 0; i < n / 256; i++) q3n_q6_k_to_float((const q3n_block_q6_k *)src + i, y + 256 * i);
      return;
    case Q3N_Q8_X32: q3n_q8_x32_to_float(src, y, n); return;
    case Q3N_Q8_X256: q3n_q8_x256_to_float(src, y, n); return;
  }
}

/* Element i of a row or tensor of dtype; i a multiple of the block. */
static inline const void *q3n_element(const void *base, q3n_dtype dtype, int64_t i) {
  return (const uint8_t *)base + i / q3n_dtype_block(dtype) * q3n_dtype_block_bytes(dtype);
}

#endif
