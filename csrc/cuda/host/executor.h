/* What a .cu file sees where no CUDA compiler reads it: threads of a block as fibers on the CPU, with the built-in
   variables, barriers, warp operations, atomics and vector types that the kernels here use. README.md, one level up,
   says what is found and how. Included by launch.cuh alone; C++17. */
#ifndef Q3N_CUDA_HOST_EXECUTOR_H
#define Q3N_CUDA_HOST_EXECUTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace q3n_host {

/* Where in the source something happens: the default arguments are those of the caller. */
struct place {
  const char *file;
  int line;
};

/* Who touched an element of a shared array last, where, and between which barriers. `epoch` counts barriers over all
   blocks, `warp_epoch` the __syncwarp of the thread's warp. */
struct shadow {
  uint32_t write_epoch, read_epoch;
  int32_t write_line, read_line;
  uint16_t writer, reader;
  uint16_t write_warp_epoch, read_warp_epoch;
  bool atomic, many_lanes, many_warps; /* of the write; of the reads */
};

/* A shared array of the block that runs. */
struct array {
  const void *declared; /* one address a declaration (and template instance) */
  const char *name;
  char *data;
  shadow *words;
  int64_t count, size, offset; /* elements, bytes of one, bytes from the start of dynamic memory or -1 */
};

struct lane_call;
/* Computes what the lanes of a warp get, once all that `mask` names have come. */
typedef void (*finish)(lane_call *const *lane, unsigned mask);

/* What a lane brings to a warp operation, and what it takes away. */
struct lane_call {
  finish op;
  unsigned mask;
  int parameter, width, bytes;
  const void *in;
  void *out;
  place at;
};

struct pending_copy;

/* One CUDA thread. */
struct thread {
  uint3 index;
  int id, lane, warp;
  enum { READY, AT_BARRIER, AT_WARP, DONE } state;
  place at; /* the barrier or warp operation it waits at */
  lane_call call;
  void *stack_pointer;
  pending_copy *copies;
  int copy_count, copy_group;
};

/* The block that runs, for the built-in variables. */
struct current {
  thread *self = nullptr;
  uint3 block = {};
  dim3 block_dim, grid_dim;
};
extern __thread current now;

/* Stops the launch with a report and does not return. */
[[noreturn]] void fail(place at, const char *format, ...) __attribute__((format(printf, 2, 3)));

void barrier(place at);
/* Orders memory where `mask` names all 32 lanes; a smaller one only waits. */
void sync_warp(unsigned mask, place at);
void warp(unsigned mask, finish op, int parameter, int width, const void *in, int bytes, void *out, place at);
/* offset < 0: a static array; else bytes from the start of the launch's dynamic shared memory. */
array *find_array(const void *declared, const char *name, int64_t count, int64_t size, int64_t offset, place at);
void on_read(array *a, int64_t first, int64_t n, place at);
void on_write(array *a, int64_t first, int64_t n, place at);
void on_atomic(array *a, int64_t first, place at);
void copy_async(array *a, int64_t first, int64_t n, const void *from, place at);
void copy_commit();
void copy_wait(int groups);

/* Runs the blocks of a grid one after the other; `body` is the kernel, called by every thread. false: there is a
   report. */
bool launch(const char *kernel, dim3 grid, dim3 block, int64_t dynamic_bytes, void (*body)(const void *),
            const void *context);
template <class F> bool launch_closure(const char *kernel, dim3 grid, dim3 block, int64_t bytes, const F &f) {
  return launch(kernel, grid, block, bytes, [](const void *context) { (*(const F *)context)(); }, &f);
}

/* An index with the line it stands in. */
struct index {
  int64_t value;
  place at;
  template <class I>
  index(I i, const char *file = __builtin_FILE(), int line = __builtin_LINE()) : value((int64_t)i), at{file, line} {}
};

template <class T> struct pointer;

/* An element of a shared array: reading and assigning are told to the executor. */
template <class T> struct element {
  array *a;
  int64_t i;
  place at;
  operator T() const {
    on_read(a, i, 1, at);
    return ((const T *)a->data)[i];
  }
  T operator=(T value) const {
    on_write(a, i, 1, at);
    return ((T *)a->data)[i] = value;
  }
  T operator=(const element &other) const { return *this = (T)other; }
  T operator+=(T value) const { return *this = (T)*this + value; }
  T operator-=(T value) const { return *this = (T)*this - value; }
  T operator*=(T value) const { return *this = (T)*this * value; }
  pointer<T> operator&() const { return {a, i}; }
};

