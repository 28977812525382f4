/* Tensor-core products of one warp: D = A B + C with A 16 x 16 row by row, B 16 x 8 column by column, C and D 16 x 8,
   f32 accumulation. Fragments as the PTX manual lays them out, with group = lane / 4 and member = lane % 4:

     a[0..3]  two neighbouring values each, the lower column in the lower half: rows group, group + 8, group, group + 8,
              columns 2 member (a[0], a[1]) and 2 member + 8 (a[2], a[3])
     b[0..1]  rows 2 member and 2 member + 8, column group
     c, d     rows group (0, 1) and group + 8 (2, 3), columns 2 member and 2 member + 1

   The same of signed bytes, in 32-bit integers: four neighbouring ones a register, B with them down a column. In
   m16n8k32 rows of A are group, group + 8, group, group + 8 and columns 4 member (a[0], a[1]) and 4 member + 16; b has
   rows 4 member and 4 member + 16. m16n8k16 has a[0], a[1] and b[0] of these.

   q3n_mma_tf32 takes A 16 x 8 and B 8 x 8 in f32, whose lower 13 bits do not count: a[0..3] have rows group, group + 8,
   group, group + 8 and columns member (a[0], a[1]) and member + 4, b[0..1] rows member and member + 4. q3n_split_tf32
   makes two such numbers of one, within 2^-23 of it.

   Compute capability 8.0. On the host sums run in double and are rounded once; hardware rounds in between. */
#ifndef Q3N_CUDA_MMA_CUH
#define Q3N_CUDA_MMA_CUH

#include "launch.cuh"

#if defined(__CUDACC__)

#define Q3N_MMA(name, types)                                                                                   \
  static __device__ __forceinline__ void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],   \
                                              const float (&c)[4]) {                                           \
    asm volatile("mma.sync.aligned.m16n8k16.row.col." types                                                    \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                        \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),     \
                   "f"(c[2]), "f"(c[3]));                                                                      \
  }
Q3N_MMA(q3n_mma_bf16, "f32.bf16.bf16.f32")
Q3N_MMA(q3n_mma_f16, "f32.f16.f16.f32")
#undef Q3N_MMA

static __device__ __forceinline__ void q3n_mma_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                  const int (&c)[4]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]),
                 "r"(c[3]));
}
static __device__ __forceinline__ void q3n_mma_s8(int (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1],
                                                  const int (&c)[4]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32"
               " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}
static __device__ __forceinline__ void q3n_mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                    const float (&c)[4]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
                 "f"(c[3]));
}

/* Four 8 x 8 matrices of 16-bit values, whose rows lie where lanes 8 i .. 8 i + 8 point to: y[i] has rows 2 member and
   2 member + 1 of column group. */
static __device__ __forceinline__ void q3n_load_transposed(uint32_t (&y)[4], const uint32_t *row) {
  const unsigned at = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3])
               : "r"(at)
               : "memory");
}

/* Two values rounded to nearest, `low` in the lower half. */
static __device__ __forceinline__ uint32_t q3n_pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
static __device__ __forceinline__ uint32_t q3n_pack_f16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

#else

#include "../base/half.h"

namespace q3n_host {

struct mma_fragments {
  uint32_t a[4], b[2];
  float c[4];
};

template <float (*value)(uint16_t)> void finish_mma(lane_call *const *lane, unsigned) {
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; l++) {
    const mma_fragments &f = *(const mma_fragments *)lane[l]->in;
    const int group = l / 4, member = l % 4;
    for (int i = 0; i < 8; i++)
      a[group + i / 2 % 2 * 8][2 * member + i / 4 * 8 + i % 2] = value((uint16_t)(f.a[i / 2] >> i % 2 * 16));
    for (int i = 0; i < 4; i++) b[2 * member + i / 2 * 8 + i % 2][group] = value((uint16_t)(f.b[i / 2] >> i % 2 * 16));
  }
  for (int l = 0; l < 32; l++) {
    const mma_fragments &f = *(const mma_fragments *)lane[l]->in;
    float *d = (float *)lane[l]->out;
    for (int i = 0; i < 4; i++) {
      double sum = (double)f.c[i];
      for (int k = 0; k < 16; k++) sum += (double)a[l / 4 + i / 2 * 8][k] * (double)b[k][2 * (l % 4) + i % 2];
      d[i] = (float)sum;
    }
  }
}

template <float (*value)(uint16_t)>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], place at) {
  const mma_fragments in = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
  float out[4];
  warp(0xffffffffu, finish_mma<value>, 0, 32, &in, sizeof in, out, at);
  memcpy(d, out, sizeof out);
}

/* N registers of B: 16 N values of K. */
template <int N> struct mma_bytes {
  uint32_t a[2 * N], b[N];
  int c[4];
};

