/* Status codes: 0 is success; anything else names what is wrong and which argument. */
#ifndef Q3N_BASE_STATUS_H
#define Q3N_BASE_STATUS_H

#include <stdint.h>

/* What is wrong, in the low byte of a status. */
typedef enum q3n_kind {
  Q3N_OK = 0,
  Q3N_NULL,    /* a pointer that must be set is NULL */
  Q3N_SIZE,    /* a size is negative, unsupported or overflows */
  Q3N_STRIDE,  /* a stride is negative, or makes two elements of an output share memory */
  Q3N_ALIAS,   /* an output overlaps an argument that the header does not let it overlap */
  Q3N_SCRATCH, /* the scratch is NULL, too small or not 64-byte aligned */
  Q3N_DTYPE,   /* a dtype this operator does not take */
  Q3N_VALUE,   /* a value outside the range that the header states */
  Q3N_ISA,     /* the variant needs instructions that the CPU or the ISA mask does not offer */
  Q3N_RANGE,   /* begin, end is not a sub-range of 0, items */
  Q3N_NAN,     /* data that must be ordered holds a NaN */
  Q3N_ABI,     /* struct_bytes is not the size this library was built with */
  Q3N_DEVICE,  /* the CUDA runtime or the host executor failed: csrc/cuda/cuda.h tells its text */
  Q3N_KIND_COUNT
} q3n_kind;

/* Every argument name that a status can carry, in the second byte. */
typedef enum q3n_arg {
#define X(id, text) Q3N_ARG_##id,
#include "args.inc"
#undef X
  Q3N_ARG_COUNT
} q3n_arg;

/* kind | arg << 8. */
typedef int32_t q3n_status;

static inline q3n_status q3n_fail(q3n_kind kind, q3n_arg arg) {
  return (q3n_status)((uint32_t)kind | (uint32_t)arg << 8);
}

/* A sentence such as "k: is NULL". Static storage; never NULL, also for a value that is no status. */
const char *q3n_status_string(q3n_status status);

/* The argument's name alone, e.g. "k"; "" where the status names none. */
const char *q3n_status_arg(q3n_status status);

#endif
