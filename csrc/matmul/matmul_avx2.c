/* Integer tiles on vpmaddubsw: matmul_simd.h. Without integer activations, or for types that have no tile, rows are
   decoded. */
#include "../simd/avx2.h"
#include "matmul_simd.h"

q3n_status q3n_matmul_avx2(const q3n_matmul_args *a, int64_t begin, int64_t end, void *scratch);

static const q3n_q8_products products = {q3n_q8_tile_avx2, 10, NULL};

q3n_status q3n_matmul_avx2(const q3n_matmul_args *a, int64_t begin, int64_t end, void *scratch) {
  if (q3n_matmul_has_q8(a, products)) return q3n_matmul_q8(a, begin, end, scratch, products);
  return q3n_matmul_f32(a, begin, end, scratch);
}
