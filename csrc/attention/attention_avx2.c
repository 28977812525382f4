/* Register tiles in AVX2: attention_tile_simd.h. */
#include "../simd/avx2.h"
#include "attention_tile_simd.h"

q3n_status q3n_attention_tile_avx2(const q3n_attention_args *a, int64_t begin, int64_t end, void *scratch);

int64_t q3n_attention_avx2_scratch(const q3n_attention_args *a) { return tile_scratch(a); }

q3n_status q3n_attention_tile_avx2(const q3n_attention_args *a, int64_t begin, int64_t end, void *scratch) {
  return run_tiles(a, begin, end, scratch);
}

q3n_status q3n_attention_merge_avx2(const q3n_attention_merge_args *a, int64_t begin, int64_t end, void *scratch);

q3n_status q3n_attention_merge_avx2(const q3n_attention_merge_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  return run_merge(a, begin, end);
}
