#include "layer.h"

#include "../base/check.h"
#include "layer_rows.h"

q3n_status q3n_gather_check(const q3n_gather_args *a) {
  Q3N_REFUSE(!a, NULL, ARGS);
  Q3N_REFUSE(a->struct_bytes != sizeof *a, ABI, STRUCT_BYTES);
  const int64_t block = q3n_dtype_block(a->dtype);
  Q3N_REFUSE(block == 0 || a->dtype != q3n_dtype_rows(a->dtype) || a->dtype >= Q3N_Q8_X32, DTYPE, DTYPE);
  Q3N_REFUSE(a->T < 0, SIZE, T);
  Q3N_REFUSE(a->rows < 0, SIZE, ROWS);
  Q3N_REFUSE(a->N < 0 || a->N % block, SIZE, N);

  const q3n_axis y[] = {{a->T, a->y_t}, {a->N, 1}};
  const q3n_axis table[] = {{a->rows, a->table_row}, {a->N, 1}};
  const int64_t ny = q3n_extent(y, 2), ntable = q3n_extent(table, 2);
  Q3N_REFUSE(ny < 0 || !q3n_disjoint(y, 2), STRIDE, Y);
  Q3N_REFUSE(ntable < 0 || (ntable > 0 && a->rows > 1 && a->table_row % block), STRIDE, TABLE);
  Q3N_REFUSE(a->T > 0 && !a->ids, NULL, IDS);
  for (int64_t t = 0; t < a->T; t++) Q3N_REFUSE(a->ids[t] < 0 || a->ids[t] >= a->rows, VALUE, IDS);
  if (ny == 0) return Q3N_OK;

  Q3N_REFUSE(!a->y, NULL, Y);
  Q3N_REFUSE(!a->table, NULL, TABLE);
  Q3N_REFUSE(q3n_overlap(a->y, ny * 4, a->table, q3n_dtype_bytes(a->dtype, ntable)), ALIAS, Y);
  Q3N_REFUSE(q3n_overlap(a->y, ny * 4, a->ids, a->T * 8), ALIAS, Y);
  return Q3N_OK;
}

q3n_status q3n_add_check(const q3n_add_args *a) {
  Q3N_REFUSE(!a, NULL, ARGS);
  Q3N_REFUSE(a->struct_bytes != sizeof *a, ABI, STRUCT_BYTES);
  Q3N_REFUSE(a->T < 0, SIZE, T);
  Q3N_REFUSE(a->N < 0, SIZE, N);

  const q3n_axis y[] = {{a->T, a->y_t}, {a->N, 1}};
  const q3n_axis x[] = {{a->T, a->x_t}, {a->N, 1}};
  const int64_t ny = q3n_extent(y, 2), nx = q3n_extent(x, 2);
  Q3N_REFUSE(ny < 0 || !q3n_disjoint(y, 2), STRIDE, Y);
  Q3N_REFUSE(nx < 0, STRIDE, X);
  if (ny == 0) return Q3N_OK;

  Q3N_REFUSE(!a->y, NULL, Y);
  Q3N_REFUSE(!a->x, NULL, X);
  Q3N_REFUSE(q3n_overlap(a->y, ny * 4, a->x, nx * 4), ALIAS, Y);
  return Q3N_OK;
}

