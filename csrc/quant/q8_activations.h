/* How rows of 8-bit activations lie in memory: x = d q with q = -127 .. 127, d = max |x| / 127 of the block. They are
   made at run time, once a row, and shared by all weights that the row meets; they are never stored in files. The sums
   serve types with minima and types whose values are moved to unsigned. */
#ifndef Q3N_QUANT_Q8_ACTIVATIONS_H
#define Q3N_QUANT_Q8_ACTIVATIONS_H

#include <stdint.h>

/* For weights with blocks of 32. */
typedef struct q3n_block_q8_x32 {
  float d;
  int32_t sum;
  int8_t q[32];
} q3n_block_q8_x32;

/* For weights with super-blocks of 256. Sums of every 32 and every 16 values, each group of four of them in the order
   0 2 1 3: the order in which bytes of packed scales widen to pairs of words. */
typedef struct q3n_block_q8_x256 {
  int8_t q[256];
  int16_t sum32[8];
  int16_t sum16[16];
  float d;
  uint8_t unused[12]; /* zero */
} q3n_block_q8_x256;

/* Offsets of the members, for kernels that address bytes. */
enum {
  Q3N_Q8_X32_SUM = 4,
  Q3N_Q8_X32_Q = 8,
  Q3N_Q8_X32_BYTES = 40,
  Q3N_Q8_X256_SUM32 = 256,
  Q3N_Q8_X256_SUM16 = 272,
  Q3N_Q8_X256_D = 304,
  Q3N_Q8_X256_BYTES = 320
};

/* Where sum i lies: 0 2 1 3, 4 6 5 7, ... */
static inline int q3n_q8_sum_at(int i) { return (i & ~3) | (i & 1) << 1 | (i >> 1 & 1); }

#endif
