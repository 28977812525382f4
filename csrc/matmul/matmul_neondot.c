/* Integer tiles on sdot: matmul_simd.h. Without integer activations, or for types that have no tile, the f32 form
   does it. */
#include "../simd/neon.h"
#include "matmul_simd.h"

q3n_status q3n_matmul_neon(const q3n_matmul_args *a, int64_t begin, int64_t end, void *scratch);
q3n_status q3n_matmul_neondot(const q3n_matmul_args *a, int64_t begin, int64_t end, void *scratch);

static const q3n_q8_products products = {q3n_q8_tile_neondot, 10, NULL};

q3n_status q3n_matmul_neondot(const q3n_matmul_args *a, int64_t begin, int64_t end, void *scratch) {
  if (!q3n_matmul_has_q8(a, products)) return q3n_matmul_neon(a, begin, end, scratch);
  return q3n_matmul_q8(a, begin, end, scratch, products);
}
