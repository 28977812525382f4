/* Blocks to f32, four values a thread; rows of f32 to 8-bit activations, a warp for 256 values. */
#include "../cuda/reduce.cuh"
#include "quant.cuh"

extern "C" {
#include "activations.h"
#include "quant.h"
}

namespace {

constexpr int THREADS = 128;
constexpr unsigned ALL = 0xffffffffu;

__global__ void __launch_bounds__(THREADS) dequantize(q3n_dequantize_args a, int64_t quads, bool vector) {
  const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (at >= a.rows * quads) return;
  const int64_t row = at / quads, i = at % quads * 4, columns = q3n_block_columns(a.dtype);
  const uint8_t *x = (const uint8_t *)a.x + row * a.x_row / columns * q3n_block_bytes(a.dtype);
  const float4 v = q3n_row_values4(a.dtype, x, i, a.N);
  float *y = a.y + row * a.y_row + i;
  if (vector) {
    q3n_store(y, v);
    return;
  }
  y[0] = v.x;
  if (i + 1 < a.N) y[1] = v.y;
  if (i + 2 < a.N) y[2] = v.z;
  if (i + 3 < a.N) y[3] = v.w;
}

/* A lane has eight neighbouring values, so 4 lanes have a block of 32 and all of them one of 256. */
template <bool X256> __global__ void __launch_bounds__(THREADS) activations(q3n_activations_args a, int64_t segments) {
  constexpr int LANES = X256 ? 32 : 4;
  const int64_t at = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
  if (at >= a.rows * segments) return; /* a whole warp */
  const int lane = (int)(threadIdx.x % 32);
  const int64_t row = at / segments, i = at % segments * 256 + 8 * lane;
  const bool mine = i < a.N;

  const float *from = a.x + row * a.x_row + i;
  float x[8], most = 0.0f;
  bool finite = true;
  Q3N_UNROLL
  for (int c = 0; c < 8; c++) {
    x[c] = mine ? from[c] : 0.0f;
    const float size = fabsf(x[c]);
    finite = finite && size < __uint_as_float(0x7f800000u);
    most = size > most ? size : most;
  }
  most = q3n_warp_max(finite ? most : __uint_as_float(0x7fc00000u), LANES);

  const bool number = most == most;
  const float d = most / 127.0f;
  const bool tiny = !(d >= 1.17549435e-38f);
  const float inverse = tiny ? 0.0f : 1.0f / d;
  uint32_t q[2] = {0, 0};
  int sum = 0;
  Q3N_UNROLL
  for (int c = 0; c < 8; c++) {
    const int value = tiny ? 0 : (int)rintf(x[c] * inverse);
    sum += value;
    q[c / 4] |= ((uint32_t)value & 0xffu) << c % 4 * 8;
  }
  const float scale = !number ? __uint_as_float(0x7fc00000u) : tiny ? 0.0f : d;
  const int sum16 = sum + __shfl_xor_sync(ALL, sum, 1), sum32 = sum16 + __shfl_xor_sync(ALL, sum16, 2);
  if (!mine) return;

  if (X256) {
    uint8_t *y = (uint8_t *)a.y + (row * (a.N / 256) + i / 256) * Q3N_Q8_X256_BYTES;
    q3n_store(y + 8 * lane, q[0]);
    q3n_store(y + 8 * lane + 4, q[1]);
    if (lane % 4 == 0) q3n_store(y + Q3N_Q8_X256_SUM32 + 2 * q3n_sum_at(lane / 4), (int16_t)sum32);
    if (lane % 2 == 0) q3n_store(y + Q3N_Q8_X256_SUM16 + 2 * q3n_sum_at(lane / 2), (int16_t)sum16);
    if (lane == 0) q3n_store(y + Q3N_Q8_X256_D, scale);
    if (lane > 0 && lane < 4) q3n_store(y + Q3N_Q8_X256_D + 4 * lane, 0u);
  } else {
    uint8_t *y = (uint8_t *)a.y + (row * (a.N / 32) + i / 32) * Q3N_Q8_X32_BYTES;
    q3n_store(y + Q3N_Q8_X32_Q + 8 * (lane % 4), q[0]);
    q3n_store(y + Q3N_Q8_X32_Q + 8 * (lane % 4) + 4, q[1]);
    if (lane % 4 == 0) q3n_store(y, scale);
    if (lane % 4 == 1) q3n_store(y + Q3N_Q8_X32_SUM, sum32);
  }
}

} /* namespace */

Q3N_CUDA_SCRATCH(dequantize, dequantize) {
  (void)a;
  return 0;
}

Q3N_CUDA_OPERATOR(dequantize, dequantize) {
  (void)scratch;
  const int64_t quads = (a->N + 3) / 4, blocks = (a->rows * quads + THREADS - 1) / THREADS;
  const bool vector = (uintptr_t)a->y % 16 == 0 && a->y_row % 4 == 0 && a->N % 4 == 0;
  return Q3N_LAUNCH(dequantize, (*a, quads, vector), blocks, THREADS, 0, stream);
}

Q3N_CUDA_SCRATCH(activations, activations) {
  (void)a;
  return 0;
}

Q3N_CUDA_OPERATOR(activations, activations) {
  (void)scratch;
  const int64_t segments = (a->N + 255) / 256, warps = THREADS / 32;
  const int64_t blocks = (a->rows * segments + warps - 1) / warps;
  return a->dtype == Q3N_Q8_X256 ? Q3N_LAUNCH(activations<true>, (*a, segments), blocks, THREADS, 0, stream)
                                 : Q3N_LAUNCH(activations<false>, (*a, segments), blocks, THREADS, 0, stream);
}
