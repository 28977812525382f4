/* Every variant of every operator, whole and then cut into ranges that threads run at the same time: the results must
   be equal bit for bit. Built with -fsanitize=thread it finds races, with memory it finds reads of what nothing wrote,
   with address and undefined the rest. Every array is a heap block of exactly the size its header states.

   A call is described by its args, the arrays it writes, and nothing else; RUN does the same with each of them. */
#include <math.h>
#include <pthread.h>

#include "calls.h"

enum { THREADS = 8 };

typedef struct part {
  const call *of;
  int64_t begin, end;
  q3n_status status;
} part;

static void *run_part(void *argument) {
  part *p = argument;
  /* A block of its own for each range, exact in size, never written before: the sanitizers watch its ends and its
     contents. */
  void *scratch = NULL;
  const size_t bytes = (size_t)p->of->scratch_bytes;
  if (bytes > 0 && posix_memalign(&scratch, Q3N_SCRATCH_ALIGN, bytes)) give_up("no scratch");
  p->status = p->of->run(p->of, p->begin, p->end, scratch);
  free(scratch);
  return NULL;
}

/* Runs the items in as many ranges, each on a thread. */
static q3n_status run_parts(const call *c, int64_t parts) {
  pthread_t threads[THREADS];
  part part_of[THREADS];
  for (int64_t i = 0; i < parts; i++) {
    part_of[i] = (part){c, c->items * i / parts, c->items * (i + 1) / parts, Q3N_OK};
    if (pthread_create(&threads[i], NULL, run_part, &part_of[i])) give_up("no thread");
  }
  q3n_status status = Q3N_OK;
  for (int64_t i = 0; i < parts; i++) {
    pthread_join(threads[i], NULL);
    if (part_of[i].status != Q3N_OK) status = part_of[i].status;
  }
  return status;
}

static void fail(const call *c, const char *what) {
  printf("%s %s: %s\n", c->op, c->variant, what);
  failures++;
}

/* The call in one range, then in 2, 3 and THREADS at the same time, from the same contents of the outputs. */
static void visit(const call *c, const output *outputs) {
  void *before[MAX_OUTPUTS], *whole[MAX_OUTPUTS];
  int count = 0;
  for (; count < MAX_OUTPUTS && outputs[count].at; count++) {
    before[count] = malloc((size_t)outputs[count].bytes);
    whole[count] = malloc((size_t)outputs[count].bytes);
    memcpy(before[count], outputs[count].at, (size_t)outputs[count].bytes);
  }
  q3n_status status = run_parts(c, 1);
  if (status != Q3N_OK) fail(c, q3n_status_string(status));
  for (int i = 0; i < count; i++) memcpy(whole[i], outputs[i].at, (size_t)outputs[i].bytes);
  static const int64_t cuts[] = {2, 3, THREADS};
  for (size_t cut = 0; cut < sizeof cuts / sizeof *cuts; cut++) {
    for (int i = 0; i < count; i++) memcpy(outputs[i].at, before[i], (size_t)outputs[i].bytes);
    if (run_parts(c, cuts[cut]) != Q3N_OK) fail(c, "a cut run was refused");
    /* memcmp reads every byte: MemorySanitizer reports here what was left unwritten. */
    for (int i = 0; i < count; i++)
      if (memcmp(outputs[i].at, whole[i], (size_t)outputs[i].bytes)) fail(c, "cut results differ");
  }
  /* The next variant starts from the same contents. */
  for (int i = 0; i < count; i++) {
    memcpy(outputs[i].at, before[i], (size_t)outputs[i].bytes);
    free(before[i]);
    free(whole[i]);
  }
  printf("%-16s %-20s %4lld items, scratch %lld\n", c->op, c->variant, (long long)c->items,
         (long long)c->scratch_bytes);
}

