/* Validation helpers for the <op>_check functions. Static inline: nothing here is exported. */
#ifndef Q3N_BASE_CHECK_H
#define Q3N_BASE_CHECK_H

#include <stdint.h>

#include "status.h"

/* Return from the enclosing check with (kind, arg) where `bad` holds. */
#define Q3N_REFUSE(bad, kind, arg)                          \
  do {                                                      \
    if (bad) return q3n_fail(Q3N_##kind, Q3N_ARG_##arg);    \
  } while (0)

/* One axis of a strided view: its length and the distance of neighbours, in elements. */
typedef struct q3n_axis {
  int64_t size, stride;
} q3n_axis;

/* Elements from the first to one past the last of a view; 0 where an axis is empty, -1 on a negative size or stride
   or on overflow. */
static inline int64_t q3n_extent(const q3n_axis *axis, int n) {
  int64_t last = 0;
  for (int i = 0; i < n; i++)
    if (axis[i].size < 0 || axis[i].stride < 0) return -1;
  for (int i = 0; i < n; i++) {
    if (axis[i].size == 0) return 0;
    int64_t reach;
    if (__builtin_mul_overflow(axis[i].size - 1, axis[i].stride, &reach) || __builtin_add_overflow(last, reach, &last))
      return -1;
  }
  return last < INT64_MAX / 8 ? last + 1 : -1;
}

/* 1 where no two indices of the view share an element: each axis steps over the whole extent of those with smaller
   strides. (Views that interleave in more intricate ways are refused.) An empty view has no two indices. */
static inline int q3n_disjoint(const q3n_axis *axis, int n) {
  for (int i = 0; i < n; i++)
    if (axis[i].size == 0) return 1;
  int64_t extent = 1, below = 0;
  for (int done = 0; done < n;) {
    /* the smallest stride not yet visited; equal strides fail through `extent` */
    int64_t next = INT64_MAX;
    for (int i = 0; i < n; i++)
      if (axis[i].size > 1 && axis[i].stride > below && axis[i].stride < next) next = axis[i].stride;
    if (next == INT64_MAX) break;
    for (int i = 0; i < n; i++)
      if (axis[i].size > 1 && axis[i].stride == next) {
        if (next < extent) return 0;
        extent += (axis[i].size - 1) * next;
        done++;
      }
    below = next;
  }
  for (int i = 0; i < n; i++)
    if (axis[i].size > 1 && axis[i].stride == 0) return 0;
  return 1;
}

/* 1 where the byte ranges p..p+np and q..q+nq share a byte. */
static inline int q3n_overlap(const void *p, int64_t np, const void *q, int64_t nq) {
  uintptr_t a = (uintptr_t)p, b = (uintptr_t)q;
  return np > 0 && nq > 0 && a < b + (uintptr_t)nq && b < a + (uintptr_t)np;
}

/* a / b rounded up, for a >= 0, b > 0. */
static inline int64_t q3n_ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

/* Bytes rounded up to the scratch alignment. */
static inline int64_t q3n_align(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

#endif
