/* What the two AArch64 forms of the tiles of q8_tile.h share: how four rows of a group lie, 16 bytes of them in every line
   of 64. `type` is a constant wherever these are called. Static inline. */
#ifndef Q3N_MATMUL_Q8_TILE_NEON_H
#define Q3N_MATMUL_Q8_TILE_NEON_H

#include <arm_neon.h>
#include <stddef.h>

#include "../quant/q8_activations.h"
#include "q8_tile.h"

#define INLINE static inline __attribute__((always_inline))

/* Bytes of a block of 16 rows. */
INLINE int64_t block_bytes(q3n_dtype type) {
  switch (type) {
    case Q3N_Q4_K: return 16 * 144;
    case Q3N_Q5_K: return 16 * 176;
    case Q3N_Q6_K: return 16 * 210;
    case Q3N_Q8_0: return 16 * 34;
    default: return 16 * 18;
  }
}

/* A part of a block is what is multiplied before a scale comes in. */
INLINE int part_columns(q3n_dtype type) { return type == Q3N_Q6_K ? 16 : 32; }

/* Columns 4 i .. 4 i + 3 of part j of the four rows whose bytes begin at w: values as they stand for, but 8 more in Q4_0.
   Where a field comes by a shift, neighbours come with it and are left out by vbsl. */
INLINE int8x16_t weights(q3n_dtype type, const uint8_t *w, int64_t j, int i) {
  const uint8x16_t nibble = vdupq_n_u8(15);
  if (type == Q3N_Q8_0) return vreinterpretq_s8_u8(vld1q_u8(w + 32 + 64 * i));
  if (type == Q3N_Q4_0) {
    const uint8x16_t both = vld1q_u8(w + 32 + 64 * (i % 4));
    return vreinterpretq_s8_u8(i < 4 ? vandq_u8(both, nibble) : vshrq_n_u8(both, 4));
  }
  if (type == Q3N_Q6_K) {
    const int64_t half = j / 8, quarter = j / 2 % 4, unit = 4 * (j % 2) + i;
    const uint8x16_t both = vld1q_u8(w + 64 * (16 * half + 8 * (quarter % 2) + unit));
    const uint8x16_t low = quarter < 2 ? vandq_u8(both, nibble) : vshrq_n_u8(both, 4);
    const uint8x16_t all = vld1q_u8(w + 64 * (32 + 8 * half + unit));
    const uint8x16_t high = vshlq_u8(all, vdupq_n_s8((int8_t)(4 - 2 * quarter)));
    return vsubq_s8(vreinterpretq_s8_u8(vbslq_u8(vdupq_n_u8(0x30), high, low)), vdupq_n_s8(32));
  }
  const uint8x16_t both = vld1q_u8(w + 64 * ((type == Q3N_Q5_K ? 12 : 4) + 8 * (j / 2) + i));
  const uint8x16_t low = j % 2 ? vshrq_n_u8(both, 4) : vandq_u8(both, nibble);
  if (type == Q3N_Q4_K) return vreinterpretq_s8_u8(low);
  const uint8x16_t fifth = vshlq_u8(vld1q_u8(w + 64 * (4 + i)), vdupq_n_s8((int8_t)(4 - j)));
  return vreinterpretq_s8_u8(vbslq_u8(vdupq_n_u8(16), fifth, low));
}

/* Keeps a load where it stands: compilers would bring forward those of a whole part and run out of registers. */
INLINE void settle(void) { __asm__ volatile("" : : : "memory"); }

/* Keeps a sum in its register until here. */
INLINE void finish(int32x4_t *sum) { __asm__ volatile("" : "+w"(*sum)); }

#endif
