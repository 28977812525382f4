/* Spans of channels in NEON: causal_conv_simd.h. */
#include "../simd/neon.h"
#include "causal_conv_simd.h"

q3n_status q3n_causal_conv_neon(const q3n_causal_conv_args *a, int64_t begin, int64_t end, void *scratch);

q3n_status q3n_causal_conv_neon(const q3n_causal_conv_args *a, int64_t begin, int64_t end, void *scratch) {
  (void)scratch;
  return run_spans(a, begin, end);
}