q3n_status q3n_delta_gates_check(const q3n_delta_gates_args *a) {
  Q3N_REFUSE(!a, NULL, ARGS);
  Q3N_REFUSE(a->struct_bytes != sizeof *a, ABI, STRUCT_BYTES);
  Q3N_REFUSE(a->T < 0, SIZE, T);
  Q3N_REFUSE(a->HK < 0, SIZE, HK);
  Q3N_REFUSE(a->HV < 0 || a->HV > INT64_MAX / 2 || (a->HK ? a->HV % a->HK != 0 : a->HV != 0), SIZE, HV);

  const q3n_axis g[] = {{a->T, a->g_t}, {a->HV, 1}};
  const q3n_axis beta[] = {{a->T, a->beta_t}, {a->HV, 1}};
  const q3n_axis ba[] = {{a->T, a->ba_t}, {2 * a->HV, 1}};
  const int64_t ng = q3n_extent(g, 2), nbeta = q3n_extent(beta, 2), nba = q3n_extent(ba, 2);
  Q3N_REFUSE(ng < 0 || !q3n_disjoint(g, 2), STRIDE, G);
  Q3N_REFUSE(nbeta < 0 || !q3n_disjoint(beta, 2), STRIDE, BETA);
  Q3N_REFUSE(nba < 0, STRIDE, BA);
  if (ng == 0) return Q3N_OK;

  Q3N_REFUSE(!a->g, NULL, G);
  Q3N_REFUSE(!a->beta, NULL, BETA);
  Q3N_REFUSE(!a->ba, NULL, BA);
  Q3N_REFUSE(!a->a, NULL, A);
  Q3N_REFUSE(!a->dt_bias, NULL, DT_BIAS);
  const void *in[] = {a->ba, a->a, a->dt_bias};
  const int64_t bytes[] = {nba * 4, a->HV * 4, a->HV * 4};
  for (int i = 0; i < 3; i++) {
    Q3N_REFUSE(q3n_overlap(a->g, ng * 4, in[i], bytes[i]), ALIAS, G);
    Q3N_REFUSE(q3n_overlap(a->beta, nbeta * 4, in[i], bytes[i]), ALIAS, BETA);
  }
  Q3N_REFUSE(q3n_overlap(a->beta, nbeta * 4, a->g, ng * 4), ALIAS, BETA);
  return Q3N_OK;
}

q3n_status q3n_kv_store_check(const q3n_kv_store_args *a) {
  Q3N_REFUSE(!a, NULL, ARGS);
  Q3N_REFUSE(a->struct_bytes != sizeof *a, ABI, STRUCT_BYTES);
  const int q8 = a->dtype == Q3N_Q8_0;
  Q3N_REFUSE(!q8 && a->dtype != Q3N_F32 && a->dtype != Q3N_F16 && a->dtype != Q3N_BF16, DTYPE, DTYPE);
  Q3N_REFUSE(a->slots < 0, SIZE, SLOTS);
  Q3N_REFUSE(a->S < 0, SIZE, S);
  Q3N_REFUSE(a->B < 0, SIZE, B);
  Q3N_REFUSE(a->T < 0, SIZE, T);
  Q3N_REFUSE(a->N < 0 || (q8 && a->N % 32), SIZE, N);

  const q3n_axis cache[] = {{a->slots, a->cache_slot}, {a->S, a->cache_s}, {a->N, 1}};
  const q3n_axis x[] = {{a->T, a->x_t}, {a->N, 1}};
  const int64_t ncache = q3n_extent(cache, 3), nx = q3n_extent(x, 2);
  const int whole = !q8 || ((a->slots < 2 || a->cache_slot % 32 == 0) && (a->S < 2 || a->cache_s % 32 == 0));
  Q3N_REFUSE(ncache < 0 || !q3n_disjoint(cache, 3) || !whole, STRIDE, CACHE);
  Q3N_REFUSE(nx < 0, STRIDE, X);

  Q3N_REFUSE(!a->cu_seqlens, NULL, CU_SEQLENS);
  Q3N_REFUSE(a->B > 0 && !a->slot, NULL, SLOT);
  Q3N_REFUSE(a->T > 0 && !a->pos, NULL, POS);
  Q3N_REFUSE(a->cu_seqlens[0] != 0 || a->cu_seqlens[a->B] != a->T, VALUE, CU_SEQLENS);
  for (int64_t b = 0; b < a->B; b++) Q3N_REFUSE(a->cu_seqlens[b + 1] < a->cu_seqlens[b], VALUE, CU_SEQLENS);
  for (int64_t b = 0; b < a->B; b++) {
    Q3N_REFUSE(a->slot[b] < 0 || a->slot[b] >= a->slots, VALUE, SLOT);
    for (int64_t c = 0; c < b; c++) Q3N_REFUSE(a->slot[c] == a->slot[b], VALUE, SLOT);
    int64_t last = -1;
    for (int64_t t = a->cu_seqlens[b]; t < a->cu_seqlens[b + 1]; last = a->pos[t++])
      Q3N_REFUSE(a->pos[t] <= last || a->pos[t] >= a->S, VALUE, POS);
  }
  if (nx == 0) return Q3N_OK;

  Q3N_REFUSE(!a->cache, NULL, CACHE);
  Q3N_REFUSE(!a->x, NULL, X);
  const int64_t bytes = q3n_dtype_bytes(a->dtype, ncache);
  Q3N_REFUSE(q3n_overlap(a->cache, bytes, a->x, nx * 4), ALIAS, CACHE);
  Q3N_REFUSE(q3n_overlap(a->cache, bytes, a->slot, a->B * 8), ALIAS, CACHE);
  Q3N_REFUSE(q3n_overlap(a->cache, bytes, a->pos, a->T * 8), ALIAS, CACHE);
  Q3N_REFUSE(q3n_overlap(a->cache, bytes, a->cu_seqlens, a->B * 8 + 8), ALIAS, CACHE);
  return Q3N_OK;
}

