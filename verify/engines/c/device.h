/* An engine's own device memory and stream: of the CUDA runtime, or, where q3n's targets say that kernels run on the
   host executor, of the CPU. What a launch is called does not differ. */
#ifndef DEVICE_H
#define DEVICE_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "q3n.h"

#if defined(Q3N_CUDA_ON_HOST)

static const char *const device_kind = "the host executor";

/* NULL where there is a device, else why there is none. */
static inline const char *device_missing(void) { return q3n_cuda_driver_missing(); }

/* Filled with NaN, as floats. */
static inline void *device_alloc(size_t bytes) {
  void *p = aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (p) memset(p, 0xff, bytes);
  return p;
}
static inline void device_free(void *p) { free(p); }
static inline int device_copy(void *to, const void *from, size_t bytes) {
  memcpy(to, from, bytes);
  return 1;
}
static inline q3n_stream device_stream(void) { return NULL; }
static inline int device_wait(q3n_stream stream) { return stream == NULL; }
static inline void device_close(q3n_stream stream) { (void)stream; }

#else
#include <cuda_runtime_api.h>

static const char *const device_kind = "a GPU";

static inline int device_good(cudaError_t error, const char *what) {
  if (error == cudaSuccess) return 1;
  fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  return 0;
}

static inline const char *device_missing(void) {
  const char *why = q3n_cuda_driver_missing();
  int count = 0;
  if (why) return why;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count > 0 ? NULL : "no GPU";
  cudaGetLastError(); /* read, so that no launch reports it */
  return cudaGetErrorString(error);
}

static inline void *device_alloc(size_t bytes) {
  void *p = NULL;
  if (!device_good(cudaMalloc(&p, bytes), "cudaMalloc")) return NULL;
  return device_good(cudaMemset(p, 0xff, bytes), "cudaMemset") ? p : NULL;
}
static inline void device_free(void *p) { cudaFree(p); }
static inline int device_copy(void *to, const void *from, size_t bytes) {
  return device_good(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "cudaMemcpy");
}
/* One that the default stream, which copies use, waits for. */
static inline q3n_stream device_stream(void) {
  cudaStream_t stream = NULL;
  return device_good(cudaStreamCreate(&stream), "cudaStreamCreate") ? stream : NULL;
}
static inline int device_wait(q3n_stream stream) {
  return device_good(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}
static inline void device_close(q3n_stream stream) { cudaStreamDestroy(stream); }
#endif

#endif
