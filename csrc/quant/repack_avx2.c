/* Groups in AVX2: repack_simd.h. */
#include "../simd/avx2.h"
#include "repack_simd.h"

q3n_status q3n_repack_avx2(const q3n_repack_args *a, int64_t begin, int64_t end, void *scratch);

q3n_status q3n_repack_avx2(const q3n_repack_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  return q3n_repack_groups(a, begin, end);
}
