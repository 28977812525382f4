/* Sums and maxima over the lanes of a warp and the threads of a block. Every thread gets the result, by the same
   additions in the same order in every run. All threads of the warp or block must take part. */
#ifndef Q3N_CUDA_REDUCE_CUH
#define Q3N_CUDA_REDUCE_CUH

#include "launch.cuh"

/* Over groups of `width` neighbouring lanes (a power of two). */
template <class T> static __device__ __forceinline__ T q3n_warp_sum(T x, int width = 32) {
  for (int by = width / 2; by > 0; by /= 2) x += __shfl_xor_sync(0xffffffffu, x, by);
  return x;
}

/* NaN where a lane has one: of two numbers the larger, else what is no number. */
static __device__ __forceinline__ float q3n_max(float a, float b) { return a > b || a != a ? a : b; }

static __device__ __forceinline__ float q3n_warp_max(float x, int width = 32) {
  for (int by = width / 2; by > 0; by /= 2) x = q3n_max(x, __shfl_xor_sync(0xffffffffu, x, by));
  return x;
}

/* Over a block of whole warps, through `part`, 32 elements that nobody else uses between two barriers. */
template <class T> static __device__ __forceinline__ T q3n_block_sum(T x, q3n_shared<T> part) {
  const int lane = (int)(threadIdx.x % 32), warp = (int)(threadIdx.x / 32), warps = (int)(blockDim.x / 32);
  x = q3n_warp_sum(x);
  if (warps == 1) return x;
  __syncthreads();
  if (lane == 0) part[warp] = x;
  __syncthreads();
  T sum = 0;
  if (lane < warps) sum = part[lane];
  return q3n_warp_sum(sum);
}

/* The sum of x over the threads below this one; `all`: over the block. `part` as above, barriers included. */
template <class T> static __device__ __forceinline__ T q3n_block_below(T x, q3n_shared<T> part, T &all) {
  const int lane = (int)(threadIdx.x % 32), warp = (int)(threadIdx.x / 32), warps = (int)(blockDim.x / 32);
  T sum = x;
  for (int by = 1; by < 32; by *= 2) {
    const T lower = __shfl_up_sync(0xffffffffu, sum, by);
    if (lane >= by) sum += lower;
  }
  __syncthreads();
  if (lane == 31) part[warp] = sum;
  __syncthreads();
  T below = sum - x;
  all = 0;
  for (int w = 0; w < warps; w++) {
    const T theirs = part[w];
    if (w < warp) below += theirs;
    all += theirs;
  }
  return below;
}

#endif
