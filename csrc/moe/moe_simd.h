/* Up and down over the vectors of csrc/simd, which is included before this, and an instruction set's tiles. Static
   inline. */
#ifndef Q3N_MOE_SIMD_H
#define Q3N_MOE_SIMD_H

#include "../matmul/f32_tile_simd.h"
#include "../matmul/q8_products.h"
#include "moe_block.h"

/* The first expert after e that any pair chose; e where there is none. */
static inline int64_t q3n_next_expert(const int64_t *offsets, int64_t e, int64_t E) {
  for (int64_t after = e + 1; after < E; after++)
    if (offsets[after] < offsets[after + 1]) return after;
  return e;
}

/* h = silu(gate) * up for `count` rows of one pair. */
static inline void q3n_moe_swiglu(float *h, const float *gate, const float *up, int64_t count) {
  for (int64_t r = 0; r < count; r += Q3N_LANES) {
    const q3n_v g = q3n_v_load_upto(gate + r, count - r), u = q3n_v_load_upto(up + r, count - r);
    q3n_v_store_upto(h + r, count - r, q3n_v_mul(q3n_v_silu(g), u));
  }
}

/* y of rows first .. first + count - 1 from the dots of all pairs, [T * top_k][Q3N_MOE_DOWN_ROWS]: a token's choices are
   added in their own order. */
static inline void q3n_moe_combine(const q3n_moe_down_args *a, const float *dots, int64_t first, int64_t count) {
  for (int64_t t = 0; t < a->T; t++)
    for (int64_t r = 0; r < count; r += Q3N_LANES) {
      q3n_v sum = q3n_v_zero();
      for (int64_t pair = t * a->top_k; pair < (t + 1) * a->top_k; pair++) {
        const q3n_v weight = q3n_v_set(a->weights ? a->weights[pair] : 1.0f);
        sum = q3n_v_fma(weight, q3n_v_load_upto(dots + pair * Q3N_MOE_DOWN_ROWS + r, count - r), sum);
      }
      float *y = a->y + t * a->y_t + first + r;
      if (a->accumulate) sum = q3n_v_add(q3n_v_load_upto(y, count - r), sum);
      q3n_v_store_upto(y, count - r, sum);
    }
}

/* Up and down in f32: an expert's rows are decoded once, then its pairs meet them three at a time. */
static inline q3n_status q3n_moe_up_f32(const q3n_moe_up_args *a, int64_t begin, int64_t end, void *scratch) {
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

static inline q3n_status q3n_moe_down_f32(const q3n_moe_down_args *a, int64_t begin, int64_t end, void *scratch) {
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

/* 1 where the activations are integers and there are tiles for the weights. */
static inline int q3n_moe_up_has_q8(const q3n_moe_up_args *a, q3n_q8_products by) {
  return a->x_dtype != Q3N_F32 && by.tile_of(q3n_dtype_rows(a->gate_dtype), 1) != NULL &&
         by.tile_of(q3n_dtype_rows(a->up_dtype), 1) != NULL;
}

static inline int q3n_moe_down_has_q8(const q3n_moe_down_args *a, q3n_q8_products by) {
  return a->h_dtype != Q3N_F32 && by.tile_of(q3n_dtype_rows(a->dtype), 1) != NULL;
}

/* Up and down on the integer products. A call takes its rows of one expert after the other, so that weights stream from
   memory in long runs; down's dots wait until every expert has been seen. */
static inline __attribute__((always_inline)) q3n_status q3n_moe_up_q8(const q3n_moe_up_args *a, int64_t begin,
                                                                      int64_t end, void *scratch,
                                                                      q3n_q8_products by) {
  const q3n_dtype gate_type = q3n_dtype_rows(a->gate_dtype), up_type = q3n_dtype_rows(a->up_dtype);
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
      const q3n_q8_weights gate =
        q3n_q8_weights_of(by, gate_rows, a->gate_dtype, first, count, a->gate_f, a->D, to - from, gate_groups);
      const q3n_q8_weights up =
        q3n_q8_weights_of(by, up_rows, a->up_dtype, first, count, a->up_f, a->D, to - from, up_groups);
      const uint8_t *up_next = q3n_q8_next(up_rows, a->up_dtype, first, a->F, a->up_f, a->D, &up);
      const int64_t last = item + 1 == end, expert = last ? q3n_next_expert(a->offsets, e, a->E) : e;
      const uint8_t *gate_next = q3n_q8_next(q3n_element(a->gate, a->gate_dtype, expert * a->gate_e), a->gate_dtype,
                                             (last ? begin : item + 1) * Q3N_TILE_ROWS, a->F, a->gate_f, a->D, &up);
      for (int64_t i = from, tokens; i < to; i += tokens) {
        tokens = q3n_q8_take(by, to - i);
        const uint8_t *x[Q3N_Q8_TOKENS];
        _Alignas(64) float g[Q3N_Q8_TOKENS * Q3N_TILE_ROWS], u[Q3N_Q8_TOKENS * Q3N_TILE_ROWS];
        for (int64_t t = 0; t < tokens; t++) {
          x[t] = (const uint8_t *)a->x + a->order[i + t] / a->top_k * x_row;
          q3n_q8_expect(a->h + a->order[i + t] * a->F + first, count);
        }
        q3n_q8_multiply(by, gate_type, g, &gate, x, tokens, gate_blocks, up_next);
        q3n_q8_multiply(by, up_type, u, &up, x, tokens, up_blocks, gate_next);
        for (int64_t t = 0; t < tokens; t++)
          q3n_moe_swiglu(a->h + a->order[i + t] * a->F + first, g + t * Q3N_TILE_ROWS, u + t * Q3N_TILE_ROWS, count);
      }
    }
  }
  return Q3N_OK;
}

static inline __attribute__((always_inline)) q3n_status q3n_moe_down_q8(const q3n_moe_down_args *a, int64_t begin,
                                                                        int64_t end, void *scratch,
                                                                        q3n_q8_products by) {
  const q3n_dtype type = q3n_dtype_rows(a->dtype);
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
        const q3n_q8_weights down =
          q3n_q8_weights_of(by, rows, a->dtype, first + r, count, a->down_d, a->F, to - from, scratch);
        const uint8_t *next = q3n_q8_next(after, a->dtype, first + r, a->D, a->down_d, a->F, &down);
        for (int64_t i = from, tokens; i < to; i += tokens) {
          tokens = q3n_q8_take(by, to - i);
          const uint8_t *h[Q3N_Q8_TOKENS];
          _Alignas(64) float y[Q3N_Q8_TOKENS * Q3N_TILE_ROWS];
          for (int64_t t = 0; t < tokens; t++) {
            h[t] = (const uint8_t *)a->h + a->order[i + t] * h_row;
            q3n_q8_expect(dots + a->order[i + t] * Q3N_MOE_DOWN_ROWS + r, count);
          }
          q3n_q8_multiply(by, type, y, &down, h, tokens, blocks, next);
          for (int64_t t = 0; t < tokens; t++)
            memcpy(dots + a->order[i + t] * Q3N_MOE_DOWN_ROWS + r, y + t * Q3N_TILE_ROWS, (size_t)count * sizeof *y);
        }
      }
    }
    q3n_moe_combine(a, dots, first, all);
  }
  return Q3N_OK;
}

#endif
