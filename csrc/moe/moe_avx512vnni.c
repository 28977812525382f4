/* Up and down on the integer tiles. A call takes its rows of one expert after the other, so that weights stream from
   memory in long runs; down's dots wait until every expert has been seen. */
#include "../matmul/q8_groups_avx512.h"
#include "moe_tiles_avx512.h"

q3n_status q3n_moe_up_avx512(const q3n_moe_up_args *a, int64_t begin, int64_t end, void *scratch);
q3n_status q3n_moe_down_avx512(const q3n_moe_down_args *a, int64_t begin, int64_t end, void *scratch);
q3n_status q3n_moe_up_avx512vnni(const q3n_moe_up_args *a, int64_t begin, int64_t end, void *scratch);
q3n_status q3n_moe_down_avx512vnni(const q3n_moe_down_args *a, int64_t begin, int64_t end, void *scratch);

q3n_status q3n_moe_up_avx512vnni(const q3n_moe_up_args *a, int64_t begin, int64_t end, void *scratch) {
  const q3n_dtype gate_type = q3n_dtype_rows(a->gate_dtype), up_type = q3n_dtype_rows(a->up_dtype);
  if (a->x_dtype == Q3N_F32 || !q3n_q8_tile_avx512vnni(gate_type, 1) || !q3n_q8_tile_avx512vnni(up_type, 1))
    return q3n_moe_up_avx512(a, begin, end, scratch);

  uint8_t *gate_groups = scratch, *up_groups = gate_groups + q3n_moe_rows_bytes(Q3N_TILE_ROWS, a->D);
  const int64_t gate_blocks = a->D / q3n_dtype_block(gate_type), up_blocks = a->D / q3n_dtype_block(up_type);
  /* the stride of rows without elements may be anything */
  const int64_t x_row = a->D ? q3n_dtype_bytes(a->x_dtype, a->x_t) : 0;
  for (int64_t e = 0; e < a->E; e++) {
    const int64_t from = a->offsets[e], to = a->offsets[e + 1];
    const void *gate_rows = q3n_element(a->gate, a->gate_dtype, e * a->gate_e);
    const void *up_rows = q3n_element(a->up, a->up_dtype, e * a->up_e);
    for (int64_t item = begin; item < end && from < to; item++) {
      const int64_t first = item * Q3N_TILE_ROWS;
      const int64_t count = a->F - first < Q3N_TILE_ROWS ? a->F - first : Q3N_TILE_ROWS;
      const q3n_groups gate = q3n_groups_of(gate_rows, a->gate_dtype, first, count, a->gate_f, a->D, gate_groups);
      const q3n_groups up = q3n_groups_of(up_rows, a->up_dtype, first, count, a->up_f, a->D, up_groups);
      const uint8_t *up_next = q3n_groups_next(up_rows, a->up_dtype, first, a->F, a->up_f, a->D, up.group[0]);
      const int64_t last = item + 1 == end, expert = last ? q3n_next_expert(a->offsets, e, a->E) : e;
      const uint8_t *gate_next = q3n_groups_next(q3n_element(a->gate, a->gate_dtype, expert * a->gate_e), a->gate_dtype,
                                                 (last ? begin : item + 1) * Q3N_TILE_ROWS, a->F, a->gate_f, a->D,
                                                 up.group[0]);
      for (int64_t i = from, tokens; i < to; i += tokens) {
        tokens = q3n_q8_take(to - i);
        const uint8_t *x[Q3N_Q8_TOKENS];
        float g[Q3N_Q8_TOKENS * Q3N_TILE_ROWS], u[Q3N_Q8_TOKENS * Q3N_TILE_ROWS];
        for (int64_t t = 0; t < tokens; t++) x[t] = (const uint8_t *)a->x + a->order[i + t] / a->top_k * x_row;
        q3n_q8_tile_avx512vnni(gate_type, tokens)(g, gate.group[0], gate.group[1], x, gate_blocks, up_next);
        q3n_q8_tile_avx512vnni(up_type, tokens)(u, up.group[0], up.group[1], x, up_blocks, gate_next);
        for (int64_t t = 0; t < tokens; t++)
          q3n_moe_swiglu(a->h + a->order[i + t] * a->F + first, g + t * Q3N_TILE_ROWS, u + t * Q3N_TILE_ROWS, count);
      }
    }
  }
  return Q3N_OK;
}

q3n_status q3n_moe_down_avx512vnni(const q3n_moe_down_args *a, int64_t begin, int64_t end, void *scratch) {
  const q3n_dtype type = q3n_dtype_rows(a->dtype);
  if (a->h_dtype == Q3N_F32 || !q3n_q8_tile_avx512vnni(type, 1)) return q3n_moe_down_avx512(a, begin, end, scratch);

  float *dots = (float *)scratch + q3n_moe_rows_bytes(Q3N_TILE_ROWS + Q3N_F32_TOKENS, a->F) / (int64_t)sizeof(float);
  const int64_t blocks = a->F / q3n_dtype_block(type), h_row = q3n_dtype_bytes(a->h_dtype, a->F);
  for (int64_t item = begin; item < end; item++) {
    const int64_t first = item * Q3N_MOE_DOWN_ROWS;
    const int64_t all = a->D - first < Q3N_MOE_DOWN_ROWS ? a->D - first : Q3N_MOE_DOWN_ROWS;
    for (int64_t e = 0; e < a->E; e++) {
      const int64_t from = a->offsets[e], to = a->offsets[e + 1];
      if (from == to) continue;
      const void *rows = q3n_element(a->down, a->dtype, e * a->down_e);
      const void *after = q3n_element(a->down, a->dtype, q3n_next_expert(a->offsets, e, a->E) * a->down_e);
      for (int64_t r = 0; r < all; r += Q3N_TILE_ROWS) {
        const int64_t count = all - r < Q3N_TILE_ROWS ? all - r : Q3N_TILE_ROWS;
        const q3n_groups down = q3n_groups_of(rows, a->dtype, first + r, count, a->down_d, a->F, scratch);
        const uint8_t *next = q3n_groups_next(after, a->dtype, first + r, a->D, a->down_d, a->F, down.group[0]);
        for (int64_t i = from, tokens; i < to; i += tokens) {
          tokens = q3n_q8_take(to - i);
          const uint8_t *h[Q3N_Q8_TOKENS];
          float y[Q3N_Q8_TOKENS * Q3N_TILE_ROWS];
          for (int64_t t = 0; t < tokens; t++) h[t] = (const uint8_t *)a->h + a->order[i + t] * h_row;
          q3n_q8_tile_avx512vnni(type, tokens)(y, down.group[0], down.group[1], h, blocks, next);
          for (int64_t t = 0; t < tokens; t++)
            memcpy(dots + a->order[i + t] * Q3N_MOE_DOWN_ROWS + r, y + t * Q3N_TILE_ROWS, (size_t)count * sizeof *y);
        }
      }
    }
    q3n_moe_combine(a, dots, first, all);
  }
  return Q3N_OK;
}