q3n_status q3n_row_gate_check(const q3n_row_gate_args *a) {
  Q3N_REFUSE(!a, NULL, ARGS);
  Q3N_REFUSE(a->struct_bytes != sizeof *a, ABI, STRUCT_BYTES);
  Q3N_REFUSE(a->T < 0 || a->T > INT64_MAX / 8, SIZE, T);
  Q3N_REFUSE(a->D < 0 || a->D > INT64_MAX / 8, SIZE, D);

  const q3n_axis x[] = {{a->T, a->x_t}, {a->D, 1}};
  const int64_t nx = q3n_extent(x, 2);
  Q3N_REFUSE(nx < 0, STRIDE, X);
  if (a->T == 0) return Q3N_OK;

  Q3N_REFUSE(!a->y, NULL, Y);
  Q3N_REFUSE(a->D > 0 && !a->x, NULL, X);
  Q3N_REFUSE(a->D > 0 && !a->w, NULL, W);
  Q3N_REFUSE(q3n_overlap(a->y, a->T * 4, a->x, nx * 4), ALIAS, Y);
  Q3N_REFUSE(q3n_overlap(a->y, a->T * 4, a->w, a->D * 4), ALIAS, Y);
  return Q3N_OK;
}

int64_t q3n_gather_items(const q3n_gather_args *a) { return a->N ? a->T : 0; }
int64_t q3n_add_items(const q3n_add_args *a) { return a->N ? a->T : 0; }
int64_t q3n_delta_gates_items(const q3n_delta_gates_args *a) { return a->HV ? a->T : 0; }
int64_t q3n_kv_store_items(const q3n_kv_store_args *a) { return a->N ? a->T : 0; }
int64_t q3n_row_gate_items(const q3n_row_gate_args *a) { return a->T; }

#define NO_SCRATCH(op)                                           \
  int64_t q3n_##op##_no_scratch(const q3n_##op##_args *a) {      \
    (void)a;                                                     \
    return 0;                                                    \
  }
NO_SCRATCH(gather)
NO_SCRATCH(add)
NO_SCRATCH(delta_gates)
NO_SCRATCH(kv_store)
NO_SCRATCH(row_gate)

#include "layer.inc"
Q3N_DEFINE_OPERATOR(gather, Q3N_GATHER_VARIANTS)
Q3N_DEFINE_BEST_FIRST(gather)
Q3N_DEFINE_OPERATOR(add, Q3N_ADD_VARIANTS)
Q3N_DEFINE_BEST_FIRST(add)
Q3N_DEFINE_OPERATOR(delta_gates, Q3N_DELTA_GATES_VARIANTS)
Q3N_DEFINE_BEST_FIRST(delta_gates)
Q3N_DEFINE_OPERATOR(kv_store, Q3N_KV_STORE_VARIANTS)
Q3N_DEFINE_BEST_FIRST(kv_store)
Q3N_DEFINE_OPERATOR(row_gate, Q3N_ROW_GATE_VARIANTS)
Q3N_DEFINE_BEST_FIRST(row_gate)