/* A pointer into a shared array: it knows the array's bounds. */
template <class T> struct pointer {
  array *a;
  int64_t i;
  element<T> operator[](index k) const { return {a, i + k.value, k.at}; }
  pointer operator+(int64_t k) const { return {a, i + k}; }
  pointer operator-(int64_t k) const { return {a, i - k}; }
  pointer &operator+=(int64_t k) {
    i += k;
    return *this;
  }
};

/* The N elements of U from p on, as one access, which must be aligned as the vector it is on a GPU. */
template <class V, class T> V load(pointer<T> p, place at) {
  const int64_t n = (int64_t)(sizeof(V) / sizeof(T));
  if (p.i % n != 0)
    fail(at, "misaligned: %s[%lld] is read as a vector of %lld", p.a->name, (long long)p.i, (long long)n);
  on_read(p.a, p.i, n, at);
  V v;
  memcpy(&v, p.a->data + p.i * (int64_t)sizeof(T), sizeof v);
  return v;
}
template <class V, class T> void store(pointer<T> p, V v, place at) {
  const int64_t n = (int64_t)(sizeof(V) / sizeof(T));
  if (p.i % n != 0)
    fail(at, "misaligned: %s[%lld] is written as a vector of %lld", p.a->name, (long long)p.i, (long long)n);
  on_write(p.a, p.i, n, at);
  memcpy(p.a->data + p.i * (int64_t)sizeof(T), &v, sizeof v);
}

/* What a lane gets from another one, or keeps where `from` lies outside its part of the warp. */
inline void exchange(lane_call *const *lane, unsigned mask, int (*source)(int lane, int parameter, int width)) {
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1u) {
      const lane_call &call = *lane[i];
      const int from = source(i, call.parameter, call.width);
      if (!(mask >> from & 1u))
        fail(call.at, "lane %d reads lane %d, which the mask %08x does not name", i, from, mask);
      memcpy(call.out, lane[from]->in, (size_t)call.bytes);
    }
}
inline void finish_idx(lane_call *const *lane, unsigned mask) {
  exchange(lane, mask, [](int i, int p, int width) { return (i & ~(width - 1)) | (p & (width - 1)); });
}
inline void finish_up(lane_call *const *lane, unsigned mask) {
  exchange(lane, mask, [](int i, int p, int width) { return (i & (width - 1)) >= p ? i - p : i; });
}
inline void finish_down(lane_call *const *lane, unsigned mask) {
  exchange(lane, mask, [](int i, int p, int width) { return (i & (width - 1)) + p < width ? i + p : i; });
}
inline void finish_xor(lane_call *const *lane, unsigned mask) {
  exchange(lane, mask, [](int i, int p, int width) { return (i ^ p) < (i | (width - 1)) + 1 ? i ^ p : i; });
}
inline void finish_ballot(lane_call *const *lane, unsigned mask) {
  unsigned votes = 0;
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1u) votes |= (unsigned)(lane[i]->parameter != 0) << i;
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1u) memcpy(lane[i]->out, &votes, sizeof votes);
}

inline void finish_match(lane_call *const *lane, unsigned mask) {
  for (int i = 0; i < 32; i++) {
    unsigned same = 0;
    if (!(mask >> i & 1u)) continue;
    for (int j = 0; j < 32; j++)
      if (mask >> j & 1u && memcmp(lane[i]->in, lane[j]->in, (size_t)lane[i]->bytes) == 0) same |= 1u << j;
    memcpy(lane[i]->out, &same, sizeof same);
  }
}

template <class T> T shuffle(unsigned mask, finish op, T value, int parameter, int width, place at) {
  T out = value;
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail(at, "a width of %d lanes is no power of two up to 32", width);
  warp(mask, op, parameter, width, &value, (int)sizeof value, &out, at);
  return out;
}

} /* namespace q3n_host */

#define threadIdx (q3n_host::now.self->index)
#define blockIdx (q3n_host::now.block)
#define blockDim (q3n_host::now.block_dim)
#define gridDim (q3n_host::now.grid_dim)

