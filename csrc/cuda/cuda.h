/* How an operator that has CUDA kernels declares them; README.md in this folder. */
#ifndef Q3N_CUDA_CUDA_H
#define Q3N_CUDA_CUDA_H

#include <stdint.h>

#include "../base/status.h"

/* A cudaStream_t and a CUstream; NULL is the default stream. */
typedef struct CUstream_st *q3n_stream;

/* Three builds: with kernels for GPUs (feature `cuda`, CMake's Q3N_CUDA), with the host executor, which runs them on
   the CPU (`cuda-host`, Q3N_CUDA_HOST), with both. An engine to be tested without a GPU defines Q3N_CUDA_ON_HOST, as
   CMake's targets do where there is the executor alone: the functions for GPUs are then the executor's. Memory is the
   CPU's, a stream nothing, and a launch returns when all is done. */

#if defined(Q3N_CUDA_ON_HOST)
const char *q3n_cuda_host_report(void);
static inline const char *q3n_cuda_report(void) { return q3n_cuda_host_report(); }
static inline const char *q3n_cuda_driver_missing(void) { return 0; }
#else
/* What a Q3N_DEVICE that this thread got last means: the text of the CUDA runtime. For GPUs. An error of the runtime
   that the thread had left unread comes out as the launch's. */
const char *q3n_cuda_report(void);

/* NULL where the CUDA driver is loaded (it is, with the first call), else why it can't be. For GPUs. */
const char *q3n_cuda_driver_missing(void);

/* The report of the host executor: kernel, block, thread, what is wrong, file and line. */
const char *q3n_cuda_host_report(void);
#endif

/* Declares, for kernels named q3n_<name> of an operator `op`:
   q3n_<name>_cuda                 queues the call on `stream` and returns; pointers in args, and scratch, are device
                                   memory, and args passed q3n_<op>_check with index arrays that the CPU can read.
                                   Nothing is allocated and nothing waited for. args may go after the return. What is
                                   launched depends on args alone, not on what its pointers point to: a captured call
                                   can be launched again for other contents.
   q3n_<name>_cuda_scratch_bytes   bytes of scratch it needs, aligned to Q3N_SCRATCH_ALIGN; 0: it may be NULL
   and the same for the host executor, in the form of a variant: one item, everything in CPU memory.

   Every operator but repack and quantize has q3n_<op>_cuda, which chooses by the sizes. Other names are there to be
   measured. */
#if defined(Q3N_CUDA_ON_HOST)
#define Q3N_DECLARE_CUDA(op, name)                                                                             \
  int64_t q3n_##name##_cuda_host_scratch_bytes(const q3n_##op##_args *args);                                   \
  q3n_status q3n_##name##_cuda_host(const q3n_##op##_args *args, int64_t begin, int64_t end, void *scratch);   \
  static inline q3n_status q3n_##name##_cuda(const q3n_##op##_args *args, void *scratch, q3n_stream stream) {  \
    (void)stream;                                                                                              \
    return q3n_##name##_cuda_host(args, 0, 1, scratch);                                                        \
  }                                                                                                            \
  static inline int64_t q3n_##name##_cuda_scratch_bytes(const q3n_##op##_args *args) {                         \
    return q3n_##name##_cuda_host_scratch_bytes(args);                                                         \
  }                                                                                                            \
  int64_t q3n_##name##_cuda_host_items(const q3n_##op##_args *args)
#else
#define Q3N_DECLARE_CUDA(op, name)                                                                             \
  q3n_status q3n_##name##_cuda(const q3n_##op##_args *args, void *scratch, q3n_stream stream);                 \
  int64_t q3n_##name##_cuda_scratch_bytes(const q3n_##op##_args *args);                                        \
  int64_t q3n_##name##_cuda_host_items(const q3n_##op##_args *args);                                           \
  int64_t q3n_##name##_cuda_host_scratch_bytes(const q3n_##op##_args *args);                                   \
  q3n_status q3n_##name##_cuda_host(const q3n_##op##_args *args, int64_t begin, int64_t end, void *scratch)
#endif

/* The line of a variant that the host executor runs, for <op>.inc: nothing in libraries built without it. Last in the
   list, behind a variant that is always there, so that dispatch never comes to it. */
#if defined(Q3N_CUDA_HOST)
#define Q3N_CUDA_HOST_VARIANT(X, op, variant, name)                                                            \
  X(op, variant, Q3N_ISA_CUDA_HOST, q3n_##name##_cuda_host_items, q3n_##name##_cuda_host_scratch_bytes,        \
    q3n_##name##_cuda_host)
#else
#define Q3N_CUDA_HOST_VARIANT(X, op, variant, name)
#endif

#endif
