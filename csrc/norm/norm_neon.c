/* Rows in NEON: norm_simd.h. */
#include "../simd/neon.h"
#include "norm_simd.h"

q3n_status q3n_norm_neon(const q3n_norm_args *a, int64_t begin, int64_t end, void *scratch);

q3n_status q3n_norm_neon(const q3n_norm_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  return run_rows(a, begin, end);
}
