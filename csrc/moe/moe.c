#include "moe.h"

#include "../base/check.h"
#include "../quant/repack_group.h"
#include "moe_block.h"

/* Sizes below these bounds multiply without overflow: T top_k F and T top_k D stay below 2^63. */
enum { MAX_EXPERTS = 65536 };
static const int64_t max_tokens = (int64_t)1 << 24, max_width = (int64_t)1 << 22;

q3n_status q3n_moe_route_check(const q3n_moe_route_args *a) {
  Q3N_REFUSE(!a, NULL, ARGS);
  Q3N_REFUSE(a->struct_bytes != sizeof *a, ABI, STRUCT_BYTES);
  Q3N_REFUSE(a->T < 0 || a->T > max_tokens, SIZE, T);
  Q3N_REFUSE(a->E < 1 || a->E > MAX_EXPERTS, SIZE, E);
  Q3N_REFUSE(a->top_k < 1 || a->top_k > a->E, SIZE, TOPK);

  const q3n_axis logits[] = {{a->T, a->logits_t}, {a->E, 1}};
  int64_t n = q3n_extent(logits, 2), chosen = a->T * a->top_k;
  Q3N_REFUSE(n < 0, STRIDE, LOGITS);
  if (a->T == 0) return Q3N_OK;

  Q3N_REFUSE(!a->ids, NULL, IDS);
  Q3N_REFUSE(!a->weights, NULL, WEIGHTS);
  Q3N_REFUSE(!a->logits, NULL, LOGITS);
  Q3N_REFUSE(q3n_overlap(a->ids, chosen * 4, a->logits, n * 4), ALIAS, IDS);
  Q3N_REFUSE(q3n_overlap(a->ids, chosen * 4, a->weights, chosen * 4), ALIAS, IDS);
  Q3N_REFUSE(q3n_overlap(a->weights, chosen * 4, a->logits, n * 4), ALIAS, WEIGHTS);
  return Q3N_OK;
}

q3n_status q3n_moe_group_check(const q3n_moe_group_args *a) {
  Q3N_REFUSE(!a, NULL, ARGS);
  Q3N_REFUSE(a->struct_bytes != sizeof *a, ABI, STRUCT_BYTES);
  Q3N_REFUSE(a->T < 0 || a->T > max_tokens, SIZE, T);
  Q3N_REFUSE(a->E < 0 || a->E > MAX_EXPERTS, SIZE, E);
  Q3N_REFUSE(a->top_k < 0 || a->top_k > MAX_EXPERTS, SIZE, TOPK);

  int64_t pairs = a->T * a->top_k;
  Q3N_REFUSE(!a->offsets, NULL, OFFSETS);
  Q3N_REFUSE(pairs > 0 && !a->order, NULL, ORDER);
  Q3N_REFUSE(pairs > 0 && !a->ids, NULL, IDS);
  Q3N_REFUSE(q3n_overlap(a->order, pairs * 8, a->ids, pairs * 4), ALIAS, ORDER);
  Q3N_REFUSE(q3n_overlap(a->order, pairs * 8, a->offsets, (a->E + 1) * 8), ALIAS, ORDER);
  Q3N_REFUSE(q3n_overlap(a->offsets, (a->E + 1) * 8, a->ids, pairs * 4), ALIAS, OFFSETS);
  return Q3N_OK;
}

/* 1 where both strides of a weight step over whole blocks (one that is never taken may be anything), and interleaved
   rows are packed. */
static int whole_blocks(int64_t outer, int64_t outer_stride, int64_t inner, int64_t inner_stride, int64_t cols,
                        q3n_dtype dtype) {
  const int64_t block = q3n_dtype_block(dtype);
  if (dtype & Q3N_R16 && inner_stride != cols) return 0;
  return (outer <= 1 || outer_stride % block == 0) && (inner <= 1 || inner_stride % block == 0);
}

/* 0 where a dtype is none of weights. */
static int64_t weight_block(q3n_dtype dtype) {
  return q3n_dtype_rows(dtype) < Q3N_Q8_X32 ? q3n_dtype_block(dtype) : 0;
}

