/* A block of four warps: tiles of rows of w times a tile of rows of x (tile.cuh), the warps with their parts of K. */
#include "tile.cuh"

extern "C" {
#include "matmul.h"
}

namespace {

constexpr int THREADS = 32 * Q3N_TILE_WARPS;

template <int DT, bool Q8, int RT, int MT> __global__ void __launch_bounds__(THREADS) product(q3n_matmul_args a) {
  Q3N_SHARED_DYNAMIC(uint32_t, words, 0, Q3N_TILE_WARPS * q3n_tile_words(DT, RT));
  Q3N_SHARED(float, floats, q3n_tile_sum_floats(RT, MT));
  const int parts = q3n_tile_parts(a.K), tiles = Q3N_TILE_WARPS / parts;
  const int lane = (int)(threadIdx.x % 32), warp = (int)(threadIdx.x / 32), part = warp % parts;
  /* blocks of the same rows of w lie next to each other, so that one of them brings those rows to the L2 cache */
  const int64_t columns = (a.M + 8 * MT - 1) / (8 * MT);
  const int64_t first = (blockIdx.x / columns * tiles + warp / parts) * 16 * RT, m0 = blockIdx.x % columns * 8 * MT;

  const q3n_dtype t = q3n_dtype(a.dtype & ~Q3N_R16);
  const int64_t row_bytes = a.w_n / q3n_block_columns(t) * q3n_block_bytes(t);
  const int64_t x_block = Q8 ? a.x_dtype == Q3N_Q8_X256 ? 256 : 32 : 1;
  const int64_t x_bytes = a.x_m / x_block * (Q8 ? a.x_dtype == Q3N_Q8_X256 ? Q3N_Q8_X256_BYTES : Q3N_Q8_X32_BYTES : 4);
  const int64_t left = a.N - first;
  const q3n_tile_weights w = {(const uint8_t *)a.w + first * row_bytes, row_bytes,
                              (int)(left < 16 * RT ? left : 16 * RT), t, (a.dtype & Q3N_R16) != 0};
  const auto x = [&](int j) { return m0 + j < a.M ? (const uint8_t *)a.x + (m0 + j) * x_bytes : nullptr; };

  float y[RT][MT][4];
  if (left > 0) q3n_tile_part<DT, Q8, RT, MT>(y, words + warp * q3n_tile_words(DT, RT), w, x, a.K, part);
  q3n_tile_sum<RT, MT>(y, floats, part, parts);
  if (part > 0 || left <= 0) return;
  Q3N_UNROLL
  for (int r = 0; r < RT; r++) {
    Q3N_UNROLL
    for (int i = 0; i < MT * 4; i++) {
      const int64_t n = 16 * r + lane / 4 + i % 4 / 2 * 8, m = m0 + i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (n < left && m < a.M) a.y[m * a.y_m + first + n] = y[r][i / 4][i % 4];
    }
  }
}

template <int DT, bool Q8, int RT, int MT> q3n_status launch(const q3n_matmul_args *a, q3n_stream stream) {
  const int64_t rows = Q3N_TILE_WARPS / q3n_tile_parts(a->K) * 16 * RT;
  const int64_t blocks = (a->N + rows - 1) / rows * ((a->M + 8 * MT - 1) / (8 * MT));
  return Q3N_LAUNCH((product<DT, Q8, RT, MT>), (*a), blocks, THREADS, Q3N_TILE_WARPS * q3n_tile_words(DT, RT) * 4,
                    stream);
}

template <int DT, bool Q8> q3n_status launch_form(const q3n_matmul_args *a, q3n_stream stream) {
  return a->M <= 8 ? launch<DT, Q8, 1, 1>(a, stream) : launch<DT, Q8, 2, 4>(a, stream);
}

template <int DT> q3n_status launch_type(const q3n_matmul_args *a, q3n_stream stream) {
  return a->x_dtype == Q3N_F32 ? launch_form<DT, false>(a, stream) : launch_form<DT, true>(a, stream);
}

} /* namespace */

Q3N_CUDA_SCRATCH(matmul, matmul) {
  (void)a;
  return 0;
}

Q3N_CUDA_OPERATOR(matmul, matmul) {
  (void)scratch;
  switch ((int)a->dtype & ~Q3N_R16) {
    case Q3N_F32: return launch_form<Q3N_F32, false>(a, stream);
    case Q3N_F16: return launch_form<Q3N_F16, false>(a, stream);
    case Q3N_BF16: return launch_form<Q3N_BF16, false>(a, stream);
    case Q3N_Q4_K: return launch_type<Q3N_Q4_K>(a, stream);
    case Q3N_Q5_K: return launch_type<Q3N_Q5_K>(a, stream);
    case Q3N_Q6_K: return launch_type<Q3N_Q6_K>(a, stream);
    case Q3N_Q8_0: return launch_type<Q3N_Q8_0>(a, stream);
    case Q3N_Q4_0: return launch_type<Q3N_Q4_0>(a, stream);
    default: return launch_type<Q3N_TILE_ANY>(a, stream);
  }
}