template <int N> void finish_mma_s8(lane_call *const *lane, unsigned) {
  for (int l = 0; l < 32; l++) {
    int *d = (int *)lane[l]->out;
    for (int i = 0; i < 4; i++) {
      /* what row and column hold lies in the four lanes of a group */
      unsigned sum = (unsigned)((const mma_bytes<N> *)lane[l]->in)->c[i];
      for (int member = 0; member < 4; member++) {
        const mma_bytes<N> &row = *(const mma_bytes<N> *)lane[l / 4 * 4 + member]->in;
        const mma_bytes<N> &column = *(const mma_bytes<N> *)lane[(2 * (l % 4) + i % 2) * 4 + member]->in;
        for (int n = 0; n < N; n++)
          for (int k = 0; k < 4; k++)
            sum += (unsigned)((int8_t)(row.a[2 * n + i / 2] >> 8 * k) * (int8_t)(column.b[n] >> 8 * k));
      }
      d[i] = (int)sum;
    }
  }
}

inline float tf32_value(uint32_t bits) { return __int_as_float((int)(bits & 0xffffe000u)); }

inline void finish_mma_tf32(lane_call *const *lane, unsigned) {
  float a[16][8], b[8][8];
  for (int l = 0; l < 32; l++) {
    const mma_fragments &f = *(const mma_fragments *)lane[l]->in;
    const int group = l / 4, member = l % 4;
    for (int i = 0; i < 4; i++) a[group + i % 2 * 8][member + i / 2 * 4] = tf32_value(f.a[i]);
    for (int i = 0; i < 2; i++) b[member + i * 4][group] = tf32_value(f.b[i]);
  }
  for (int l = 0; l < 32; l++) {
    const mma_fragments &f = *(const mma_fragments *)lane[l]->in;
    float *d = (float *)lane[l]->out;
    for (int i = 0; i < 4; i++) {
      double sum = (double)f.c[i];
      for (int k = 0; k < 8; k++) sum += (double)a[l / 4 + i / 2 * 8][k] * (double)b[k][2 * (l % 4) + i % 2];
      d[i] = (float)sum;
    }
  }
}

template <int N>
void mma_s8(int (&d)[4], const uint32_t (&a)[2 * N], const uint32_t (&b)[N], const int (&c)[4], place at) {
  mma_bytes<N> in;
  memcpy(in.a, a, sizeof a);
  memcpy(in.b, b, sizeof b);
  memcpy(in.c, c, sizeof c);
  int out[4];
  warp(0xffffffffu, finish_mma_s8<N>, 0, 32, &in, sizeof in, out, at);
  memcpy(d, out, sizeof out);
}

} /* namespace q3n_host */

static inline void q3n_mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                                Q3N_AT) {
  const q3n_host::mma_fragments in = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
  float out[4];
  q3n_host::warp(0xffffffffu, q3n_host::finish_mma_tf32, 0, 32, &in, sizeof in, out, {file, line});
  memcpy(d, out, sizeof out);
}
static inline void q3n_mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                                Q3N_AT) {
  q3n_host::mma<q3n_bf16_to_f32>(d, a, b, c, {file, line});
}
static inline void q3n_mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                               Q3N_AT) {
  q3n_host::mma<q3n_f16_to_f32>(d, a, b, c, {file, line});
}
static inline void q3n_mma_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int (&c)[4], Q3N_AT) {
  q3n_host::mma_s8<2>(d, a, b, c, {file, line});
}
static inline void q3n_mma_s8(int (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1], const int (&c)[4], Q3N_AT) {
  q3n_host::mma_s8<1>(d, a, b, c, {file, line});
}
static inline void q3n_load_transposed(uint32_t (&y)[4], q3n_shared<uint32_t> row, Q3N_AT) {
  const int group = (int)(threadIdx.x % 32) / 4, member = (int)(threadIdx.x % 4);
  if (row.i % 4 != 0) q3n_host::fail({file, line}, "misaligned: a row of a matrix");
  for (int i = 0; i < 4; i++) {
    y[i] = 0;
    for (int half = 0; half < 2; half++) {
      const int64_t at = __shfl_sync(0xffffffffu, row.i, 8 * i + 2 * member + half, 32, file, line) + group / 2;
      q3n_host::on_read(row.a, at, 1, {file, line});
      y[i] |= (((const uint32_t *)row.a->data)[at] >> group % 2 * 16 & 0xffffu) << half * 16;
    }
  }
}
static inline uint32_t q3n_pack_bf16(float low, float high) {
  return (uint32_t)q3n_f32_to_bf16(high) << 16 | q3n_f32_to_bf16(low);
}
static inline uint32_t q3n_pack_f16(float low, float high) {
  return (uint32_t)q3n_f32_to_f16(high) << 16 | q3n_f32_to_f16(low);
}

#endif

/* x = high + low but for the last bit: high is x rounded to 11 bits, low the exact rest, of which the product takes 11.
   What is not finite, or would round to infinity, has a rest that is not finite. */
static __device__ __forceinline__ void q3n_split_tf32(float x, uint32_t &high, uint32_t &low) {
  high = ((uint32_t)__float_as_int(x) + 0x1000u) & 0xffffe000u;
  low = (uint32_t)__float_as_int(x - __int_as_float((int)high));
}

#endif