static void gated_delta(void) {
  enum { B = 2, T = 70, HK = 2, HV = 6, K = 24, V = 20, SLOTS = 3 };
  float *o = room(B * T * HV * V), *pool = floats(SLOTS * HV * V * K, -1, 1), *snapshots = room(B * T * HV * V * K);
  q3n_gated_delta_args args = {
      .struct_bytes = sizeof args, .o = o, .state_out = pool, .snapshots = snapshots,
      .q = floats(B * T * HK * K, -1, 1), .k = floats(B * T * HK * K, -1, 1), .v = floats(B * T * HV * V, -2, 2),
      .g = floats(B * T * HV, -0.2, 0), .beta = floats(B * T * HV, 0, 1), .state_in = pool,
      .slot_in = indices(B, (int64_t[]){2, 0}), .slot_out = indices(B, (int64_t[]){2, 0}),
      .cu_seqlens = indices(B + 1, (int64_t[]){0, 3, B * T}), .gate = Q3N_GATE_SCALAR,
      .head_map = Q3N_HEADS_GROUPED, .qk_l2norm = 1, .qk_l2norm_eps = 1e-6f, .scale = 0.2f,
      .o_t = HV * V, .o_h = V, .q_t = HK * K, .q_h = K, .k_t = HK * K, .k_h = K, .v_t = HV * V, .v_h = V,
      .g_t = HV, .g_h = 1, .beta_t = HV, .beta_h = 1, .state_slot = HV * V * K, .state_h = V * K, .state_v = K,
      .snap_t = HV * V * K, .snap_h = V * K, .snap_v = K,
      .slots = SLOTS, .B = B, .T = B * T, .HK = HK, .HV = HV, .K = K, .V = V};
  run_gated_delta(&args, OUTPUTS(F32(o, B * T * HV * V), F32(pool, SLOTS * HV * V * K),
                                 F32(snapshots, B * T * HV * V * K)));
}

static void solve_tri(void) {
  enum { BATCH = 3, N = 37, M = 29 };
  float *x = room(BATCH * N * M);
  q3n_solve_tri_args args = {
      .struct_bytes = sizeof args, .x = x, .l = floats(BATCH * N * N, -0.1, 0.1), .b = floats(BATCH * N * M, -2, 2),
      .unit_diagonal = 1, .x_batch = N * M, .x_row = M, .l_batch = N * N, .l_row = N, .b_batch = N * M, .b_row = M,
      .batch = BATCH, .n = N, .m = M};
  run_solve_tri(&args, OUTPUTS(F32(x, BATCH * N * M)));
}

static void causal_conv(void) {
  enum { B = 3, T = 9, C = 70, W = 4, SLOTS = 4 };
  float *y = room(B * T * C), *pool = floats(SLOTS * C * (W - 1), -1, 1), *snapshots = room(B * T * C * (W - 1));
  q3n_causal_conv_args args = {
      .struct_bytes = sizeof args, .y = y, .state_out = pool, .snapshots = snapshots, .x = floats(B * T * C, -1, 1),
      .w = floats(C * W, -1, 1), .bias = floats(C, -1, 1), .state_in = pool,
      .slot_in = indices(B, (int64_t[]){3, 1, 0}), .slot_out = indices(B, (int64_t[]){3, 1, 0}), .silu = 1,
      .y_b = T * C, .y_t = C, .x_b = T * C, .x_t = C, .w_c = W, .state_slot = C * (W - 1), .state_c = W - 1,
      .snap_b = T * C * (W - 1), .snap_t = C * (W - 1), .snap_c = W - 1,
      .slots = SLOTS, .B = B, .T = T, .C = C, .width = W};
  run_causal_conv(&args, OUTPUTS(F32(y, B * T * C), F32(pool, SLOTS * C * (W - 1)),
                                 F32(snapshots, B * T * C * (W - 1))));
}

static void norm(void) {
  enum { T = 5, H = 3, D = 77 };
  for (int kind = Q3N_NORM_RMS; kind <= Q3N_NORM_L2; kind++) {
    float *y = room(T * H * D);
    q3n_norm_args args = {
        .struct_bytes = sizeof args, .y = y, .x = floats(T * H * D, -2, 2),
        .w = kind == Q3N_NORM_L2 ? NULL : floats(D, -1, 1),
        .z = kind == Q3N_NORM_RMS_GATED ? floats(T * H * D, -3, 3) : NULL, .kind = (q3n_norm_kind)kind, .eps = 1e-6f,
        .y_t = H * D, .y_h = D, .x_t = H * D, .x_h = D, .z_t = H * D, .z_h = D, .T = T, .H = H, .D = D};
    run_norm(&args, OUTPUTS(F32(y, T * H * D)));
  }
}

static void rope(void) {
  enum { T = 11, H = 3, D = 33, R = 10 };
  int64_t pos[T];
  for (int t = 0; t < T; t++) pos[t] = 1000 * t;
  float *y = floats(T * H * D, -1, 1);
  /* in place */
  q3n_rope_args args = {.struct_bytes = sizeof args, .y = y, .x = y, .pos = indices(T, pos), .base = 1e7,
                        .y_t = H * D, .y_h = D, .x_t = H * D, .x_h = D, .T = T, .H = H, .D = D, .R = R};
  run_rope(&args, OUTPUTS(F32(y, T * H * D)));
}

