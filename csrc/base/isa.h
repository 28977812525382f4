/* Which instruction sets a variant may use: what the CPU has, under a mask that tests and users can narrow. */
#ifndef Q3N_BASE_ISA_H
#define Q3N_BASE_ISA_H

#include <stdint.h>

typedef enum q3n_isa {
  Q3N_ISA_SCALAR = 0, /* plain C; always there, never masked */
  Q3N_ISA_AVX2,       /* AVX2 + FMA + F16C */
  Q3N_ISA_AVX512,     /* AVX-512 F BW DQ VL */
  Q3N_ISA_AVX512VNNI, /* AVX512 + VNNI */
  Q3N_ISA_AVX512BF16, /* AVX512VNNI + BF16 dot products */
  Q3N_ISA_NEON,       /* AArch64 Advanced SIMD */
  Q3N_ISA_NEONDOT,    /* NEON + 8-bit dot products (FEAT_DotProd) */
  Q3N_ISA_CUDA_HOST,  /* CUDA kernels on the CPU, in libraries built with `cuda-host`: to check them, not to be fast */
  Q3N_ISA_COUNT
} q3n_isa;

/* Bit i is set where q3n_isa i is present on this CPU (and its registers are enabled by the system). */
uint32_t q3n_isa_detect(void);

/* Allow only the ISAs whose bits are set (all by default). Affects later dispatch in every thread. */
void q3n_isa_set_mask(uint32_t mask);
uint32_t q3n_isa_mask(void);

/* 1 where the ISA is present and allowed by the mask. */
int32_t q3n_isa_available(q3n_isa isa);

/* "avx2"; "" for a value that is no q3n_isa. */
const char *q3n_isa_name(q3n_isa isa);

#endif
