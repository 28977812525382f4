/* A block has 32 columns of one right-hand side and solves panels of 16 rows: all warps take away what the finished
   rows give, two rows a warp, then one warp substitutes within the panel, a lane a column. The finished rows stay in
   shared memory. The sums run over j upwards, as in solve_tri_scalar.c, fused. */
#include "../cuda/launch.cuh"

extern "C" {
#include "solve_tri.h"
}

namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32, COLUMNS = 32, PANEL = 16, MAX_N = 256;

__global__ void __launch_bounds__(THREADS) solve_columns(q3n_solve_tri_args a, int64_t blocks, int64_t items) {
  Q3N_SHARED(float, x, MAX_N * COLUMNS);
  Q3N_SHARED(float, l, PANEL * PANEL); /* the panel's own triangle */
  const int lane = (int)(threadIdx.x % 32), warp = (int)(threadIdx.x / 32), n = (int)a.n;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t entry = item / blocks, column = item % blocks * COLUMNS + lane;
    const bool mine = column < a.m;
    const float *from = a.l + entry * a.l_batch;

    for (int first = 0; first < n; first += PANEL) {
      const int rows = n - first < PANEL ? n - first : PANEL;
      const int r = (int)threadIdx.x / PANEL, c = (int)threadIdx.x % PANEL;
      if (r < rows && (a.unit_diagonal ? c < r : c <= r)) l[r * PANEL + c] = from[(first + r) * a.l_row + first + c];
      for (int i = first + warp; i < first + rows; i += WARPS) {
        const float *row = from + i * a.l_row;
        float sum = 0.0f;
        if (mine) sum = a.b ? a.b[entry * a.b_batch + i * a.b_row + column] : (column == i ? 1.0f : 0.0f);
        for (int j = 0; j < first; j++) sum = __fmaf_rn(-row[j], x[j * COLUMNS + lane], sum);
        x[i * COLUMNS + lane] = sum;
      }
      __syncthreads();
      if (warp == 0) {
        float done[PANEL];
        Q3N_UNROLL
        for (int i = 0; i < PANEL; i++) {
          if (i < rows) {
            float sum = x[(first + i) * COLUMNS + lane];
            Q3N_UNROLL
            for (int j = 0; j < i; j++) sum = __fmaf_rn(-(float)l[i * PANEL + j], done[j], sum);
            if (!a.unit_diagonal) sum = sum / l[i * PANEL + i];
            /* The inverse is lower triangular: above the diagonal 0 * inf must not become NaN. */
            if (!a.b && column > first + i) sum = 0.0f;
            done[i] = sum;
            x[(first + i) * COLUMNS + lane] = sum;
            if (mine) a.x[entry * a.x_batch + (first + i) * a.x_row + column] = sum;
          }
        }
      }
      __syncthreads();
    }
  }
}

} /* namespace */

Q3N_CUDA_SCRATCH(solve_tri, solve_tri) {
  (void)a;
  return 0;
}

Q3N_CUDA_OPERATOR(solve_tri, solve_tri) {
  (void)scratch;
  if (a->n == 0 || a->m == 0) return Q3N_OK;
  const int64_t blocks = (a->m + COLUMNS - 1) / COLUMNS, items = a->batch * blocks;
  return Q3N_LAUNCH(solve_columns, (*a, blocks, items), items < INT32_MAX ? items : INT32_MAX, THREADS, 0, stream);
}
