/* Tiles in AVX2: solve_tri_simd.h. */
#include "../simd/avx2.h"
#include "solve_tri_simd.h"

q3n_status q3n_solve_tri_blocked_avx2(const q3n_solve_tri_args *a, int64_t begin, int64_t end, void *scratch);

int64_t q3n_solve_tri_avx2_items(const q3n_solve_tri_args *a) { return panel_items(a); }

int64_t q3n_solve_tri_avx2_scratch(const q3n_solve_tri_args *a) { return panel_scratch(a); }

q3n_status q3n_solve_tri_blocked_avx2(const q3n_solve_tri_args *a, int64_t begin, int64_t end, void *scratch) {
  return run_panels(a, begin, end, scratch);
}
