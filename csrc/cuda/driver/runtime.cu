/* The text of a failure of the CUDA runtime. */
#include <stdio.h>

#include "../launch.cuh"

static __thread char text[256];

extern "C" q3n_status q3n_cuda_failed(cudaError_t error) {
  snprintf(text, sizeof text, "%s: %s", cudaGetErrorName(error), cudaGetErrorString(error));
  return q3n_fail(Q3N_DEVICE, Q3N_ARG_KERNEL);
}

extern "C" const char *q3n_cuda_report(void) { return text; }
