/* Integer tiles of words and decoded rows in NEON: matmul_simd.h. */
#include "../simd/neon.h"
#include "matmul_simd.h"

q3n_status q3n_matmul_neon(const q3n_matmul_args *a, int64_t begin, int64_t end, void *scratch);

q3n_status q3n_matmul_neon(const q3n_matmul_args *a, int64_t begin, int64_t end, void *scratch) {
  if (!q3n_matmul_has_q8(a, q3n_q8_tile_neon)) return q3n_matmul_f32(a, begin, end, scratch);
  return q3n_matmul_q8(a, begin, end, scratch, q3n_q8_tile_neon);
}
