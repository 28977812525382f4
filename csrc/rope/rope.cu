/* A block a token: cosines and sines once into shared memory, then every head by the same table. */
#include "../cuda/launch.cuh"

extern "C" {
#include "rope.h"
}

namespace {

constexpr int THREADS = 128;
constexpr int64_t BLOCK_PAIRS = 1024;

/* Pairs first .. first + BLOCK_PAIRS of each head of a token: R has no limit, shared memory has. */
__global__ void __launch_bounds__(THREADS) rope_token(q3n_rope_args a) {
  Q3N_SHARED(float, cosine, BLOCK_PAIRS);
  Q3N_SHARED(float, sine, BLOCK_PAIRS);
  const int64_t half = a.R / 2, t = blockIdx.x;
  const int64_t first = (int64_t)blockIdx.y * BLOCK_PAIRS;
  const int64_t pairs = half - first < BLOCK_PAIRS ? half - first : BLOCK_PAIRS;
  const float *x = a.x + t * a.x_t;
  float *y = a.y + t * a.y_t;

  for (int64_t i = threadIdx.x; i < pairs; i += THREADS) {
    /* In double: at position 1e6 a float angle is off by up to 0.03 rad. */
    const double angle = (double)a.pos[t] * pow(a.base, -2.0 * (double)(first + i) / (double)a.R);
    cosine[i] = (float)cos(angle);
    sine[i] = (float)sin(angle);
  }
  __syncthreads();
  for (int64_t k = threadIdx.x; k < a.H * pairs; k += THREADS) {
    const int64_t h = k / pairs, i = k % pairs;
    const float c = cosine[i], s = sine[i];
    const float *from = x + h * a.x_h + first + i;
    float *to = y + h * a.y_h + first + i;
    const float low = from[0], high = from[half];
    to[0] = low * c - high * s;
    to[half] = low * s + high * c;
  }
  const int64_t tail = a.D - a.R;
  if (blockIdx.y == 0 && y != x)
    for (int64_t k = threadIdx.x; k < a.H * tail; k += THREADS) {
      const int64_t h = k / tail, d = a.R + k % tail;
      y[h * a.y_h + d] = x[h * a.x_h + d];
    }
}

} /* namespace */

Q3N_CUDA_SCRATCH(rope, rope) {
  (void)a;
  return 0;
}

Q3N_CUDA_OPERATOR(rope, rope) {
  (void)scratch;
  if (a->H == 0 || a->D == 0) return Q3N_OK;
  const int64_t parts = a->R ? (a->R / 2 + BLOCK_PAIRS - 1) / BLOCK_PAIRS : 1;
  return Q3N_LAUNCH(rope_token, (*a), q3n_dims(a->T, parts), THREADS, 0, stream);
}
