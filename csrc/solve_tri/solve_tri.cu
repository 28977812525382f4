/* Two kernels. Unit triangles of n = 16, 32, 48, 64 on tensor cores: the 16 x 16 triangles on the diagonal are inverted by substitution,
   all else are products. A warp has 16 columns, which lie across its lanes transposed, so that the rows of X that are
   done are left factors as they stand.

   Any n up to 256: a block has 32 columns of one right-hand side and solves panels of 16 rows: all warps take away what
   the finished rows give, two rows a warp, then one warp substitutes within the panel, a lane a column. The finished rows
   stay in shared memory. The sums run over j upwards, as in solve_tri_scalar.c, fused. */
#include "../cuda/tf32.cuh"

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

constexpr int WIDE_N = 64, BLOCK = 16, WIDE_WARPS = 4;
constexpr unsigned ALL = 0xffffffffu;

/* One column by substitution alone, in memory: where something is not finite, products would carry it to rows before. */
__device__ __forceinline__ void solve_one(const q3n_solve_tri_args &a, int64_t entry, int64_t column) {
  const float *l = a.l + entry * a.l_batch;
  float *x = a.x + entry * a.x_batch + column;
  for (int64_t i = 0; i < a.n; i++) {
    float sum = a.b ? a.b[entry * a.b_batch + i * a.b_row + column] : (column == i ? 1.0f : 0.0f);
    for (int64_t j = 0; j < i; j++) sum = __fmaf_rn(-l[i * a.l_row + j], x[j * a.x_row], sum);
    x[i * a.x_row] = !a.b && column > i ? 0.0f : sum;
  }
}

__device__ __forceinline__ q3n_right rows_of(q3n_shared<float> l, int i, int j) {
  const int lane = (int)(threadIdx.x % 32);
  return q3n_split_right(q3n_load<float2>(l + q3n_place(i + lane / 4, j / 8, 2 * (lane % 4), WIDE_N)));
}

__global__ void __launch_bounds__(WIDE_WARPS * 32) solve_blocks(q3n_solve_tri_args a, int64_t blocks, int64_t items) {
  Q3N_SHARED(float, l, WIDE_N * WIDE_N);                /* zeros above the diagonal */
  Q3N_SHARED(float, done, WIDE_WARPS * WIDE_N * BLOCK); /* X, every number with the lane that made it */
  const int lane = (int)(threadIdx.x % 32), warp = (int)(threadIdx.x / 32), group = lane / 4, member = lane % 4;
  const int n = (int)a.n, warps = (int)(blockDim.x / 32);
  const q3n_shared<float> x = done + warp * WIDE_N * BLOCK;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t entry = item / blocks, first = (item % blocks * warps + warp) * BLOCK;
    const float *from = a.l + entry * a.l_batch;
    __syncthreads(); /* the item before is done with */
    for (int k = (int)threadIdx.x; k < n * n; k += (int)blockDim.x) {
      const int i = k / n, j = k % n;
      l[q3n_place(i, j / 8, j % 8, WIDE_N)] = j < i ? from[i * a.l_row + j] : 0.0f;
    }
    __syncthreads();
    q3n_invert_diagonal(n, 1.0f, l);
    __syncthreads();
    if (first >= a.m) continue;

    bool good[2] = {true, true};
    for (int i0 = 0; i0 < n; i0 += BLOCK) {
      float w[2][4]; /* rows i0 + 8 h + 2 member + k % 2, columns group + k / 2 * 8 */
      q3n_sums sum[2];
      Q3N_UNROLL
      for (int h = 0; h < 2; h++) {
        q3n_clear(sum[h]);
        Q3N_UNROLL
        for (int k = 0; k < 4; k++) {
          const int i = i0 + 8 * h + 2 * member + k % 2;
          const int64_t column = first + group + k / 2 * 8;
          w[h][k] = column == i ? 1.0f : 0.0f;
          if (a.b) w[h][k] = column < a.m ? a.b[entry * a.b_batch + i * a.b_row + column] : 0.0f;
        }
      }
      for (int j = 0; j < i0; j += 8) {
        const float4 v = q3n_load<float4>(x + (j / 8 * 32 + lane) * 4);
        const float before[4] = {v.x, v.y, v.z, v.w};
        const q3n_left factor = q3n_split_left(before);
        Q3N_UNROLL
        for (int h = 0; h < 2; h++) q3n_add_product(sum[h], factor, rows_of(l, i0 + 8 * h, j));
      }
      Q3N_UNROLL
      for (int h = 0; h < 2; h++) {
        Q3N_UNROLL
        for (int k = 0; k < 4; k++) w[h][k] -= sum[h].large[k] + sum[h].rest[k];
        q3n_clear(sum[h]);
      }
      Q3N_UNROLL
      for (int j = 0; j < 2; j++) {
        const q3n_left factor = q3n_split_left(w[j]);
        Q3N_UNROLL
        for (int h = j; h < 2; h++) q3n_add_product(sum[h], factor, rows_of(l, i0 + 8 * h, i0 + 8 * j));
      }
      Q3N_UNROLL
      for (int h = 0; h < 2; h++) {
        Q3N_UNROLL
        for (int k = 0; k < 4; k++) {
          w[h][k] += sum[h].large[k] + sum[h].rest[k];
          if (!(fabsf(w[h][k]) < 3.3e38f)) good[k / 2] = false;
        }
        q3n_store(x + ((i0 / 8 + h) * 32 + lane) * 4, make_float4(w[h][0], w[h][1], w[h][2], w[h][3]));
      }
    }

    /* Columns do not mix: those that are not finite are solved again. */
    const unsigned low = __ballot_sync(ALL, !good[0]), high = __ballot_sync(ALL, !good[1]);
    for (int i = 0; i < n; i += 8) {
      const float4 v = q3n_load<float4>(x + (i / 8 * 32 + lane) * 4);
      const float value[4] = {v.x, v.y, v.z, v.w};
      Q3N_UNROLL
      for (int k = 0; k < 4; k++) {
        const int row = i + 2 * member + k % 2;
        const int64_t column = first + group + k / 2 * 8;
        if (column < a.m && !((k < 2 ? low : high) >> group * 4 & 15u))
          a.x[entry * a.x_batch + row * a.x_row + column] = !a.b && column > row ? 0.0f : value[k];
      }
    }
    const unsigned bad = (lane < 8 ? low : high) >> lane % 8 * 4 & 15u;
    if (lane < BLOCK && bad && first + lane < a.m) solve_one(a, entry, first + lane);
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
  if (a->unit_diagonal && a->n % BLOCK == 0 && a->n <= WIDE_N) {
    const int64_t tiles = (a->m + BLOCK - 1) / BLOCK, warps = tiles < WIDE_WARPS ? tiles : WIDE_WARPS;
    const int64_t blocks = (tiles + warps - 1) / warps, items = a->batch * blocks;
    return Q3N_LAUNCH(solve_blocks, (*a, blocks, items), items < INT32_MAX ? items : INT32_MAX, warps * 32, 0, stream);
  }
  const int64_t blocks = (a->m + COLUMNS - 1) / COLUMNS, items = a->batch * blocks;
  return Q3N_LAUNCH(solve_columns, (*a, blocks, items), items < INT32_MAX ? items : INT32_MAX, THREADS, 0, stream);
}
