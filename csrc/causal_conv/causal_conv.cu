/* A thread a channel: the window of W-1 inputs stays in registers, neighbouring threads read neighbouring channels.
   Long sequences are cut into runs of tokens. The thread of the first run reads the old state and writes the new one,
   which may lie in the same place: blocks run in any order. */
#include "../cuda/launch.cuh"

extern "C" {
#include "causal_conv.h"
}

namespace {

constexpr int THREADS = 128, MAX_WIDTH = 16;
constexpr int64_t RUN = 64;

/* Where sequence b lies. */
struct sequence {
  int64_t row, first, T;
};

__device__ __forceinline__ sequence find_sequence(const q3n_causal_conv_args &a, int64_t b) {
  if (!a.cu_seqlens) return {b, 0, a.T};
  return {0, a.cu_seqlens[b], a.cu_seqlens[b + 1] - a.cu_seqlens[b]};
}

/* WIDTH: the filter's, or 0 for any. The window is window[0 .. width-2], oldest first. */
template <int WIDTH> __global__ void __launch_bounds__(THREADS) conv_run(q3n_causal_conv_args a, int64_t runs) {
  const int width = WIDTH ? WIDTH : (int)a.width, keep = width - 1;
  const int64_t c = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (c >= a.C) return;
  for (int64_t item = blockIdx.y; item < a.B * runs; item += gridDim.y) {
    const int64_t b = item / runs, begin = item % runs * RUN;
    const sequence s = find_sequence(a, b);
    if (begin >= s.T && begin > 0) continue; /* the first run goes on: no tokens hand the state on */
    const int64_t end = s.T - begin < RUN ? s.T : begin + RUN;
    const float *x = a.x + s.row * a.x_b + s.first * a.x_t + c;
    const float *before =
        a.state_in ? a.state_in + (a.slot_in ? a.slot_in[b] : b) * a.state_slot + c * a.state_c : nullptr;

    float tap[WIDTH ? WIDTH : MAX_WIDTH], window[WIDTH ? WIDTH : MAX_WIDTH];
    Q3N_UNROLL
    for (int j = 0; j < width; j++) tap[j] = s.T > 0 ? a.w[c * a.w_c + j] : 0.0f;
    Q3N_UNROLL
    for (int j = 0; j < keep; j++) {
      const int64_t t = begin - keep + j;
      window[j] = t >= 0 ? x[t * a.x_t] : before ? before[t + keep] : 0.0f;
    }

    if (a.state_out && begin == 0) {
      float *after = a.state_out + (a.slot_out ? a.slot_out[b] : b) * a.state_slot + c * a.state_c;
      /* Upwards: what is still to be read lies behind what is written. */
      for (int j = 0; j < keep; j++) {
        const int64_t t = s.T - keep + j;
        after[j] = t >= 0 ? x[t * a.x_t] : before ? before[t + keep] : 0.0f;
      }
    }

    for (int64_t t = begin; t < end; t++) {
      window[keep] = x[t * a.x_t];
      float sum = a.bias ? a.bias[c] : 0.0f;
      Q3N_UNROLL
      for (int j = 0; j < width; j++) sum += tap[j] * window[j];
      a.y[s.row * a.y_b + (s.first + t) * a.y_t + c] = a.silu ? sum / (1.0f + expf(-sum)) : sum;
      Q3N_UNROLL
      for (int j = 0; j < keep; j++) window[j] = window[j + 1];
      if (a.snapshots) {
        float *snap = a.snapshots + s.row * a.snap_b + (s.first + t) * a.snap_t + c * a.snap_c;
        Q3N_UNROLL
        for (int j = 0; j < keep; j++) snap[j] = window[j];
      }
    }
  }
}

} /* namespace */

Q3N_CUDA_SCRATCH(causal_conv, causal_conv) {
  (void)a;
  return 0;
}

Q3N_CUDA_OPERATOR(causal_conv, causal_conv) {
  (void)scratch;
  if (a->B == 0 || a->C == 0) return Q3N_OK;
  const int64_t runs = a->T > RUN ? (a->T + RUN - 1) / RUN : 1;
  const int64_t items = a->B * runs;
  const q3n_dims grid((a->C + THREADS - 1) / THREADS, items < 65535 ? items : 65535);
  return a->width == 4 ? Q3N_LAUNCH(conv_run<4>, (*a, runs), grid, THREADS, 0, stream)
                       : Q3N_LAUNCH(conv_run<0>, (*a, runs), grid, THREADS, 0, stream);
}