static void attention(void) {
  enum { B = 2, T = 9, S = 70, HQ = 6, HKV = 2, D = 32, SLOTS = 3 };
  static const q3n_dtype types[] = {Q3N_F32, Q3N_F16, Q3N_BF16, Q3N_Q8_0};
  for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
    float *o = room(B * T * HQ * D), *lse = room(B * T * HQ);
    q3n_attention_args args = {
        .struct_bytes = sizeof args, .o = o, .lse = lse, .q = floats(B * T * HQ * D, -1, 1),
        .k = weights(types[i], SLOTS * S * HKV, D), .v = weights(types[i], SLOTS * S * HKV, D),
        .gate = floats(B * T * HQ * D, -2, 2), .mask = floats(B * T * S, -1, 1), .sinks = floats(HQ, -1, 1),
        .slot = indices(B, (int64_t[]){1, 2}), .kv_len = indices(B, (int64_t[]){S, 12}), .kv_dtype = types[i],
        .causal = 1, .scale = 0.2f, .o_b = T * HQ * D, .o_t = HQ * D, .o_h = D, .lse_b = T * HQ, .lse_t = HQ,
        .q_b = T * HQ * D, .q_t = HQ * D, .q_h = D, .k_slot = S * HKV * D, .k_s = HKV * D, .k_h = D,
        .v_slot = S * HKV * D, .v_s = HKV * D, .v_h = D, .gate_b = T * HQ * D, .gate_t = HQ * D, .gate_h = D,
        .mask_b = T * S, .mask_t = S, .kv_begin = 0, .kv_end = S,
        .slots = SLOTS, .B = B, .T = T, .S = S, .HQ = HQ, .HKV = HKV, .D = D};
    run_attention(&args, OUTPUTS(F32(o, B * T * HQ * D), F32(lse, B * T * HQ)));
  }
}

static void attention_merge(void) {
  enum { PARTS = 3, T = 9, HQ = 6, D = 31 };
  float *o = room(T * HQ * D), *lse = room(T * HQ);
  q3n_attention_merge_args args = {
      .struct_bytes = sizeof args, .o = o, .lse = lse, .part_o = floats(PARTS * T * HQ * D, -1, 1),
      .part_lse = floats(PARTS * T * HQ, -3, 3), .gate = floats(T * HQ * D, -1, 1), .sinks = floats(HQ, -1, 1),
      .o_t = HQ * D, .o_h = D, .lse_t = HQ, .gate_t = HQ * D, .gate_h = D, .parts = PARTS, .T = T, .HQ = HQ, .D = D};
  run_attention_merge(&args, OUTPUTS(F32(o, T * HQ * D), F32(lse, T * HQ)));
}

static void quant(void) {
  enum { ROWS = 11, N = 512 };
  for (int i = 0; i < TYPES; i++) {
    const q3n_dtype dtype = all_types[i];
    const int64_t bytes = ROWS * q3n_dtype_bytes(dtype, N);
    void *blocks = take(bytes);
    q3n_quantize_args encode = {.struct_bytes = sizeof encode, .y = blocks, .x = floats(ROWS * N, -2, 2),
                                .dtype = dtype, .y_row = N, .x_row = N, .rows = ROWS, .N = N};
    run_quantize(&encode, OUTPUTS({blocks, bytes}));
    float *y = room(ROWS * N);
    q3n_dequantize_args decode = {.struct_bytes = sizeof decode, .y = y, .x = weights(dtype, ROWS, N),
                                  .dtype = dtype, .y_row = N, .x_row = N, .rows = ROWS, .N = N};
    run_dequantize(&decode, OUTPUTS(F32(y, ROWS * N)));
    if (q3n_dtype_block(dtype) == 1) continue;

    const q3n_dtype type = q3n_dtype_activations(dtype);
    const int64_t eight_bytes = ROWS * q3n_dtype_bytes(type, N), group_bytes = 48 * q3n_dtype_bytes(dtype, N);
    void *rows = take(eight_bytes), *groups = take(group_bytes);
    q3n_activations_args eight = {.struct_bytes = sizeof eight, .y = rows, .x = floats(ROWS * N, -2, 2), .dtype = type,
                                  .x_row = N, .rows = ROWS, .N = N};
    run_activations(&eight, OUTPUTS({rows, eight_bytes}));
    q3n_repack_args repack = {.struct_bytes = sizeof repack, .y = groups, .x = weights(dtype, 48, N), .dtype = dtype,
                              .x_row = N, .rows = 48, .N = N};
    run_repack(&repack, OUTPUTS({groups, group_bytes}));
  }
}

