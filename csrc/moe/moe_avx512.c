/* Decoded rows in AVX-512, integers on the tiles of AVX2: moe_simd.h. */
#include "../simd/avx512.h"
#include "moe_simd.h"

q3n_status q3n_moe_up_avx512(const q3n_moe_up_args *a, int64_t begin, int64_t end, void *scratch);
q3n_status q3n_moe_down_avx512(const q3n_moe_down_args *a, int64_t begin, int64_t end, void *scratch);

static const q3n_q8_products products = {q3n_q8_tile_avx2, 10, NULL};

q3n_status q3n_moe_up_avx512(const q3n_moe_up_args *a, int64_t begin, int64_t end, void *scratch) {
  if (q3n_moe_up_has_q8(a, products)) return q3n_moe_up_q8(a, begin, end, scratch, products);
  return q3n_moe_up_f32(a, begin, end, scratch);
}

q3n_status q3n_moe_down_avx512(const q3n_moe_down_args *a, int64_t begin, int64_t end, void *scratch) {
  if (q3n_moe_down_has_q8(a, products)) return q3n_moe_down_q8(a, begin, end, scratch, products);
  return q3n_moe_down_f32(a, begin, end, scratch);
}
