/* Tokens in AVX-512: rope_simd.h. */
#include "../simd/avx512.h"
#include "rope_simd.h"

q3n_status q3n_rope_avx512(const q3n_rope_args *a, int64_t begin, int64_t end, void *scratch);

int64_t q3n_rope_avx512_scratch(const q3n_rope_args *a) { return vector_scratch(a); }

q3n_status q3n_rope_avx512(const q3n_rope_args *a, int64_t begin, int64_t end, void *scratch) {
  return run_tokens(a, begin, end, scratch);
}
