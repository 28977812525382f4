/* Integer products on vpdpbusd: moe_simd.h. Without integer activations, or for types that have none, the f32 form does
   it. */
#include "../simd/avx512.h"
#include "moe_simd.h"

q3n_status q3n_moe_up_avx512(const q3n_moe_up_args *a, int64_t begin, int64_t end, void *scratch);
q3n_status q3n_moe_down_avx512(const q3n_moe_down_args *a, int64_t begin, int64_t end, void *scratch);
q3n_status q3n_moe_up_avx512vnni(const q3n_moe_up_args *a, int64_t begin, int64_t end, void *scratch);
q3n_status q3n_moe_down_avx512vnni(const q3n_moe_down_args *a, int64_t begin, int64_t end, void *scratch);

static const q3n_q8_products products = {q3n_q8_tile_avx512vnni, 12, q3n_q8_rows_avx512vnni};

q3n_status q3n_moe_up_avx512vnni(const q3n_moe_up_args *a, int64_t begin, int64_t end, void *scratch) {
  if (!q3n_moe_up_has_q8(a, products)) return q3n_moe_up_avx512(a, begin, end, scratch);
  return q3n_moe_up_q8(a, begin, end, scratch, products);
}

q3n_status q3n_moe_down_avx512vnni(const q3n_moe_down_args *a, int64_t begin, int64_t end, void *scratch) {
  if (!q3n_moe_down_has_q8(a, products)) return q3n_moe_down_avx512(a, begin, end, scratch);
  return q3n_moe_down_q8(a, begin, end, scratch, products);
}
