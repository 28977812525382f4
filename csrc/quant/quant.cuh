/* Blocks of weights on CUDA. Every block type is one form: four neighbouring values are four signed bytes of a word,

     x = (d scale) q - (dmin min)        d, dmin floats of the block, scale and min integers of 16 columns

   rounded where quant_blocks.h rounds, so the values are its, bit for bit; in blocks of 32 scale and min are 1. q is
   what __dp4a and integer mma take. Readers give the bytes of a block: from global memory at any address, or staged in
   shared memory. With a dtype that is a constant all of it folds; ../matmul/tile.cuh has the products. */
#ifndef Q3N_QUANT_QUANT_CUH
#define Q3N_QUANT_QUANT_CUH

#include "../cuda/half.cuh"

extern "C" {
#include "q8_activations.h"
}

/* Columns and bytes of a block; plain types are blocks of 1. */
static __host__ __device__ __forceinline__ constexpr int q3n_block_columns(q3n_dtype t) {
  return t == Q3N_F32 || t == Q3N_F16 || t == Q3N_BF16                                                      ? 1
         : t == Q3N_Q2_K || t == Q3N_Q3_K || t == Q3N_Q4_K || t == Q3N_Q5_K || t == Q3N_Q6_K || t == Q3N_IQ4_XS ? 256
                                                                                                                : 32;
}

static __host__ __device__ __forceinline__ constexpr int q3n_block_bytes(q3n_dtype t) {
  switch (t) {
    case Q3N_F32: return 4;
    case Q3N_F16:
    case Q3N_BF16: return 2;
    case Q3N_Q8_0: return 34;
    case Q3N_Q4_1: return 20;
    case Q3N_Q5_0: return 22;
    case Q3N_Q5_1: return 24;
    case Q3N_Q2_K: return 84;
    case Q3N_Q3_K: return 110;
    case Q3N_Q4_K: return 144;
    case Q3N_Q5_K: return 176;
    case Q3N_Q6_K: return 210;
    case Q3N_IQ4_XS: return 136;
    case Q3N_MXFP4: return 17;
    default: return 18; /* q4_0, iq4_nl */
  }
}

/* Types with a minimum. */
static __host__ __device__ __forceinline__ constexpr bool q3n_has_min(q3n_dtype t) {
  return t == Q3N_Q4_1 || t == Q3N_Q5_1 || t == Q3N_Q2_K || t == Q3N_Q4_K || t == Q3N_Q5_K;
}

/* Columns that share scale and min. */
static __host__ __device__ __forceinline__ constexpr int q3n_scale_columns(q3n_dtype t) {
  return t == Q3N_Q2_K || t == Q3N_Q3_K || t == Q3N_Q6_K ? 16 : 32;
}

