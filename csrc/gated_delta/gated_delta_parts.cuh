/* What the CUDA kernels share: where the arrays of one head lie. */
#ifndef Q3N_GATED_DELTA_PARTS_CUH
#define Q3N_GATED_DELTA_PARTS_CUH

#include "../cuda/half.cuh"

extern "C" {
#include "gated_delta.h"
}

namespace {

/* The arrays of one sequence and value head, as in gated_delta_parts.h. */
struct head {
  int64_t T;
  const void *q, *k, *v; /* of dtype */
  const float *g, *beta, *state_in;
  void *o; /* of dtype */
  float *state_out, *snapshots;
};

/* i elements on. */
__device__ __forceinline__ const void *from(const void *x, int64_t i, q3n_dtype t) {
  return (const char *)x + i * q3n_plain_bytes(t);
}

__device__ __forceinline__ head find_head(const q3n_gated_delta_args &a, int64_t b, int64_t h) {
  const int64_t hk = a.head_map == Q3N_HEADS_GROUPED ? h / (a.HV / a.HK) : h % a.HK;
  const int64_t row = a.cu_seqlens ? 0 : b, t = a.cu_seqlens ? a.cu_seqlens[b] : 0;
  head x = {};
  x.T = a.cu_seqlens ? a.cu_seqlens[b + 1] - t : a.T;
  if (a.state_in) x.state_in = a.state_in + (a.slot_in ? a.slot_in[b] : b) * a.state_slot + h * a.state_h;
  if (a.state_out) x.state_out = a.state_out + (a.slot_out ? a.slot_out[b] : b) * a.state_slot + h * a.state_h;
  if (x.T == 0) return x; /* the other pointers may be NULL */
  x.q = from(a.q, row * a.q_b + t * a.q_t + hk * a.q_h, a.dtype);
  x.k = from(a.k, row * a.k_b + t * a.k_t + hk * a.k_h, a.dtype);
  x.v = from(a.v, row * a.v_b + t * a.v_t + h * a.v_h, a.dtype);
  if (a.g) x.g = a.g + row * a.g_b + t * a.g_t + h * a.g_h;
  x.beta = a.beta + row * a.beta_b + t * a.beta_t + h * a.beta_h;
  x.o = (void *)from(a.o, row * a.o_b + t * a.o_t + h * a.o_h, a.dtype);
  if (a.snapshots) x.snapshots = a.snapshots + row * a.snap_b + t * a.snap_t + h * a.snap_h;
  return x;
}

/* Every row starts at a multiple of `by` elements of `size` bytes. NULL does. */
inline bool starts_at(const void *p, int64_t s0, int64_t s1, int64_t s2, int64_t s3, int64_t by, int64_t size) {
  return !p || ((uintptr_t)p % (uintptr_t)(by * size) == 0 && (s0 | s1 | s2 | s3) % by == 0);
}

/* The same of four floats. */
inline bool aligned(const float *p, int64_t s0, int64_t s1, int64_t s2, int64_t s3) {
  return starts_at(p, s0, s1, s2, s3, 4, 4);
}

/* Whether rows of q and k start at a multiple of `by` elements. */
inline bool tokens_aligned(const q3n_gated_delta_args *a, int64_t by) {
  const int64_t size = a->dtype == Q3N_F32 ? 4 : 2;
  return starts_at(a->q, a->q_b, a->q_t, a->q_h, 0, by, size) && starts_at(a->k, a->k_b, a->k_t, a->k_h, 0, by, size);
}

} /* namespace */

#endif