static void matmul(void) {
  enum { M = 9, N = 37, GROUPED = 32, K = 256 };
  for (int i = 0; i < TYPES; i++) {
    float *y = room(M * N);
    q3n_matmul_args args = {.struct_bytes = sizeof args, .y = y, .x = floats(M * K, -1, 1),
                            .w = weights(all_types[i], N, K), .dtype = all_types[i],
                            .y_m = N, .x_m = K, .w_n = K, .M = M, .N = N, .K = K};
    run_matmul(&args, OUTPUTS(F32(y, M * N)));
    if (q3n_dtype_block(all_types[i]) == 1) continue;

    args.x = eights(all_types[i], M, K);
    args.x_dtype = q3n_dtype_activations(all_types[i]);
    run_matmul(&args, OUTPUTS(F32(y, M * N)));
    args.N = args.y_m = GROUPED;
    args.w = interleaved(all_types[i], GROUPED, K);
    args.dtype = (q3n_dtype)(all_types[i] | Q3N_R16);
    run_matmul(&args, OUTPUTS(F32(y, M * GROUPED)));
  }
}

/* The four steps of the feed-forward, each on what the one before it gave. */
static void moe(void) {
  enum { T = 13, E = 5, TOP_K = 2, D = 256, F = 256, PAIRS = T * TOP_K };
  int32_t *ids = take(PAIRS * (int64_t)sizeof *ids);
  float *share = room(PAIRS), *logits = floats(T * E, -3, 3);
  int64_t *bad_token = indices(1, (int64_t[]){INT64_MAX});
  q3n_moe_route_args route = {.struct_bytes = sizeof route, .ids = ids, .weights = share, .bad_token = bad_token,
                              .logits = logits, .normalize = 1, .logits_t = E, .T = T, .E = E, .top_k = TOP_K};
  const output routed[MAX_OUTPUTS + 1] = {{ids, PAIRS * (int64_t)sizeof *ids}, F32(share, PAIRS)};
  run_moe_route(&route, routed);
  if (q3n_moe_route_run(NULL, &route, 0, T, NULL, 0) != Q3N_OK) failures++;

  /* Tokens 3 and 9 hold a NaN: ranges that run at the same time both lower bad_token. */
  float *nan_logits = floats(T * E, -3, 3);
  nan_logits[3 * E + 1] = nan_logits[9 * E + 4] = NAN;
  q3n_moe_route_args bad = route;
  bad.logits = nan_logits;
  bad.ids = take(PAIRS * (int64_t)sizeof *ids);
  bad.weights = room(PAIRS);
  for (int64_t i = 0; i < q3n_moe_route_variant_count(); i++) {
    const q3n_moe_route_variant *v = q3n_moe_route_variant_at(i);
    if (!q3n_isa_available(v->isa)) continue;
    *bad_token = INT64_MAX;
    const call c = {"moe_route", v->name, call_moe_route, v, &bad, v->items(&bad), v->scratch_bytes(&bad)};
    if (run_parts(&c, THREADS) == Q3N_OK || *bad_token != 3) fail(&c, "the lowest token with a NaN is not told");
  }

  int64_t *order = take(PAIRS * (int64_t)sizeof *order), *offsets = take((E + 1) * (int64_t)sizeof *offsets);
  q3n_moe_group_args group = {.struct_bytes = sizeof group, .order = order, .offsets = offsets, .ids = ids,
                              .T = T, .E = E, .top_k = TOP_K};
  run_moe_group(&group, OUTPUTS({order, PAIRS * (int64_t)sizeof *order},
                                {offsets, (E + 1) * (int64_t)sizeof *offsets}));
  if (q3n_moe_group_run(NULL, &group, 0, 1, NULL, 0) != Q3N_OK) failures++;

  for (int i = 0; i < TYPES; i++) {
    const q3n_dtype dtype = all_types[i];
    float *h = room(PAIRS * F), *y = floats(T * D, -1, 1);
    q3n_moe_up_args up = {.struct_bytes = sizeof up, .h = h, .x = floats(T * D, -1, 1),
                          .gate = weights(dtype, E * F, D), .up = weights(dtype, E * F, D), .order = order,
                          .offsets = offsets, .gate_dtype = dtype, .up_dtype = dtype, .x_t = D, .gate_e = F * D,
                          .gate_f = D, .up_e = F * D, .up_f = D, .T = T, .E = E, .top_k = TOP_K, .D = D, .F = F};
    run_moe_up(&up, OUTPUTS(F32(h, PAIRS * F)));
    q3n_moe_down_args down = {.struct_bytes = sizeof down, .y = y, .h = floats(PAIRS * F, -1, 1), .weights = share,
                              .down = weights(dtype, E * D, F), .order = order, .offsets = offsets, .dtype = dtype,
                              .accumulate = i % 2, .y_t = D, .down_e = D * F, .down_d = F,
                              .T = T, .E = E, .top_k = TOP_K, .D = D, .F = F};
    run_moe_down(&down, OUTPUTS(F32(y, T * D)));
    if (q3n_dtype_block(dtype) == 1) continue;

    up.x = eights(dtype, T, D);
    down.h = eights(dtype, PAIRS, F);
    up.x_dtype = down.h_dtype = q3n_dtype_activations(dtype);
    run_moe_up(&up, OUTPUTS(F32(h, PAIRS * F)));
    run_moe_down(&down, OUTPUTS(F32(y, T * D)));
    up.gate = interleaved(dtype, E * F, D);
    up.up = interleaved(dtype, E * F, D);
    down.down = interleaved(dtype, E * D, F);
    up.gate_dtype = up.up_dtype = down.dtype = (q3n_dtype)(dtype | Q3N_R16);
    run_moe_up(&up, OUTPUTS(F32(h, PAIRS * F)));
    run_moe_down(&down, OUTPUTS(F32(y, T * D)));
  }
}

