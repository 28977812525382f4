/* What the CUDA kernels share: where the arrays of one head lie. */
#ifndef Q3N_GATED_DELTA_PARTS_CUH
#define Q3N_GATED_DELTA_PARTS_CUH

#include "../cuda/launch.cuh"

extern "C" {
#include "gated_delta.h"
}

namespace {

/* The arrays of one sequence and value head, as in gated_delta_parts.h. */
struct head {
  int64_t T;
  const float *q, *k, *v, *g, *beta, *state_in;
  float *o, *state_out, *snapshots;
};

__device__ __forceinline__ head find_head(const q3n_gated_delta_args &a, int64_t b, int64_t h) {
  const int64_t hk = a.head_map == Q3N_HEADS_GROUPED ? h / (a.HV / a.HK) : h % a.HK;
  const int64_t row = a.cu_seqlens ? 0 : b, t = a.cu_seqlens ? a.cu_seqlens[b] : 0;
  head x = {};
  x.T = a.cu_seqlens ? a.cu_seqlens[b + 1] - t : a.T;
  if (a.state_in) x.state_in = a.state_in + (a.slot_in ? a.slot_in[b] : b) * a.state_slot + h * a.state_h;
  if (a.state_out) x.state_out = a.state_out + (a.slot_out ? a.slot_out[b] : b) * a.state_slot + h * a.state_h;
  if (x.T == 0) return x; /* the other pointers may be NULL */
  x.q = a.q + row * a.q_b + t * a.q_t + hk * a.q_h;
  x.k = a.k + row * a.k_b + t * a.k_t + hk * a.k_h;
  x.v = a.v + row * a.v_b + t * a.v_t + h * a.v_h;
  if (a.g) x.g = a.g + row * a.g_b + t * a.g_t + h * a.g_h;
  x.beta = a.beta + row * a.beta_b + t * a.beta_t + h * a.beta_h;
  x.o = a.o + row * a.o_b + t * a.o_t + h * a.o_h;
  if (a.snapshots) x.snapshots = a.snapshots + row * a.snap_b + t * a.snap_t + h * a.snap_h;
  return x;
}

/* Every row starts at a multiple of 16 bytes. NULL does. */
inline bool aligned(const float *p, int64_t s0, int64_t s1, int64_t s2, int64_t s3) {
  return !p || ((uintptr_t)p % 16 == 0 && (s0 | s1 | s2 | s3) % 4 == 0);
}

} /* namespace */

#endif
