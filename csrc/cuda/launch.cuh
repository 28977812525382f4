/* What every .cu file includes first: shared memory, vector loads, the launch, in one spelling for nvcc and for the
   host executor. Everything is static: nvcc's and the executor's copies of a kernel may stand in one library. */
#ifndef Q3N_CUDA_LAUNCH_CUH
#define Q3N_CUDA_LAUNCH_CUH

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#include <stdint.h>
#else
#include "host/executor.h"
#endif

extern "C" {
#include "../base/status.h"
#include "cuda.h"
}

#if defined(__CUDACC__)
#define Q3N_UNROLL _Pragma("unroll")
#define Q3N_ROLL _Pragma("unroll 1")
#else
#define Q3N_UNROLL
#define Q3N_ROLL
#endif

/* Q3N_SHARED(T, name, count): a shared array of the block.
   Q3N_SHARED_DYNAMIC(T, name, offset, count): one in the launch's dynamic memory, `offset` bytes (a multiple of 16) in.
   q3n_shared<T>: a pointer into one; like T * it has [], + and -, and elements have = and += (but `auto x = s[i]`
   is no copy on the host: write the type). */
#if defined(__CUDACC__)
#define Q3N_SHARED(T, name, count) __shared__ __align__(16) T name[count]
extern __shared__ __align__(16) unsigned char q3n_dynamic_shared[];
#define Q3N_SHARED_DYNAMIC(T, name, offset, count) T *const name = reinterpret_cast<T *>(q3n_dynamic_shared + (offset))
template <class T> using q3n_shared = T *;
#else
#define Q3N_SHARED(T, name, count) Q3N_HOST_SHARED(T, name, count, -1)
#define Q3N_SHARED_DYNAMIC(T, name, offset, count) Q3N_HOST_SHARED(T, name, count, offset)
#define Q3N_HOST_SHARED(T, name, count, offset)                                                                 \
  static const char q3n_declared_##name = 0;                                                                    \
  const q3n_host::pointer<T> name = {                                                                           \
      q3n_host::find_array(&q3n_declared_##name, #name, count, sizeof(T), offset, {__FILE__, __LINE__}), 0}
template <class T> using q3n_shared = q3n_host::pointer<T>;
#endif

/* V at p, one access: p is a pointer to global memory or into a shared array, aligned to sizeof(V). */
#if defined(__CUDACC__)
template <class V, class T> static __device__ __forceinline__ V q3n_load(const T *p) {
  return *reinterpret_cast<const V *>(p);
}
template <class V, class T> static __device__ __forceinline__ void q3n_store(T *p, V v) {
  *reinterpret_cast<V *>(p) = v;
}
#else
template <class V, class T> static inline V q3n_load(q3n_host::pointer<T> p, Q3N_AT) {
  return q3n_host::load<V>(p, {file, line});
}
template <class V, class T> static inline void q3n_store(q3n_host::pointer<T> p, V v, Q3N_AT) {
  q3n_host::store<V>(p, v, {file, line});
}
template <class V, class T> static inline V q3n_load(const T *p, Q3N_AT) {
  if ((uintptr_t)p % sizeof(V))
    q3n_host::fail({file, line}, "misaligned: a vector of %d bytes in global memory", (int)sizeof(V));
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T> static inline void q3n_store(T *p, V v, Q3N_AT) {
  if ((uintptr_t)p % sizeof(V))
    q3n_host::fail({file, line}, "misaligned: a vector of %d bytes in global memory", (int)sizeof(V));
  memcpy(p, &v, sizeof v);
}
#endif

/* 16 bytes from global to shared memory in the background (compute capability 8.0): `wait<N>` returns when all but
   the last N committed groups of this thread have arrived; other threads see them behind a barrier. */
#if defined(__CUDACC__)
template <class T> static __device__ __forceinline__ void q3n_copy_async16(T *to, const T *from) {
  const unsigned at = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}
static __device__ __forceinline__ void q3n_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> static __device__ __forceinline__ void q3n_copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#else
template <class T> static inline void q3n_copy_async16(q3n_host::pointer<T> to, const T *from, Q3N_AT) {
  const int64_t n = 16 / (int64_t)sizeof(T);
  if (to.i % n || (uintptr_t)from % 16) q3n_host::fail({file, line}, "misaligned: cp.async of 16 bytes");
  q3n_host::copy_async(to.a, to.i, n, from, {file, line});
}
static inline void q3n_copy_commit() { q3n_host::copy_commit(); }
template <int N> static inline void q3n_copy_wait() { q3n_host::copy_wait(N); }
#endif

/* Sizes of a grid or block, before anyone knows that they fit. */
struct q3n_dims {
  int64_t x, y, z;
  q3n_dims(int64_t a, int64_t b = 1, int64_t c = 1) : x(a), y(b), z(c) {}
};

static inline bool q3n_launchable(q3n_dims grid, q3n_dims block) {
  return grid.x <= INT32_MAX && grid.y <= 65535 && grid.z <= 65535 && block.x <= 1024 && block.y <= 1024 &&
         block.z <= 64 && block.x * block.y * block.z <= 1024 && block.x > 0 && block.y > 0 && block.z > 0;
}

static inline dim3 q3n_dim3(q3n_dims d) { return dim3((unsigned)d.x, (unsigned)d.y, (unsigned)d.z); }

/* Q3N_LAUNCH(kernel, (arguments), grid, block, dynamic_bytes, stream): a q3n_status. A grid without blocks does
   nothing; one over the limits is refused, never cut. A template's name with a comma goes in parentheses. */
#if defined(__CUDACC__)
extern "C" q3n_status q3n_cuda_failed(cudaError_t error); /* driver/runtime.cu */
template <class K, class F>
static q3n_status q3n_launch(K kernel, q3n_dims grid, q3n_dims block, int64_t bytes, const F &start) {
  if (grid.x <= 0 || grid.y <= 0 || grid.z <= 0) return Q3N_OK;
  if (!q3n_launchable(grid, block)) return q3n_fail(Q3N_SIZE, Q3N_ARG_GRID);
  if (bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (error != cudaSuccess) return q3n_cuda_failed(error);
  }
  start(q3n_dim3(grid), q3n_dim3(block));
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? Q3N_OK : q3n_cuda_failed(error);
}
#define Q3N_LAUNCH(kernel, arguments, grid, block, dynamic_bytes, stream)                                       \
  q3n_launch(kernel, grid, block, dynamic_bytes,                                                                \
             [&](dim3 q3n_g, dim3 q3n_b) { kernel<<<q3n_g, q3n_b, (size_t)(dynamic_bytes), stream>>> arguments; })
#else
template <class F>
static q3n_status q3n_launch(const char *name, q3n_dims grid, q3n_dims block, int64_t bytes, const F &start) {
  if (grid.x <= 0 || grid.y <= 0 || grid.z <= 0) return Q3N_OK;
  if (!q3n_launchable(grid, block)) return q3n_fail(Q3N_SIZE, Q3N_ARG_GRID);
  const bool good = q3n_host::launch_closure(name, q3n_dim3(grid), q3n_dim3(block), bytes, start);
  return good ? Q3N_OK : q3n_fail(Q3N_DEVICE, Q3N_ARG_KERNEL);
}
#define Q3N_LAUNCH(kernel, arguments, grid, block, dynamic_bytes, stream)                                       \
  ((void)(stream), q3n_launch(#kernel, grid, block, dynamic_bytes, [&] { kernel arguments; }))
#endif

/* Whether a launcher may begin: scratch is there if any is needed, and aligned. */
template <class F> static bool q3n_scratch_is_good(const void *scratch, const F &bytes) {
  return (uintptr_t)scratch % 64 == 0 && (scratch || bytes() <= 0);
}

/* Q3N_CUDA_OPERATOR(op, name) { the launcher }: defines what Q3N_DECLARE_CUDA(op, name) declares, but for scratch,
   which is Q3N_CUDA_SCRATCH(op, name) { ... }. The body sees `a`, `scratch` and `stream`. */
#if defined(__CUDACC__)
#define Q3N_CUDA_OPERATOR(op, name)                                                                             \
  static q3n_status q3n_##name##_launch(const q3n_##op##_args *a, void *scratch, q3n_stream stream);            \
  extern "C" q3n_status q3n_##name##_cuda(const q3n_##op##_args *a, void *scratch, q3n_stream stream) {         \
    if (!q3n_scratch_is_good(scratch, [&] { return q3n_##name##_cuda_scratch_bytes(a); }))                      \
      return q3n_fail(Q3N_SCRATCH, Q3N_ARG_SCRATCH);                                                            \
    return q3n_##name##_launch(a, scratch, stream);                                                             \
  }                                                                                                             \
  static q3n_status q3n_##name##_launch(const q3n_##op##_args *a, void *scratch, q3n_stream stream)
#define Q3N_CUDA_SCRATCH(op, name) extern "C" int64_t q3n_##name##_cuda_scratch_bytes(const q3n_##op##_args *a)
#else
#define Q3N_CUDA_OPERATOR(op, name)                                                                             \
  static q3n_status q3n_##name##_launch(const q3n_##op##_args *a, void *scratch, q3n_stream stream);            \
  extern "C" int64_t q3n_##name##_cuda_host_items(const q3n_##op##_args *) { return 1; }                        \
  extern "C" q3n_status q3n_##name##_cuda_host(const q3n_##op##_args *a, int64_t, int64_t, void *scratch) {     \
    if (!q3n_scratch_is_good(scratch, [&] { return q3n_##name##_cuda_host_scratch_bytes(a); }))                 \
      return q3n_fail(Q3N_SCRATCH, Q3N_ARG_SCRATCH);                                                            \
    return q3n_##name##_launch(a, scratch, nullptr);                                                            \
  }                                                                                                             \
  static q3n_status q3n_##name##_launch(const q3n_##op##_args *a, void *scratch, q3n_stream stream)
#define Q3N_CUDA_SCRATCH(op, name)                                                                              \
  extern "C" int64_t q3n_##name##_cuda_host_scratch_bytes(const q3n_##op##_args *a)
#endif

/* What the current device has: bytes of shared memory that a block may take, multiprocessors. The executor is an H100. */
#if defined(__CUDACC__)
static inline int64_t q3n_device_attribute(cudaDeviceAttr which) {
  int device, value;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) return 0;
  return value;
}
static inline int64_t q3n_shared_limit() { return q3n_device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
static inline int64_t q3n_multiprocessors() { return q3n_device_attribute(cudaDevAttrMultiProcessorCount); }
#else
static inline int64_t q3n_shared_limit() { return 227 * 1024; }
static inline int64_t q3n_multiprocessors() { return 132; }
#endif

/* Q3N_CUDA_CALL(name, a, scratch, stream): another operator's launcher. */
#if defined(__CUDACC__)
#define Q3N_CUDA_CALL(name, a, scratch, stream) q3n_##name##_cuda(a, scratch, stream)
#else
#define Q3N_CUDA_CALL(name, a, scratch, stream) ((void)(stream), q3n_##name##_cuda_host(a, 0, 1, scratch))
#endif

#endif