static void layer(void) {
  enum { T = 13, N = 256, ROWS = 9, HK = 3, HV = 6, S = 8, SLOTS = 4, B = 3 };
  int64_t ids[T];
  for (int t = 0; t < T; t++) ids[t] = 5 * t % ROWS;
  for (size_t i = 0; i < sizeof all_types / sizeof *all_types; i++) {
    float *y = room(T * N);
    q3n_gather_args args = {.struct_bytes = sizeof args, .y = y, .table = weights(all_types[i], ROWS, N),
                            .ids = indices(T, ids), .dtype = all_types[i], .y_t = N, .table_row = N,
                            .T = T, .rows = ROWS, .N = N};
    run_gather(&args, OUTPUTS(F32(y, T * N)));
  }

  float *y = floats(T * N, -1, 1);
  q3n_add_args sum = {.struct_bytes = sizeof sum, .y = y, .x = floats(T * N, -1, 1), .y_t = N, .x_t = N,
                      .T = T, .N = N};
  run_add(&sum, OUTPUTS(F32(y, T * N)));

  float *g = room(T * HV), *beta = room(T * HV);
  q3n_delta_gates_args gates = {.struct_bytes = sizeof gates, .g = g, .beta = beta, .ba = floats(T * 2 * HV, -30, 30),
                                .a = floats(HV, -4, 0), .dt_bias = floats(HV, -1, 1), .g_t = HV, .beta_t = HV,
                                .ba_t = 2 * HV, .T = T, .HK = HK, .HV = HV};
  run_delta_gates(&gates, OUTPUTS(F32(g, T * HV), F32(beta, T * HV)));

  static const q3n_dtype types[] = {Q3N_F32, Q3N_F16, Q3N_BF16, Q3N_Q8_0};
  for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
    void *cache = weights(types[i], SLOTS * S, N);
    q3n_kv_store_args args = {
        .struct_bytes = sizeof args, .cache = cache, .x = floats(T * N, -1, 1),
        .slot = indices(B, (int64_t[]){3, 0, 1}), .cu_seqlens = indices(B + 1, (int64_t[]){0, 6, 6, T}),
        .pos = indices(T, (int64_t[]){0, 1, 2, 3, 5, 7, 0, 1, 2, 3, 4, 5, 6}), .dtype = types[i], .cache_slot = S * N,
        .cache_s = N, .x_t = N, .slots = SLOTS, .S = S, .B = B, .T = T, .N = N};
    run_kv_store(&args, OUTPUTS({cache, q3n_dtype_bytes(types[i], SLOTS * S * N)}));
  }

  float *gate = room(T);
  q3n_row_gate_args args = {.struct_bytes = sizeof args, .y = gate, .x = floats(T * N, -1, 1), .w = floats(N, -1, 1),
                            .x_t = N, .T = T, .D = N};
  run_row_gate(&args, OUTPUTS(F32(gate, T)));
}

int main(void) {
  void (*const operators[])(void) = {gated_delta, solve_tri, causal_conv, norm, rope, attention, attention_merge,
                                     quant, matmul, moe, layer};
  for (size_t i = 0; i < sizeof operators / sizeof *operators; i++) {
    operators[i]();
    release();
  }
  printf("%d failures\n", failures);
  return failures > 0;
}