/* The line of these is the caller's. */
#define Q3N_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(Q3N_AT) { q3n_host::barrier({file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, Q3N_AT) { q3n_host::sync_warp(mask, {file, line}); }

template <class T> T __shfl_sync(unsigned mask, T v, int lane, int width = 32, Q3N_AT) {
  return q3n_host::shuffle(mask, q3n_host::finish_idx, v, lane, width, {file, line});
}
template <class T> T __shfl_up_sync(unsigned mask, T v, int by, int width = 32, Q3N_AT) {
  return q3n_host::shuffle(mask, q3n_host::finish_up, v, by, width, {file, line});
}
template <class T> T __shfl_down_sync(unsigned mask, T v, int by, int width = 32, Q3N_AT) {
  return q3n_host::shuffle(mask, q3n_host::finish_down, v, by, width, {file, line});
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int by, int width = 32, Q3N_AT) {
  return q3n_host::shuffle(mask, q3n_host::finish_xor, v, by, width, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int vote, Q3N_AT) {
  unsigned votes = 0;
  q3n_host::warp(mask, q3n_host::finish_ballot, vote, 32, nullptr, 0, &votes, {file, line});
  return votes;
}
inline int __any_sync(unsigned mask, int vote, Q3N_AT) { return __ballot_sync(mask, vote, file, line) != 0; }
inline int __all_sync(unsigned mask, int vote, Q3N_AT) { return __ballot_sync(mask, vote, file, line) == mask; }

/* The lanes with the same value. */
template <class T> unsigned __match_any_sync(unsigned mask, T value, Q3N_AT) {
  unsigned same = 0;
  q3n_host::warp(mask, q3n_host::finish_match, 0, 32, &value, (int)sizeof value, &same, {file, line});
  return same;
}

template <class T> T __ldg(const T *p) { return *p; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __float_as_int(float x) {
  int i;
  memcpy(&i, &x, sizeof i);
  return i;
}
inline float __int_as_float(int i) {
  float x;
  memcpy(&x, &i, sizeof x);
  return x;
}
inline unsigned __float_as_uint(float x) { return (unsigned)__float_as_int(x); }
inline float __uint_as_float(unsigned i) { return __int_as_float((int)i); }
/* The low word of (high:low) >> shift % 32. */
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return (unsigned)(((uint64_t)high << 32 | low) >> shift % 32);
}
/* Byte i is the one of (b:a) that nibble i of s names; bit 3 fills it with that byte's sign. */
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
  const uint64_t from = (uint64_t)b << 32 | a;
  unsigned to = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned nibble = s >> 4 * i & 15u, byte = (unsigned)(from >> 8 * (nibble & 7u)) & 0xffu;
    to |= (nibble & 8u ? byte >> 7 ? 0xffu : 0u : byte) << 8 * i;
  }
  return to;
}

/* Sum of four products of signed bytes, added to c. */
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; i++) c += (int8_t)((unsigned)a >> 8 * i) * (int8_t)((unsigned)b >> 8 * i);
  return c;
}

/* Threads take turns only where they wait, so an atomic operation on global memory is an ordinary one. */
template <class T> T atomicAdd(T *p, T v) {
  T old = *p;
  *p = old + v;
  return old;
}
template <class T> T atomicMin(T *p, T v) {
  T old = *p;
  if (v < old) *p = v;
  return old;
}
template <class T> T atomicMax(T *p, T v) {
  T old = *p;
  if (old < v) *p = v;
  return old;
}
template <class T> T *q3n_host_atomic(q3n_host::pointer<T> p, q3n_host::place at) {
  q3n_host::on_atomic(p.a, p.i, at);
  return (T *)p.a->data + p.i;
}
template <class T> T atomicAdd(q3n_host::pointer<T> p, T v, Q3N_AT) {
  return atomicAdd(q3n_host_atomic(p, {file, line}), v);
}
template <class T> T atomicMin(q3n_host::pointer<T> p, T v, Q3N_AT) {
  return atomicMin(q3n_host_atomic(p, {file, line}), v);
}
template <class T> T atomicMax(q3n_host::pointer<T> p, T v, Q3N_AT) {
  return atomicMax(q3n_host_atomic(p, {file, line}), v);
}

#endif