q3n_status q3n_moe_up_check(const q3n_moe_up_args *a) {
  Q3N_REFUSE(!a, NULL, ARGS);
  Q3N_REFUSE(a->struct_bytes != sizeof *a, ABI, STRUCT_BYTES);
  const int64_t gate_block = weight_block(a->gate_dtype), up_block = weight_block(a->up_dtype);
  Q3N_REFUSE(gate_block == 0, DTYPE, GATE);
  Q3N_REFUSE(up_block == 0, DTYPE, UP);
  Q3N_REFUSE(a->x_dtype != Q3N_F32 && (a->x_dtype != q3n_dtype_activations(a->gate_dtype) ||
                                       a->x_dtype != q3n_dtype_activations(a->up_dtype)), DTYPE, X);
  Q3N_REFUSE(a->T < 0 || a->T > max_tokens, SIZE, T);
  Q3N_REFUSE(a->E < 0 || a->E > MAX_EXPERTS, SIZE, E);
  Q3N_REFUSE(a->top_k < 0 || a->top_k > MAX_EXPERTS, SIZE, TOPK);
  Q3N_REFUSE(a->D < 0 || a->D > max_width || a->D % gate_block || a->D % up_block, SIZE, D);
  Q3N_REFUSE(a->F < 0 || a->F > max_width || ((a->gate_dtype | a->up_dtype) & Q3N_R16 && a->F % Q3N_GROUP), SIZE, F);

  const q3n_axis x[] = {{a->T, a->x_t}, {a->D, 1}};
  const q3n_axis gate[] = {{a->E, a->gate_e}, {a->F, a->gate_f}, {a->D, 1}};
  const q3n_axis up[] = {{a->E, a->up_e}, {a->F, a->up_f}, {a->D, 1}};
  int64_t nh = a->T * a->top_k * a->F, nx = q3n_extent(x, 2), ngate = q3n_extent(gate, 3), nup = q3n_extent(up, 3);
  Q3N_REFUSE(nh > INT64_MAX / 8, SIZE, HIDDEN);
  Q3N_REFUSE(nx < 0 || (nx > 0 && a->T > 1 && a->x_t % q3n_dtype_block(a->x_dtype)), STRIDE, X);
  Q3N_REFUSE(ngate < 0 || (ngate > 0 && !whole_blocks(a->E, a->gate_e, a->F, a->gate_f, a->D, a->gate_dtype)), STRIDE,
             GATE);
  Q3N_REFUSE(nup < 0 || (nup > 0 && !whole_blocks(a->E, a->up_e, a->F, a->up_f, a->D, a->up_dtype)), STRIDE, UP);
  if (nh == 0) return Q3N_OK;

  Q3N_REFUSE(!a->h, NULL, HIDDEN);
  Q3N_REFUSE(nx > 0 && !a->x, NULL, X);
  Q3N_REFUSE(nx > 0 && (uintptr_t)a->x % 4, VALUE, X);
  Q3N_REFUSE(ngate > 0 && !a->gate, NULL, GATE);
  Q3N_REFUSE(nup > 0 && !a->up, NULL, UP);
  Q3N_REFUSE(!a->order, NULL, ORDER);
  Q3N_REFUSE(!a->offsets, NULL, OFFSETS);
  Q3N_REFUSE(q3n_overlap(a->h, nh * 4, a->x, q3n_dtype_bytes(a->x_dtype, nx)), ALIAS, HIDDEN);
  Q3N_REFUSE(q3n_overlap(a->h, nh * 4, a->gate, q3n_dtype_bytes(a->gate_dtype, ngate)), ALIAS, HIDDEN);
  Q3N_REFUSE(q3n_overlap(a->h, nh * 4, a->up, q3n_dtype_bytes(a->up_dtype, nup)), ALIAS, HIDDEN);
  return Q3N_OK;
}

