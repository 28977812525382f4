/* Integer tiles of words and decoded rows in NEON: moe_simd.h. */
#include "../simd/neon.h"
#include "moe_simd.h"

q3n_status q3n_moe_up_neon(const q3n_moe_up_args *a, int64_t begin, int64_t end, void *scratch);
q3n_status q3n_moe_down_neon(const q3n_moe_down_args *a, int64_t begin, int64_t end, void *scratch);

q3n_status q3n_moe_up_neon(const q3n_moe_up_args *a, int64_t begin, int64_t end, void *scratch) {
  if (!q3n_moe_up_has_q8(a, q3n_q8_tile_neon)) return q3n_moe_up_f32(a, begin, end, scratch);
  return q3n_moe_up_q8(a, begin, end, scratch, q3n_q8_tile_neon);
}

q3n_status q3n_moe_down_neon(const q3n_moe_down_args *a, int64_t begin, int64_t end, void *scratch) {
  if (!q3n_moe_down_has_q8(a, q3n_q8_tile_neon)) return q3n_moe_down_f32(a, begin, end, scratch);
  return q3n_moe_down_q8(a, begin, end, scratch, q3n_q8_tile_neon);
}
