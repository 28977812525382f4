/* What this machine can do at most: small kernels that only read, or only multiply and add, for the roofs that measured
   times are compared with. A kernel runs on the calling thread; time n as large as the clock needs. */
#ifndef Q3N_BASE_PEAK_H
#define Q3N_BASE_PEAK_H

#include <stdint.h>

#include "isa.h"

typedef enum q3n_peak_kind {
  Q3N_PEAK_READ = 0, /* memory read */
  Q3N_PEAK_F32,      /* f32 multiply and add */
  Q3N_PEAK_BF16,     /* products of bf16 pairs added to f32 */
  Q3N_PEAK_INT8,     /* products of unsigned by signed (Arm: signed) bytes added to int32 */
  Q3N_PEAK_COUNT
} q3n_peak_kind;

/* Bytes of operands that an arithmetic kernel reads, 64-byte aligned. Finite and small as f32, bf16 and int8. */
#define Q3N_PEAK_OPERANDS 1024

typedef struct q3n_peak {
  const char *name;
  q3n_peak_kind kind;
  q3n_isa isa;
  /* READ: bytes that n counts, so n is how many of these steps lie at data. Others: operations of one round, a product
     and a sum being two. */
  int64_t work;
  /* n steps or rounds. READ: data holds n * work bytes, 64-byte aligned. Others: Q3N_PEAK_OPERANDS bytes. The result
     depends on everything that was read or computed and means nothing. */
  uint32_t (*run)(const void *data, int64_t n);
} q3n_peak;

/* The kernels, in order of preference within a kind; at: NULL outside the list. */
int64_t q3n_peak_count(void);
const q3n_peak *q3n_peak_at(int64_t i);

/* "read"; "" for a value that is no q3n_peak_kind. */
const char *q3n_peak_kind_name(q3n_peak_kind kind);

#endif