q3n_status q3n_moe_down_check(const q3n_moe_down_args *a) {
  Q3N_REFUSE(!a, NULL, ARGS);
  Q3N_REFUSE(a->struct_bytes != sizeof *a, ABI, STRUCT_BYTES);
  const int64_t block = weight_block(a->dtype);
  Q3N_REFUSE(block == 0, DTYPE, DOWN);
  Q3N_REFUSE(a->h_dtype != Q3N_F32 && a->h_dtype != q3n_dtype_activations(a->dtype), DTYPE, HIDDEN);
  Q3N_REFUSE(a->T < 0 || a->T > max_tokens, SIZE, T);
  Q3N_REFUSE(a->E < 0 || a->E > MAX_EXPERTS, SIZE, E);
  Q3N_REFUSE(a->top_k < 0 || a->top_k > MAX_EXPERTS, SIZE, TOPK);
  Q3N_REFUSE(a->D < 0 || a->D > max_width || (a->dtype & Q3N_R16 && a->D % Q3N_GROUP), SIZE, D);
  Q3N_REFUSE(a->F < 0 || a->F > max_width || a->F % block, SIZE, F);

  const q3n_axis y[] = {{a->T, a->y_t}, {a->D, 1}};
  const q3n_axis down[] = {{a->E, a->down_e}, {a->D, a->down_d}, {a->F, 1}};
  int64_t pairs = a->T * a->top_k, nh = pairs * a->F, ny = q3n_extent(y, 2), ndown = q3n_extent(down, 3);
  Q3N_REFUSE(nh > INT64_MAX / 8, SIZE, HIDDEN);
  Q3N_REFUSE(ny < 0 || !q3n_disjoint(y, 2), STRIDE, Y);
  Q3N_REFUSE(ndown < 0 || (ndown > 0 && !whole_blocks(a->E, a->down_e, a->D, a->down_d, a->F, a->dtype)), STRIDE,
             DOWN);
  if (ny == 0) return Q3N_OK;

  Q3N_REFUSE(!a->y, NULL, Y);
  Q3N_REFUSE(nh > 0 && !a->h, NULL, HIDDEN);
  Q3N_REFUSE(nh > 0 && (uintptr_t)a->h % 4, VALUE, HIDDEN);
  Q3N_REFUSE(ndown > 0 && pairs > 0 && !a->down, NULL, DOWN);
  Q3N_REFUSE(pairs > 0 && !a->order, NULL, ORDER);
  Q3N_REFUSE(!a->offsets, NULL, OFFSETS);
  Q3N_REFUSE(q3n_overlap(a->y, ny * 4, a->h, q3n_dtype_bytes(a->h_dtype, nh)), ALIAS, Y);
  Q3N_REFUSE(a->weights && q3n_overlap(a->y, ny * 4, a->weights, pairs * 4), ALIAS, Y);
  Q3N_REFUSE(q3n_overlap(a->y, ny * 4, a->down, q3n_dtype_bytes(a->dtype, ndown)), ALIAS, Y);
  return Q3N_OK;
}

int64_t q3n_moe_route_items(const q3n_moe_route_args *a) { return a->T; }

int64_t q3n_moe_route_no_scratch(const q3n_moe_route_args *a) {
  (void)a;
  return 0;
}

int64_t q3n_moe_group_items(const q3n_moe_group_args *a) {
  (void)a;
  return 1;
}

int64_t q3n_moe_group_no_scratch(const q3n_moe_group_args *a) {
  (void)a;
  return 0;
}

int64_t q3n_moe_up_items(const q3n_moe_up_args *a) {
  return a->T && a->top_k ? q3n_ceil_div(a->F, Q3N_MOE_ROWS) : 0;
}

int64_t q3n_moe_up_scratch(const q3n_moe_up_args *a) { return q3n_moe_rows_bytes(2 * Q3N_MOE_ROWS + 1, a->D); }

int64_t q3n_moe_down_items(const q3n_moe_down_args *a) { return a->T ? q3n_ceil_div(a->D, Q3N_MOE_ROWS) : 0; }

int64_t q3n_moe_down_scratch(const q3n_moe_down_args *a) {
  return q3n_moe_rows_bytes(Q3N_MOE_ROWS + 1, a->F) + q3n_moe_rows_bytes(Q3N_MOE_ROWS, a->T * a->top_k);
}

int64_t q3n_moe_up_tile_items(const q3n_moe_up_args *a) {
  return a->T && a->top_k ? q3n_ceil_div(a->F, Q3N_TILE_ROWS) : 0;
}

int64_t q3n_moe_up_tile_scratch(const q3n_moe_up_args *a) {
  return q3n_moe_rows_bytes(2 * Q3N_TILE_ROWS + Q3N_F32_TOKENS, a->D);
}

int64_t q3n_moe_down_tile_items(const q3n_moe_down_args *a) {
  return a->T ? q3n_ceil_div(a->D, Q3N_MOE_DOWN_ROWS) : 0;
}

int64_t q3n_moe_down_tile_scratch(const q3n_moe_down_args *a) {
  return q3n_moe_rows_bytes(Q3N_TILE_ROWS + Q3N_F32_TOKENS, a->F) +
         q3n_moe_rows_bytes(Q3N_MOE_DOWN_ROWS, a->T * a->top_k);
}

#include "moe.inc"
Q3N_DEFINE_OPERATOR(moe_route, Q3N_MOE_ROUTE_VARIANTS)
Q3N_DEFINE_BEST_FIRST(moe_route)
Q3N_DEFINE_OPERATOR(moe_group, Q3N_MOE_GROUP_VARIANTS)
Q3N_DEFINE_BEST_FIRST(moe_group)
Q3N_DEFINE_OPERATOR(moe_up, Q3N_MOE_UP_VARIANTS)
Q3N_DEFINE_BEST_FIRST(moe_up)
Q3N_DEFINE_OPERATOR(moe_down, Q3N_MOE_DOWN_VARIANTS)
Q3N_DEFINE_BEST_FIRST(moe_down)
