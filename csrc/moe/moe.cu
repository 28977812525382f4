/* The router: a warp a token. The next best expert is the maximum over those that come after the last one in the order
   (logit down, index up), so nothing is stored between the passes over the logits, which the L1 cache holds. */
#include "../cuda/reduce.cuh"

extern "C" {
#include "moe.h"
}

namespace {

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr unsigned ALL = 0xffffffffu;

/* As in moe_scalar.c: exponentials are added as integers, which has one result in any order. */
constexpr float UNIT = 140737488355328.0f; /* 2^47 */

__device__ __forceinline__ float unnormalized(float logit, float max) {
  return logit == max ? 1.0f : expf(logit - max);
}

struct choice {
  float logit;
  int expert; /* -1: none */
};

__device__ __forceinline__ bool before(choice a, choice b) {
  if (a.expert < 0 || b.expert < 0) return b.expert < 0 && a.expert >= 0;
  return a.logit > b.logit || (a.logit == b.logit && a.expert < b.expert);
}

/* The first in the order of those behind `last`. */
__device__ __forceinline__ choice next(const float *logits, int E, choice last, int lane) {
  choice best = {0.0f, -1};
  for (int e = lane; e < E; e += 32) {
    const choice here = {logits[e], e};
    if ((last.expert < 0 || before(last, here)) && before(here, best)) best = here;
  }
  for (int by = 16; by > 0; by /= 2) {
    const choice other = {__shfl_xor_sync(ALL, best.logit, by), __shfl_xor_sync(ALL, best.expert, by)};
    if (before(other, best)) best = other;
  }
  return best;
}

__global__ void __launch_bounds__(THREADS) route(q3n_moe_route_args a) {
  const int64_t t = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
  const int lane = (int)(threadIdx.x % 32), E = (int)a.E, top_k = (int)a.top_k;
  if (t >= a.T) return; /* a whole warp */
  const float *logits = a.logits + t * a.logits_t;
  int32_t *ids = a.ids + t * a.top_k;
  float *weights = a.weights + t * a.top_k;

  int bad = 0;
  for (int e = lane; e < E; e += 32) bad |= logits[e] != logits[e];
  if (__any_sync(ALL, bad)) {
    if (lane == 0 && a.bad_token) atomicMin((long long *)a.bad_token, (long long)t);
    return;
  }

  choice chosen = next(logits, E, {0.0f, -1}, lane);
  const float max = chosen.logit;
  uint64_t units = 0;
  for (int e = lane; e < E; e += 32) units += (uint64_t)(unnormalized(logits[e], max) * UNIT);
  const double total = (double)q3n_warp_sum(units) / (double)UNIT;

  double sum = 0.0;
  for (int c = 0; c < top_k; c++) {
    if (c > 0) chosen = next(logits, E, chosen, lane);
    const float weight = (float)((double)unnormalized(chosen.logit, max) / total);
    sum += (double)weight;
    if (lane == 0) {
      ids[c] = chosen.expert;
      weights[c] = weight;
    }
  }
  if (!a.normalize) return;
  __syncwarp();
  for (int c = lane; c < top_k; c += 32) weights[c] = (float)((double)weights[c] / sum);
}

} /* namespace */

Q3N_CUDA_SCRATCH(moe_route, moe_route) {
  (void)a;
  return 0;
}

Q3N_CUDA_OPERATOR(moe_route, moe_route) {
  (void)scratch;
  return Q3N_LAUNCH(route, (*a), (a->T + WARPS - 1) / WARPS, THREADS, 0, stream);
}
