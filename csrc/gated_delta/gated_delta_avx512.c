/* Both forms in AVX-512: gated_delta_recurrent_simd.h, gated_delta_chunked_simd.h. */
#include "../simd/avx512.h"
#include "gated_delta_chunked_simd.h"

q3n_status q3n_gated_delta_recurrent_avx512(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch);
q3n_status q3n_gated_delta_chunked32_avx512(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch);

int64_t q3n_gated_delta_recurrent_avx512_scratch(const q3n_gated_delta_args *a) {
  return q3n_align(recurrent_floats(a) * 4);
}

int64_t q3n_gated_delta_chunked32_avx512_scratch(const q3n_gated_delta_args *a) {
  return q3n_align(chunked_floats(a, 32) * 4);
}

q3n_status q3n_gated_delta_recurrent_avx512(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch) {
  Q3N_GATED_DELTA_F32_ALONE(a);
  return run_recurrent(a, begin, end, scratch);
}

q3n_status q3n_gated_delta_chunked32_avx512(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch) {
  Q3N_GATED_DELTA_F32_ALONE(a);
  return run_chunked(a, begin, end, scratch, 32);
}
