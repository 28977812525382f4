#include "isa.h"

#include <stdatomic.h>
#include <stddef.h>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

static _Atomic uint32_t mask = UINT32_MAX;

#if defined(__aarch64__)
/* The base of AArch64 does not say whether the dot products are there: the compiler's target or the system does. */
static int has_dot_products(void) {
#if defined(__ARM_FEATURE_DOTPROD)
  return 1;
#elif defined(__linux__)
  enum { ASIMDDP = 20 /* HWCAP_ASIMDDP, which old headers lack */ };
  return (int)(getauxval(AT_HWCAP) >> ASIMDDP & 1);
#elif defined(__APPLE__)
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, NULL, 0) == 0 && value != 0;
#else
  return 0;
#endif
}
#endif

uint32_t q3n_isa_detect(void) {
  uint32_t have = 1u << Q3N_ISA_SCALAR;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) have |= 1u << Q3N_ISA_AVX2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    have |= 1u << Q3N_ISA_AVX512;
    if (__builtin_cpu_supports("avx512vnni")) {
      have |= 1u << Q3N_ISA_AVX512VNNI;
      if (__builtin_cpu_supports("avx512bf16")) have |= 1u << Q3N_ISA_AVX512BF16;
    }
  }
#elif defined(__aarch64__)
  have |= 1u << Q3N_ISA_NEON;
  if (has_dot_products()) have |= 1u << Q3N_ISA_NEONDOT;
#endif
#if defined(Q3N_CUDA_HOST)
  have |= 1u << Q3N_ISA_CUDA_HOST;
#endif
  return have;
}

void q3n_isa_set_mask(uint32_t allowed) { atomic_store_explicit(&mask, allowed, memory_order_relaxed); }

uint32_t q3n_isa_mask(void) { return atomic_load_explicit(&mask, memory_order_relaxed); }

int32_t q3n_isa_available(q3n_isa isa) {
  if (isa == Q3N_ISA_SCALAR) return 1;
  if ((uint32_t)isa >= Q3N_ISA_COUNT) return 0;
  return (int32_t)((q3n_isa_mask() & q3n_isa_detect()) >> isa & 1u);
}

const char *q3n_isa_name(q3n_isa isa) {
  static const char *const name[Q3N_ISA_COUNT] = {"scalar",     "avx2", "avx512",  "avx512vnni",
                                                  "avx512bf16", "neon", "neondot", "cuda_host"};
  return (uint32_t)isa < Q3N_ISA_COUNT ? name[isa] : "";
}
