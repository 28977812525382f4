/* Tokens in NEON: rope_simd.h. */
#include "../simd/neon.h"
#include "rope_simd.h"

q3n_status q3n_rope_neon(const q3n_rope_args *a, int64_t begin, int64_t end, void *scratch);

int64_t q3n_rope_neon_scratch(const q3n_rope_args *a) { return vector_scratch(a); }

q3n_status q3n_rope_neon(const q3n_rope_args *a, int64_t begin, int64_t end, void *scratch) {
  return run_tokens(a, begin, end, scratch);
}
