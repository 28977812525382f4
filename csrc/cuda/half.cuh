/* 16-bit floats in kernels: the conversions of base/half.h, and elements of arrays that are f32, bf16 or f16. */
#ifndef Q3N_CUDA_HALF_CUH
#define Q3N_CUDA_HALF_CUH

#include "launch.cuh"

extern "C" {
#include "../base/dtype.h"
#include "../base/half.h"
}

#define Q3N_DEVICE static __device__ __forceinline__

#if defined(__CUDACC__)
Q3N_DEVICE float q3n_half_float(uint32_t h) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((unsigned short)h));
  return x;
}
/* To nearest, ties to even, as q3n_f32_to_f16, which also keeps what it can of a NaN. */
Q3N_DEVICE uint32_t q3n_float_half(float x) {
  const uint32_t u = __float_as_uint(x);
  unsigned short h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return x == x ? h : 0x7e00u | (u >> 13 & 0x3ffu) | (u >> 16 & 0x8000u);
}
#else
Q3N_DEVICE float q3n_half_float(uint32_t h) { return q3n_f16_to_f32((uint16_t)h); }
Q3N_DEVICE uint32_t q3n_float_half(float x) { return q3n_f32_to_f16(x); }
#endif

Q3N_DEVICE float q3n_bf16_float(uint32_t h) { return __uint_as_float(h << 16); }

/* As q3n_f32_to_bf16. */
Q3N_DEVICE uint32_t q3n_float_bf16(float x) {
  const uint32_t u = __float_as_uint(x);
  return x == x ? (u + 0x7fffu + (u >> 16 & 1u)) >> 16 : u >> 16 | 0x40u;
}

/* Bytes of an element of a plain type. */
Q3N_DEVICE int q3n_plain_bytes(q3n_dtype t) { return t == Q3N_F32 ? 4 : 2; }

Q3N_DEVICE float q3n_widen(uint32_t h, q3n_dtype t) { return t == Q3N_BF16 ? q3n_bf16_float(h) : q3n_half_float(h); }

/* Element i of an array of f32, bf16 or f16, and four neighbours, aligned to as many bytes as they have. */
Q3N_DEVICE float q3n_element(const void *x, int64_t i, q3n_dtype t) {
  return t == Q3N_F32 ? ((const float *)x)[i] : q3n_widen(((const uint16_t *)x)[i], t);
}
Q3N_DEVICE float4 q3n_four(const void *x, int64_t i, q3n_dtype t) {
  if (t == Q3N_F32) return q3n_load<float4>((const float *)x + i);
  const uint2 u = q3n_load<uint2>((const uint16_t *)x + i);
  return make_float4(q3n_widen(u.x & 0xffffu, t), q3n_widen(u.x >> 16, t), q3n_widen(u.y & 0xffffu, t),
                     q3n_widen(u.y >> 16, t));
}

/* x rounded to t. */
Q3N_DEVICE void q3n_set_element(void *y, int64_t i, q3n_dtype t, float x) {
  if (t == Q3N_F32)
    ((float *)y)[i] = x;
  else
    ((uint16_t *)y)[i] = (uint16_t)(t == Q3N_BF16 ? q3n_float_bf16(x) : q3n_float_half(x));
}

#endif
