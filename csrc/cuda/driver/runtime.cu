/* What launchers and their callers need of the CUDA runtime and driver: the text of a failure, whether there is a driver. */
#include <atomic>
#include <dlfcn.h>
#include <stdio.h>

#include "../launch.cuh"

static __thread char text[256], why[256];

extern "C" q3n_status q3n_cuda_failed(cudaError_t error) {
  snprintf(text, sizeof text, "%s: %s", cudaGetErrorName(error), cudaGetErrorString(error));
  return q3n_fail(Q3N_DEVICE, Q3N_ARG_KERNEL);
}

extern "C" const char *q3n_cuda_report(void) { return text; }

/* Two threads that come first at the same time open it twice, which is one library still. */
extern "C" void *q3n_driver_library(void) {
  static std::atomic<void *> library;
  void *open = library.load();
  if (open) return open;
  open = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!open) {
    const char *error = dlerror();
    snprintf(why, sizeof why, "no CUDA driver: %s", error ? error : "libcuda.so.1 can't be loaded");
    return nullptr;
  }
  library.store(open);
  return open;
}

extern "C" const char *q3n_cuda_driver_missing(void) { return q3n_driver_library() ? nullptr : why; }