/* Four bytes at any address, none beside them touched. */
Q3N_DEVICE uint32_t q3n_word_at(const uint8_t *p) {
  if ((uintptr_t)p % 4 == 0) return q3n_load<uint32_t>(p);
  if ((uintptr_t)p % 2 == 0) return q3n_load<uint16_t>(p) | (uint32_t)q3n_load<uint16_t>(p + 2) << 16;
  return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

Q3N_DEVICE uint32_t q3n_half_at(const uint8_t *p) {
  if ((uintptr_t)p % 2 == 0) return q3n_load<uint16_t>(p);
  return p[0] | (uint32_t)p[1] << 8;
}

/* A block in global memory. */
struct q3n_global_block {
  const uint8_t *p;
  __device__ __forceinline__ uint32_t word(int at) const { return q3n_word_at(p + at); }
  __device__ __forceinline__ uint32_t half(int at) const { return q3n_half_at(p + at); }
  __device__ __forceinline__ uint32_t byte(int at) const { return p[at]; }
};

/* A block `first` bytes into words in shared memory; words that hold none of its bytes are not read. */
struct q3n_shared_block {
  q3n_shared<uint32_t> words;
  int first;
  __device__ __forceinline__ uint32_t bytes(int at, int last) const {
    const int i = first + at;
    const uint32_t low = words[i / 4], high = words[(i + last) / 4];
    return __funnelshift_r(low, high, (unsigned)i % 4 * 8);
  }
  __device__ __forceinline__ uint32_t word(int at) const { return bytes(at, 3); }
  __device__ __forceinline__ uint32_t half(int at) const { return bytes(at, 1) & 0xffffu; }
  __device__ __forceinline__ uint32_t byte(int at) const {
    const uint32_t low = words[(first + at) / 4];
    return low >> (unsigned)(first + at) % 4 * 8 & 0xffu;
  }
};

/* Where byte `at` of block 0 of row `row` lies in a group of 16 interleaved rows (repack.h). */
Q3N_DEVICE int q3n_group_byte(q3n_dtype t, int at, int row) {
  const int bytes = q3n_block_bytes(t), left = bytes % 4, head = q3n_block_columns(t) == 32 ? left : 0;
  if (at < head) return left * row + at;
  if (at >= bytes - (left - head)) return 16 * (bytes - left) + left * row + (at - (bytes - left));
  const int unit = (at - head) / 4 * 4 + head;
  return 16 * unit + 4 * row + (at - unit);
}

/* Block of row `row` of 16 interleaved ones, which start at p. */
struct q3n_group_block {
  const uint8_t *p;
  q3n_dtype t;
  int row;
  __device__ __forceinline__ uint32_t byte(int at) const { return p[q3n_group_byte(t, at, row)]; }
  __device__ __forceinline__ uint32_t half(int at) const { return byte(at) | byte(at + 1) << 8; }
  __device__ __forceinline__ uint32_t word(int at) const { return half(at) | half(at + 2) << 16; }
};

/* v - k in each of four bytes, 0 <= v - k + 128 < 256. */
Q3N_DEVICE uint32_t q3n_bytes_minus(uint32_t v, uint32_t k) {
  return ((v | 0x80808080u) - k * 0x01010101u) ^ 0x80808080u;
}

/* Bits 0 .. 3 to the lowest bits of four bytes. */
Q3N_DEVICE uint32_t q3n_bits_to_bytes(uint32_t bits) { return (bits & 15u) * 0x00204081u & 0x01010101u; }

/* Levels of four nibbles, one a byte, out of sixteen bytes a .. d. */
Q3N_DEVICE uint32_t q3n_levels(uint32_t nibbles, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t pairs = nibbles | nibbles >> 4, select = __byte_perm(pairs, 0, 0x4420) & 0x7777u;
  const uint32_t low = __byte_perm(a, b, select), high = __byte_perm(c, d, select);
  const uint32_t upper = (nibbles >> 3 & 0x01010101u) * 0xffu;
  return (low & ~upper) | (high & upper);
}

Q3N_DEVICE uint32_t q3n_iq4_bytes(uint32_t nibbles) {
  return q3n_levels(nibbles, 0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u);
}

Q3N_DEVICE uint32_t q3n_mxfp4_bytes(uint32_t nibbles) {
  return q3n_levels(nibbles, 0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu);
}

/* Values 16 j + in16 .. 16 j + in16 + 3 of a block, in16 a multiple of 4 below 16; two, so that a constant j folds. */
template <class R> Q3N_DEVICE uint32_t q3n_quad(q3n_dtype t, const R &b, int j, int in16) {
  constexpr uint32_t NIBBLES = 0x0f0f0f0fu, PAIRS = 0x03030303u, BITS = 0x01010101u;
  const int c = 16 * j, in32 = j % 2 * 16 + in16, high = j % 2 * 4;
  switch (t) {
    case Q3N_Q8_0: return b.word(2 + c + in16);
    case Q3N_Q4_0: return q3n_bytes_minus(b.word(2 + in16) >> high & NIBBLES, 8);
    case Q3N_Q4_1: return b.word(4 + in16) >> high & NIBBLES;
    case Q3N_Q5_0:
      return q3n_bytes_minus((b.word(6 + in16) >> high & NIBBLES) | q3n_bits_to_bytes(b.word(2) >> (c + in16)) << 4,
                             16);
    case Q3N_Q5_1: return (b.word(8 + in16) >> high & NIBBLES) | q3n_bits_to_bytes(b.word(4) >> (c + in16)) << 4;
    case Q3N_IQ4_NL: return q3n_iq4_bytes(b.word(2 + in16) >> high & NIBBLES);
    case Q3N_MXFP4: return q3n_mxfp4_bytes(b.word(1 + in16) >> high & NIBBLES);
    case Q3N_Q2_K: return b.word(16 + c / 128 * 32 + in32) >> c / 32 % 4 * 2 & PAIRS;
    case Q3N_Q3_K:
      return q3n_bytes_minus((b.word(32 + c / 128 * 32 + in32) >> c / 32 % 4 * 2 & PAIRS) |
                                 (b.word(in32) >> c / 32 & BITS) << 2,
                             4);
    case Q3N_Q4_K: return b.word(16 + c / 64 * 32 + in32) >> c / 32 % 2 * 4 & NIBBLES;
    case Q3N_Q5_K:
      return (b.word(48 + c / 64 * 32 + in32) >> c / 32 % 2 * 4 & NIBBLES) | (b.word(16 + in32) >> c / 32 & BITS) << 4;
    case Q3N_Q6_K:
      return q3n_bytes_minus((b.word(c / 128 * 64 + c / 32 % 2 * 32 + in32) >> c / 64 % 2 * 4 & NIBBLES) |
                                 (b.word(128 + c / 128 * 32 + in32) >> c / 32 % 4 * 2 & PAIRS) << 4,
                             32);
    case Q3N_IQ4_XS: return q3n_iq4_bytes(b.word(8 + c / 32 * 16 + in16) >> high & NIBBLES);
    default: return 0;
  }
}

/* The block's floats. */
template <class R> Q3N_DEVICE float q3n_block_d(q3n_dtype t, const R &b) {
  switch (t) {
    case Q3N_MXFP4: {
      const uint32_t e = b.byte(0);
      return __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
    }
    case Q3N_Q2_K: return q3n_half_float(b.half(80));
    case Q3N_Q3_K: return q3n_half_float(b.half(108));
    case Q3N_Q6_K: return q3n_half_float(b.half(208));
    default: return q3n_half_float(b.half(0));
  }
}

template <class R> Q3N_DEVICE float q3n_block_dmin(q3n_dtype t, const R &b) {
  switch (t) {
    case Q3N_Q4_1:
    case Q3N_Q5_1: return -q3n_half_float(b.half(2));
    case Q3N_Q2_K: return q3n_half_float(b.half(82));
    case Q3N_Q4_K:
    case Q3N_Q5_K: return q3n_half_float(b.half(2));
    default: return 0.0f;
  }
}

/* Of columns 16 j .. 16 j + 15. */
template <class R> Q3N_DEVICE int q3n_scale16(q3n_dtype t, const R &b, int j) {
  const int k = j / 2; /* of 32 columns */
  switch (t) {
    case Q3N_Q2_K: return (int)(b.byte(j) & 15u);
    case Q3N_Q3_K:
      return (int)((b.byte(96 + j % 8) >> j / 8 * 4 & 15u) | (b.byte(104 + j % 4) >> j / 4 * 2 & 3u) << 4) - 32;
    case Q3N_Q4_K:
    case Q3N_Q5_K:
      return (int)(k < 4 ? b.byte(4 + k) & 63u : (b.byte(8 + k) & 15u) | b.byte(k) >> 6 << 4);
    case Q3N_Q6_K: return (int)(int8_t)b.byte(192 + j);
    case Q3N_IQ4_XS: return (int)((b.byte(4 + k / 2) >> k % 2 * 4 & 15u) | (b.half(2) >> 2 * k & 3u) << 4) - 32;
    default: return 1;
  }
}

template <class R> Q3N_DEVICE int q3n_min16(q3n_dtype t, const R &b, int j) {
  const int k = j / 2;
  switch (t) {
    case Q3N_Q2_K: return (int)(b.byte(j) >> 4);
    case Q3N_Q4_K:
    case Q3N_Q5_K: return (int)(k < 4 ? b.byte(8 + k) & 63u : b.byte(8 + k) >> 4 | b.byte(4 + k) >> 6 << 4);
    default: return 1;
  }
}

/* All of a super-block's at once: byte i of s (signed) and of m belong to columns i n .. (i + 1) n - 1, n being
   q3n_scale_columns. m only where there are minima. */
template <class R> Q3N_DEVICE void q3n_scales(q3n_dtype t, const R &b, uint32_t (&s)[4], uint32_t (&m)[4]) {
  constexpr uint32_t NIBBLES = 0x0f0f0f0fu, SIX = 0x3f3f3f3fu, PAIRS = 0x03030303u;
  switch (t) {
    case Q3N_Q2_K:
      Q3N_UNROLL
      for (int i = 0; i < 4; i++) {
        const uint32_t both = b.word(4 * i);
        s[i] = both & NIBBLES, m[i] = both >> 4 & NIBBLES;
      }
      return;
    case Q3N_Q3_K: {
      const uint32_t low[2] = {b.word(96), b.word(100)}, high = b.word(104);
      Q3N_UNROLL
      for (int i = 0; i < 4; i++)
        s[i] = q3n_bytes_minus((low[i % 2] >> i / 2 * 4 & NIBBLES) | (high >> 2 * i & PAIRS) << 4, 32);
      return;
    }
    case Q3N_Q4_K:
    case Q3N_Q5_K: {
      const uint32_t first = b.word(4), second = b.word(8), third = b.word(12);
      s[0] = first & SIX, s[1] = (third & NIBBLES) | (first >> 6 & PAIRS) << 4;
      m[0] = second & SIX, m[1] = (third >> 4 & NIBBLES) | (second >> 6 & PAIRS) << 4;
      return;
    }
    case Q3N_Q6_K:
      Q3N_UNROLL
      for (int i = 0; i < 4; i++) s[i] = b.word(192 + 4 * i);
      return;
    case Q3N_IQ4_XS: {
      const uint32_t low = b.word(4), even = low & NIBBLES, odd = low >> 4 & NIBBLES, high = b.half(2);
      Q3N_UNROLL
      for (int i = 0; i < 2; i++) {
        const uint32_t two = high >> 8 * i & 0xffu, spread = (two | two << 6 | two << 12 | two << 18) & PAIRS;
        s[i] = q3n_bytes_minus(__byte_perm(even, odd, i ? 0x7362 : 0x5140) | spread << 4, 32);
      }
      return;
    }
    default: return;
  }
}

Q3N_DEVICE int q3n_signed_byte(uint32_t word, int i) { return (int)(int8_t)(word >> 8 * i); }

/* Byte i of a word, as a signed number. */
Q3N_DEVICE float q3n_byte_float(uint32_t word, int i) { return (float)q3n_signed_byte(word, i); }

/* Values c .. c + 3 of the block `b` of a block type. */
template <class R> Q3N_DEVICE float4 q3n_values4(q3n_dtype t, const R &b, int c) {
  const uint32_t q = q3n_quad(t, b, c / 16, c % 16);
  float scale = q3n_block_d(t, b), min = 0.0f;
  if (q3n_block_columns(t) == 256) scale *= (float)q3n_scale16(t, b, c / 16);
  if (q3n_has_min(t)) min = q3n_block_dmin(t, b);
  if (q3n_has_min(t) && q3n_block_columns(t) == 256) min *= (float)q3n_min16(t, b, c / 16);
  /* - 0 changes nothing, not even the sign of a zero */
  return make_float4(scale * q3n_byte_float(q, 0) - min, scale * q3n_byte_float(q, 1) - min,
                     scale * q3n_byte_float(q, 2) - min, scale * q3n_byte_float(q, 3) - min);
}

/* Element i of a row of a plain type at any address. */
Q3N_DEVICE float q3n_plain(q3n_dtype t, const uint8_t *row, int64_t i) {
  if (t == Q3N_F32) return __uint_as_float(q3n_word_at(row + 4 * i));
  const uint32_t h = q3n_half_at(row + 2 * i);
  return t == Q3N_F16 ? q3n_half_float(h) : q3n_bf16_float(h);
}

/* Element i, a multiple of 4, and the three after it of a row of N; those past N are 0. */
Q3N_DEVICE float4 q3n_row_values4(q3n_dtype t, const uint8_t *row, int64_t i, int64_t N) {
  const int columns = q3n_block_columns(t);
  if (columns > 1) return q3n_values4(t, q3n_global_block{row + i / columns * q3n_block_bytes(t)}, (int)(i % columns));
  return make_float4(i < N ? q3n_plain(t, row, i) : 0.0f, i + 1 < N ? q3n_plain(t, row, i + 1) : 0.0f,
                     i + 2 < N ? q3n_plain(t, row, i + 2) : 0.0f, i + 3 < N ? q3n_plain(t, row, i + 3) : 0.0f);
}

/* Where sum i of 8-bit activations lies, as q3n_q8_sum_at. */
Q3N_DEVICE int q3n_sum_at(int i) { return (i & ~3) | (i & 1) << 1 | (i >> 1 & 1); }

#endif
