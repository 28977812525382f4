/* Up and down in f32: an expert's rows are decoded once, then its pairs meet them three at a time. */
#include "../matmul/f32_tile_avx512.h"
#include "moe_tiles_avx512.h"

q3n_status q3n_moe_up_avx512(const q3n_moe_up_args *a, int64_t begin, int64_t end, void *scratch);
q3n_status q3n_moe_down_avx512(const q3n_moe_down_args *a, int64_t begin, int64_t end, void *scratch);

q3n_status q3n_moe_up_avx512(const q3n_moe_up_args *a, int64_t begin, int64_t end, void *scratch) {
  float *gate_rows = scratch, *up_rows = gate_rows + Q3N_TILE_ROWS * a->D, *decoded = up_rows + Q3N_TILE_ROWS * a->D;
  for (int64_t e = 0; e < a->E; e++) {
    const int64_t from = a->offsets[e], to = a->offsets[e + 1];
    for (int64_t item = begin; item < end && from < to; item++) {
      const int64_t first = item * Q3N_TILE_ROWS;
      const int64_t count = a->F - first < Q3N_TILE_ROWS ? a->F - first : Q3N_TILE_ROWS;
      const float *gate[Q3N_TILE_ROWS], *up[Q3N_TILE_ROWS];
      q3n_tile_rows(gate, count, q3n_element(a->gate, a->gate_dtype, e * a->gate_e), a->gate_dtype, first, a->gate_f,
                    a->D, gate_rows);
      q3n_tile_rows(up, count, q3n_element(a->up, a->up_dtype, e * a->up_e), a->up_dtype, first, a->up_f, a->D,
                    up_rows);
      for (int64_t i = from; i < to; i += Q3N_F32_TOKENS) {
        const int64_t tokens = to - i < Q3N_F32_TOKENS ? to - i : Q3N_F32_TOKENS;
        const float *x[Q3N_F32_TOKENS];
        float g[Q3N_F32_TOKENS * Q3N_TILE_ROWS], u[Q3N_F32_TOKENS * Q3N_TILE_ROWS];
        for (int64_t t = 0; t < tokens; t++)
          x[t] = q3n_floats(a->x, a->x_dtype, a->order[i + t] / a->top_k * a->x_t, a->D, decoded + t * a->D);
        q3n_f32_tiles(g, gate, count, x, a->D, tokens);
        q3n_f32_tiles(u, up, count, x, a->D, tokens);
        for (int64_t t = 0; t < tokens; t++)
          q3n_moe_swiglu(a->h + a->order[i + t] * a->F + first, g + t * Q3N_TILE_ROWS, u + t * Q3N_TILE_ROWS, count);
      }
    }
  }
  return Q3N_OK;
}

q3n_status q3n_moe_down_avx512(const q3n_moe_down_args *a, int64_t begin, int64_t end, void *scratch) {
  float *rows = scratch, *decoded = rows + Q3N_TILE_ROWS * a->F;
  float *dots = rows + q3n_moe_rows_bytes(Q3N_TILE_ROWS + Q3N_F32_TOKENS, a->F) / (int64_t)sizeof(float);
  for (int64_t item = begin; item < end; item++) {
    const int64_t first = item * Q3N_MOE_DOWN_ROWS;
    const int64_t all = a->D - first < Q3N_MOE_DOWN_ROWS ? a->D - first : Q3N_MOE_DOWN_ROWS;
    for (int64_t e = 0; e < a->E; e++) {
      const int64_t from = a->offsets[e], to = a->offsets[e + 1];
      for (int64_t r = 0; r < all && from < to; r += Q3N_TILE_ROWS) {
        const int64_t count = all - r < Q3N_TILE_ROWS ? all - r : Q3N_TILE_ROWS;
        const float *down[Q3N_TILE_ROWS];
        q3n_tile_rows(down, count, q3n_element(a->down, a->dtype, e * a->down_e), a->dtype, first + r, a->down_d, a->F,
                      rows);
        for (int64_t i = from; i < to; i += Q3N_F32_TOKENS) {
          const int64_t tokens = to - i < Q3N_F32_TOKENS ? to - i : Q3N_F32_TOKENS;
          const float *h[Q3N_F32_TOKENS];
          float y[Q3N_F32_TOKENS * Q3N_TILE_ROWS];
          for (int64_t t = 0; t < tokens; t++)
            h[t] = q3n_floats(a->h, a->h_dtype, a->order[i + t] * a->F, a->F, decoded + t * a->F);
          q3n_f32_tiles(y, down, count, h, a->F, tokens);
          for (int64_t t = 0; t < tokens; t++)
            memcpy(dots + a->order[i + t] * Q3N_MOE_DOWN_ROWS + r, y + t * Q3N_TILE_ROWS, (size_t)count * sizeof *y);
        }
      }
    }
    q3n_moe_combine(a, dots, first, all);
  }
  return Q3N_OK;
}
