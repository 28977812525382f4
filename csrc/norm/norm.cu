/* A warp a row for D up to 1024, a block a row beyond: one pass for the sum of squares, one for y; the second read of
   x comes from the L1 cache. */
#include "../cuda/reduce.cuh"

extern "C" {
#include "norm.h"
}

namespace {

constexpr int THREADS = 128, WARP_ROW = 1024;

__device__ __forceinline__ float silu(float z) { return z / (1.0f + expf(-z)); }

/* The factor stays in double, as in norm_scalar.c. */
template <int KIND> __device__ __forceinline__ float element(float x, float w, float z, bool weighted, double factor) {
  const double scaled = (double)x * factor;
  if (!weighted) return KIND == Q3N_NORM_RMS_GATED ? (float)scaled * silu(z) : (float)scaled;
  if (KIND == Q3N_NORM_RMS_PLUS1) return (float)(scaled * (1.0 + (double)w));
  const float y = (float)(scaled * (double)w);
  return KIND == Q3N_NORM_RMS_GATED ? y * silu(z) : y;
}

/* Four channels from d on; those past D are `pad`. VECTOR: the row is aligned to 16 bytes and D a multiple of 4. */
template <bool VECTOR> __device__ __forceinline__ float4 load(const float *row, int64_t d, int64_t D, float pad) {
  if (VECTOR) return q3n_load<float4>(row + d);
  return make_float4(row[d], d + 1 < D ? row[d + 1] : pad, d + 2 < D ? row[d + 2] : pad, d + 3 < D ? row[d + 3] : pad);
}

template <bool VECTOR> __device__ __forceinline__ void store(float *row, int64_t d, int64_t D, float4 v) {
  if (VECTOR) {
    q3n_store(row + d, v);
    return;
  }
  row[d] = v.x;
  if (d + 1 < D) row[d + 1] = v.y;
  if (d + 2 < D) row[d + 2] = v.z;
  if (d + 3 < D) row[d + 3] = v.w;
}

/* PER_ROW threads a row. Which thread adds which squares does not depend on VECTOR: the same bits from any layout. */
template <int KIND, int PER_ROW, bool VECTOR> __global__ void __launch_bounds__(THREADS) norm_rows(q3n_norm_args a) {
  Q3N_SHARED(double, part, 32);
  const int64_t row = (int64_t)blockIdx.x * (THREADS / PER_ROW) + threadIdx.x / PER_ROW;
  if (PER_ROW == 32 && row >= a.T * a.H) return; /* a whole warp */
  const int64_t t = row / a.H, h = row % a.H;
  const float *x = a.x + t * a.x_t + h * a.x_h;
  const float *z = KIND == Q3N_NORM_RMS_GATED ? a.z + t * a.z_t + h * a.z_h : nullptr;
  float *y = a.y + t * a.y_t + h * a.y_h;
  const bool weighted = a.w != nullptr;
  const int64_t first = 4 * (threadIdx.x % PER_ROW), step = 4 * PER_ROW;

  double squares = 0.0;
  for (int64_t d = first; d < a.D; d += step) {
    const float4 v = load<VECTOR>(x, d, a.D, 0.0f);
    squares += ((double)v.x * v.x + (double)v.y * v.y) + ((double)v.z * v.z + (double)v.w * v.w);
  }
  squares = PER_ROW == 32 ? q3n_warp_sum(squares) : q3n_block_sum(squares, part);
  const double mean = KIND == Q3N_NORM_L2 ? squares : squares / (double)a.D;
  const double factor = 1.0 / sqrt(mean + (double)a.eps);

  for (int64_t d = first; d < a.D; d += step) {
    const float4 v = load<VECTOR>(x, d, a.D, 0.0f), one = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
    const float4 w = weighted ? load<VECTOR>(a.w, d, a.D, 1.0f) : one;
    const float4 gate = KIND == Q3N_NORM_RMS_GATED ? load<VECTOR>(z, d, a.D, 1.0f) : one;
    store<VECTOR>(y, d, a.D,
                  make_float4(element<KIND>(v.x, w.x, gate.x, weighted, factor),
                              element<KIND>(v.y, w.y, gate.y, weighted, factor),
                              element<KIND>(v.z, w.z, gate.z, weighted, factor),
                              element<KIND>(v.w, w.w, gate.w, weighted, factor)));
  }
}

template <int KIND, int PER_ROW> q3n_status launch_rows(const q3n_norm_args *a, bool vector, q3n_stream stream) {
  const int64_t rows = a->T * a->H, per_block = THREADS / PER_ROW, blocks = (rows + per_block - 1) / per_block;
  return vector ? Q3N_LAUNCH((norm_rows<KIND, PER_ROW, true>), (*a), blocks, THREADS, 0, stream)
                : Q3N_LAUNCH((norm_rows<KIND, PER_ROW, false>), (*a), blocks, THREADS, 0, stream);
}

template <int KIND> q3n_status launch_kind(const q3n_norm_args *a, bool vector, q3n_stream stream) {
  return a->D <= WARP_ROW ? launch_rows<KIND, 32>(a, vector, stream) : launch_rows<KIND, THREADS>(a, vector, stream);
}

bool aligned(const float *p, int64_t stride_t, int64_t stride_h) {
  return (uintptr_t)p % 16 == 0 && stride_t % 4 == 0 && stride_h % 4 == 0;
}

} /* namespace */

Q3N_CUDA_SCRATCH(norm, norm) {
  (void)a;
  return 0;
}

Q3N_CUDA_OPERATOR(norm, norm) {
  (void)scratch;
  if (a->D == 0) return Q3N_OK;
  const bool vector = a->D % 4 == 0 && aligned(a->x, a->x_t, a->x_h) && aligned(a->y, a->y_t, a->y_h) &&
                      aligned(a->w, 0, 0) && (!a->z || aligned(a->z, a->z_t, a->z_h));
  switch (a->kind) {
    case Q3N_NORM_RMS: return launch_kind<Q3N_NORM_RMS>(a, vector, stream);
    case Q3N_NORM_RMS_PLUS1: return launch_kind<Q3N_NORM_RMS_PLUS1>(a, vector, stream);
    case Q3N_NORM_RMS_GATED: return launch_kind<Q3N_NORM_RMS_GATED>(a, vector, stream);
    default: return launch_kind<Q3N_NORM_L2>(a, vector, stream);
  }
}
