/* How many instructions every variant of every operator executes on fixed small shapes: one line a call, operator,
   variant, case, count, separated by tabs. Unlike a time the count is the same on every run and every machine, so a
   change of a few per cent shows. The processor is made to stop after every instruction (the trap flag of x86-64) and
   the stops are counted; no emulator is needed, which would lack the newest instruction sets. */
#include <signal.h>
#include <ucontext.h>

#include "../sanitize/calls.h"

#if !defined(__x86_64__) || !defined(__linux__)
#error "counting needs the trap flag of x86-64, and Linux"
#endif

/* The C library picks its copies by the machine; these are the same everywhere. */
#define PLAIN __attribute__((optimize("no-tree-loop-distribute-patterns")))
PLAIN void *memcpy(void *restrict to, const void *restrict from, size_t n) {
  uint8_t *t = to;
  const uint8_t *f = from;
  for (; n >= 8; n -= 8, t += 8, f += 8) *(uint64_t *)t = *(const uint64_t *)f;
  for (; n > 0; n--) *t++ = *f++;
  return to;
}
PLAIN void *memmove(void *to, const void *from, size_t n) {
  uint8_t *t = to;
  const uint8_t *f = from;
  if (t <= f) return memcpy(to, from, n);
  while (n-- > 0) t[n] = f[n];
  return to;
}
PLAIN void *memset(void *to, int byte, size_t n) {
  uint8_t *t = to;
  for (; n >= 8; n -= 8, t += 8) *(uint64_t *)t = 0x0101010101010101u * (uint8_t)byte;
  for (; n > 0; n--) *t++ = (uint8_t)byte;
  return to;
}

static volatile int64_t stops;

static void stop(int signal_number, siginfo_t *info, void *context) {
  (void)signal_number;
  (void)info;
  (void)context;
  stops++;
}

/* Sets or clears the trap flag, past the 128 bytes below the stack pointer that a function may use as they are. */
#define TRAP_FLAG(change)                                                                                        \
  __asm__ volatile("lea -128(%%rsp), %%rsp; pushfq; " change ", (%%rsp); popfq; lea 128(%%rsp), %%rsp" : : : "cc", \
                   "memory")
#define TRAP_ON TRAP_FLAG("orq $0x100")
#define TRAP_OFF TRAP_FLAG("andq $-0x101")

static const char *label;

static void visit(const call *c, const output *outputs) {
  /* The readable forms are not held to a speed, and a stop costs microseconds. */
  if (strstr(c->variant, "scalar")) return;
  void *before[MAX_OUTPUTS], *scratch = NULL;
  for (int i = 0; i < MAX_OUTPUTS && outputs[i].at; i++) {
    before[i] = malloc((size_t)outputs[i].bytes);
    memcpy(before[i], outputs[i].at, (size_t)outputs[i].bytes);
  }
  if (c->scratch_bytes > 0 && posix_memalign(&scratch, Q3N_SCRATCH_ALIGN, (size_t)c->scratch_bytes)) give_up("no scratch");
  stops = 0;
  TRAP_ON;
  const q3n_status status = c->run(c, 0, c->items, scratch);
  TRAP_OFF;
  if (status != Q3N_OK) {
    printf("%s %s %s: %s\n", c->op, c->variant, label, q3n_status_string(status));
    failures++;
  } else {
    printf("%s\t%s\t%s\t%lld\n", c->op, c->variant, label, (long long)stops);
  }
  free(scratch);
  for (int i = 0; i < MAX_OUTPUTS && outputs[i].at; i++) {
    memcpy(outputs[i].at, before[i], (size_t)outputs[i].bytes);
    free(before[i]);
  }
}

/* A scratch of its own, so that SIGTRAP does not write below the kernel's stack pointer. */
static void catch_stops(void) {
  stack_t stack = {.ss_sp = malloc(1 << 16), .ss_size = 1 << 16};
  struct sigaction action = {.sa_sigaction = stop, .sa_flags = SA_ONSTACK | SA_SIGINFO};
  if (!stack.ss_sp || sigaltstack(&stack, NULL) || sigaction(SIGTRAP, &action, NULL)) give_up("no signal handler");
}

static void gated_delta(void) {
  enum { HK = 1, HV = 1, D = 64, MAX_T = 34 };
  static const struct {
    const char *name;
    int64_t T;
  } cases[] = {{"D=64,T=1", 1}, {"D=64,T=34", MAX_T}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    const int64_t T = cases[i].T;
    label = cases[i].name;
    float *o = room(T * HV * D), *state = floats(HV * D * D, -1, 1);
    q3n_gated_delta_args args = {
        .struct_bytes = sizeof args, .o = o, .state_out = state, .state_in = state,
        .q = floats(T * HK * D, -1, 1), .k = floats(T * HK * D, -1, 1), .v = floats(T * HV * D, -2, 2),
        .g = floats(T * HV, -0.2, 0), .beta = floats(T * HV, 0, 1), .gate = Q3N_GATE_SCALAR,
        .head_map = Q3N_HEADS_GROUPED, .qk_l2norm = 1, .qk_l2norm_eps = 1e-6f, .scale = 0.125f,
        .o_t = HV * D, .o_h = D, .q_t = HK * D, .q_h = D, .k_t = HK * D, .k_h = D, .v_t = HV * D, .v_h = D,
        .g_t = HV, .g_h = 1, .beta_t = HV, .beta_h = 1, .state_slot = HV * D * D, .state_h = D * D, .state_v = D,
        .slots = 1, .B = 1, .T = T, .HK = HK, .HV = HV, .K = D, .V = D};
    run_gated_delta(&args, OUTPUTS(F32(o, T * HV * D), F32(state, HV * D * D)));
  }
}

static void solve_tri(void) {
  enum { N = 64, M = 16 };
  float *x = room(N * M);
  q3n_solve_tri_args args = {
      .struct_bytes = sizeof args, .x = x, .l = floats(N * N, -0.1, 0.1), .b = floats(N * M, -2, 2),
      .unit_diagonal = 1, .x_batch = N * M, .x_row = M, .l_batch = N * N, .l_row = N, .b_batch = N * M, .b_row = M,
      .batch = 1, .n = N, .m = M};
  label = "n=64,m=16";
  run_solve_tri(&args, OUTPUTS(F32(x, N * M)));
}

static void causal_conv(void) {
  enum { T = 16, C = 128, W = 4 };
  float *y = room(T * C), *state = floats(C * (W - 1), -1, 1);
  q3n_causal_conv_args args = {
      .struct_bytes = sizeof args, .y = y, .state_out = state, .x = floats(T * C, -1, 1), .w = floats(C * W, -1, 1),
      .state_in = state, .silu = 1, .y_b = T * C, .y_t = C, .x_b = T * C, .x_t = C, .w_c = W,
      .state_slot = C * (W - 1), .state_c = W - 1, .slots = 1, .B = 1, .T = T, .C = C, .width = W};
  label = "T=16,C=128,W=4";
  run_causal_conv(&args, OUTPUTS(F32(y, T * C), F32(state, C * (W - 1))));
}

static void norm(void) {
  enum { T = 4, H = 2, D = 256 };
  static const char *const names[] = {"rms,T=4,H=2,D=256", "rms_plus1,T=4,H=2,D=256", "gated,T=4,H=2,D=256", "l2,T=4,H=2,D=256"};
  for (int kind = Q3N_NORM_RMS; kind <= Q3N_NORM_L2; kind++) {
    float *y = room(T * H * D);
    q3n_norm_args args = {
        .struct_bytes = sizeof args, .y = y, .x = floats(T * H * D, -2, 2),
        .w = kind == Q3N_NORM_L2 ? NULL : floats(D, -1, 1),
        .z = kind == Q3N_NORM_RMS_GATED ? floats(T * H * D, -3, 3) : NULL, .kind = (q3n_norm_kind)kind, .eps = 1e-6f,
        .y_t = H * D, .y_h = D, .x_t = H * D, .x_h = D, .z_t = H * D, .z_h = D, .T = T, .H = H, .D = D};
    label = names[kind];
    run_norm(&args, OUTPUTS(F32(y, T * H * D)));
  }
}

static void rope(void) {
  enum { T = 4, H = 4, D = 256, R = 64 };
  float *y = floats(T * H * D, -1, 1);
  q3n_rope_args args = {.struct_bytes = sizeof args, .y = y, .x = y, .pos = indices(T, (int64_t[]){0, 1, 100, 8000}),
                        .base = 1e7, .y_t = H * D, .y_h = D, .x_t = H * D, .x_h = D, .T = T, .H = H, .D = D, .R = R};
  label = "T=4,H=4,D=256,R=64";
  run_rope(&args, OUTPUTS(F32(y, T * H * D)));
}

/* One query over many keys, then a prompt over itself. */
static void attention(void) {
  enum { HQ = 2, HKV = 1, D = 256 };
  static const struct {
    const char *name;
    q3n_dtype kv;
    int64_t T, S;
  } cases[] = {{"f32,T=1,S=64", Q3N_F32, 1, 64},   {"f16,T=1,S=64", Q3N_F16, 1, 64},   {"bf16,T=1,S=64", Q3N_BF16, 1, 64},
               {"q8_0,T=1,S=64", Q3N_Q8_0, 1, 64}, {"f32,T=8,S=8", Q3N_F32, 8, 8}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    const int64_t T = cases[i].T, S = cases[i].S;
    float *o = room(T * HQ * D);
    q3n_attention_args args = {
        .struct_bytes = sizeof args, .o = o, .q = floats(T * HQ * D, -1, 1), .k = weights(cases[i].kv, S * HKV, D),
        .v = weights(cases[i].kv, S * HKV, D), .gate = floats(T * HQ * D, -2, 2), .kv_dtype = cases[i].kv,
        .causal = 1, .scale = 0.0625f, .o_b = T * HQ * D, .o_t = HQ * D, .o_h = D, .q_b = T * HQ * D, .q_t = HQ * D,
        .q_h = D, .k_slot = S * HKV * D, .k_s = HKV * D, .k_h = D, .v_slot = S * HKV * D, .v_s = HKV * D, .v_h = D,
        .gate_b = T * HQ * D, .gate_t = HQ * D, .gate_h = D, .kv_begin = 0, .kv_end = S,
        .slots = 1, .B = 1, .T = T, .S = S, .HQ = HQ, .HKV = HKV, .D = D};
    label = cases[i].name;
    run_attention(&args, OUTPUTS(F32(o, T * HQ * D)));
  }
}

static void attention_merge(void) {
  enum { PARTS = 4, T = 1, HQ = 4, D = 256 };
  float *o = room(T * HQ * D);
  q3n_attention_merge_args args = {
      .struct_bytes = sizeof args, .o = o, .part_o = floats(PARTS * T * HQ * D, -1, 1),
      .part_lse = floats(PARTS * T * HQ, -3, 3), .gate = floats(T * HQ * D, -1, 1), .o_t = HQ * D, .o_h = D,
      .gate_t = HQ * D, .gate_h = D, .parts = PARTS, .T = T, .HQ = HQ, .D = D};
  label = "parts=4,HQ=4,D=256";
  run_attention_merge(&args, OUTPUTS(F32(o, T * HQ * D)));
}

/* "q4_k" in one of a few texts that live as long as the program. */
static const char *named(q3n_dtype dtype, const char *shape) {
  static char texts[256][48];
  static int used;
  snprintf(texts[used], sizeof texts[0], "%s,%s", q3n_dtype_name(dtype), shape);
  return texts[used++];
}

static void quant(void) {
  enum { ROWS = 1, N = 512, GROUPED = 16 };
  for (int i = 0; i < TYPES; i++) {
    const q3n_dtype dtype = all_types[i];
    float *y = room(ROWS * N);
    q3n_dequantize_args decode = {.struct_bytes = sizeof decode, .y = y, .x = weights(dtype, ROWS, N), .dtype = dtype,
                                  .y_row = N, .x_row = N, .rows = ROWS, .N = N};
    label = named(dtype, "N=512");
    run_dequantize(&decode, OUTPUTS(F32(y, ROWS * N)));
  }
  static const q3n_dtype types[] = {Q3N_F16, Q3N_BF16, Q3N_Q8_0, Q3N_Q4_0};
  for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
    const int64_t bytes = ROWS * q3n_dtype_bytes(types[i], N);
    void *y = take(bytes);
    q3n_quantize_args encode = {.struct_bytes = sizeof encode, .y = y, .x = floats(ROWS * N, -2, 2), .dtype = types[i],
                                .y_row = N, .x_row = N, .rows = ROWS, .N = N};
    label = named(types[i], "N=512");
    run_quantize(&encode, OUTPUTS({y, bytes}));
  }
  static const q3n_dtype blocks[] = {Q3N_Q8_0, Q3N_Q4_K};
  for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) {
    const q3n_dtype eight = q3n_dtype_activations(blocks[i]);
    const int64_t bytes = ROWS * q3n_dtype_bytes(eight, N), group_bytes = GROUPED * q3n_dtype_bytes(blocks[i], N);
    void *y = take(bytes), *groups = take(group_bytes);
    q3n_activations_args args = {.struct_bytes = sizeof args, .y = y, .x = floats(ROWS * N, -2, 2), .dtype = eight,
                                 .x_row = N, .rows = ROWS, .N = N};
    label = named(eight, "N=512");
    run_activations(&args, OUTPUTS({y, bytes}));
    q3n_repack_args repack = {.struct_bytes = sizeof repack, .y = groups, .x = weights(blocks[i], GROUPED, N),
                              .dtype = blocks[i], .x_row = N, .rows = GROUPED, .N = N};
    label = named(blocks[i], "rows=16,N=512");
    run_repack(&repack, OUTPUTS({groups, group_bytes}));
  }
}

/* One token and ten meet 8-bit activations, as rows lie and interleaved; three meet f32. */
static void matmul(void) {
  enum { N = 32, K = 256 };
  static const q3n_dtype plain[] = {Q3N_F32, Q3N_BF16, Q3N_Q4_K};
  for (size_t i = 0; i < sizeof plain / sizeof *plain; i++) {
    enum { M = 3 };
    float *y = room(M * N);
    q3n_matmul_args args = {.struct_bytes = sizeof args, .y = y, .x = floats(M * K, -1, 1), .w = weights(plain[i], N, K),
                            .dtype = plain[i], .y_m = N, .x_m = K, .w_n = K, .M = M, .N = N, .K = K};
    label = named(plain[i], "f32,M=3,N=32,K=256");
    run_matmul(&args, OUTPUTS(F32(y, M * N)));
  }
  static const q3n_dtype blocks[] = {Q3N_Q8_0, Q3N_Q4_0, Q3N_Q4_K, Q3N_Q5_K, Q3N_Q6_K};
  for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
    for (int64_t M = 1; M <= 10; M += 9) {
      const char *shape = M == 1 ? "q8,M=1,N=32,K=256" : "q8,M=10,N=32,K=256";
      float *y = room(M * N);
      q3n_matmul_args args = {.struct_bytes = sizeof args, .y = y, .x = eights(blocks[i], M, K),
                              .w = weights(blocks[i], N, K), .dtype = blocks[i],
                              .x_dtype = q3n_dtype_activations(blocks[i]),
                              .y_m = N, .x_m = K, .w_n = K, .M = M, .N = N, .K = K};
      label = named(blocks[i], shape);
      if (M == 1) run_matmul(&args, OUTPUTS(F32(y, M * N)));
      args.w = interleaved(blocks[i], N, K);
      args.dtype = (q3n_dtype)(blocks[i] | Q3N_R16);
      label = named(args.dtype, shape);
      run_matmul(&args, OUTPUTS(F32(y, M * N)));
    }
}

/* Four tokens choose two of three experts. */
static void moe(void) {
  enum { T = 4, E = 3, TOP_K = 2, WIDTH = 256, ROWS = 32, PAIRS = T * TOP_K };
  int32_t *ids = take(PAIRS * (int64_t)sizeof *ids);
  float *share = room(PAIRS), *h = room(PAIRS * ROWS), *y = floats(T * ROWS, -1, 1);
  int64_t *order = take(PAIRS * (int64_t)sizeof *order), *offsets = take((E + 1) * (int64_t)sizeof *offsets);
  q3n_moe_route_args route = {.struct_bytes = sizeof route, .ids = ids, .weights = share,
                              .bad_token = indices(1, (int64_t[]){INT64_MAX}), .logits = floats(T * E, -3, 3),
                              .normalize = 1, .logits_t = E, .T = T, .E = E, .top_k = TOP_K};
  q3n_moe_group_args group = {.struct_bytes = sizeof group, .order = order, .offsets = offsets, .ids = ids,
                              .T = T, .E = E, .top_k = TOP_K};
  if (q3n_moe_route_run(NULL, &route, 0, T, NULL, 0) != Q3N_OK) give_up("moe_route refused its args");
  if (q3n_moe_group_run(NULL, &group, 0, 1, NULL, 0) != Q3N_OK) give_up("moe_group refused its args");
  for (int eight = 0; eight < 2; eight++) {
    const q3n_dtype dtype = eight ? (q3n_dtype)(Q3N_Q4_K | Q3N_R16) : Q3N_BF16;
    const q3n_dtype x_dtype = eight ? q3n_dtype_activations(Q3N_Q4_K) : Q3N_F32;
    void *w[3];
    for (int i = 0; i < 3; i++)
      w[i] = eight ? interleaved(Q3N_Q4_K, E * ROWS, WIDTH) : weights(Q3N_BF16, E * ROWS, WIDTH);
    q3n_moe_up_args up = {.struct_bytes = sizeof up, .h = h,
                          .x = eight ? eights(Q3N_Q4_K, T, WIDTH) : (void *)floats(T * WIDTH, -1, 1),
                          .gate = w[0], .up = w[1], .order = order, .offsets = offsets, .gate_dtype = dtype,
                          .up_dtype = dtype, .x_dtype = x_dtype, .x_t = WIDTH, .gate_e = ROWS * WIDTH, .gate_f = WIDTH,
                          .up_e = ROWS * WIDTH, .up_f = WIDTH, .T = T, .E = E, .top_k = TOP_K, .D = WIDTH, .F = ROWS};
    label = named(dtype, "T=4,E=3,D=256,F=32");
    run_moe_up(&up, OUTPUTS(F32(h, PAIRS * ROWS)));
    q3n_moe_down_args down = {.struct_bytes = sizeof down, .y = y,
                              .h = eight ? eights(Q3N_Q4_K, PAIRS, WIDTH) : (void *)floats(PAIRS * WIDTH, -1, 1),
                              .weights = share, .down = w[2], .order = order, .offsets = offsets, .dtype = dtype,
                              .h_dtype = x_dtype, .y_t = ROWS, .down_e = ROWS * WIDTH, .down_d = WIDTH,
                              .T = T, .E = E, .top_k = TOP_K, .D = ROWS, .F = WIDTH};
    label = named(dtype, "T=4,E=3,D=32,F=256");
    run_moe_down(&down, OUTPUTS(F32(y, T * ROWS)));
  }
}

static void moe_choice(void) {
  enum { T = 2, E = 512, TOP_K = 10, PAIRS = T * TOP_K };
  int32_t *ids = take(PAIRS * (int64_t)sizeof *ids);
  float *share = room(PAIRS);
  int64_t *order = take(PAIRS * (int64_t)sizeof *order), *offsets = take((E + 1) * (int64_t)sizeof *offsets);
  q3n_moe_route_args route = {.struct_bytes = sizeof route, .ids = ids, .weights = share,
                              .bad_token = indices(1, (int64_t[]){INT64_MAX}), .logits = floats(T * E, -3, 3),
                              .normalize = 1, .logits_t = E, .T = T, .E = E, .top_k = TOP_K};
  q3n_moe_group_args group = {.struct_bytes = sizeof group, .order = order, .offsets = offsets, .ids = ids,
                              .T = T, .E = E, .top_k = TOP_K};
  label = "T=2,E=512,top_k=10";
  run_moe_route(&route, OUTPUTS({ids, PAIRS * (int64_t)sizeof *ids}, F32(share, PAIRS)));
  if (q3n_moe_route_run(NULL, &route, 0, T, NULL, 0) != Q3N_OK) give_up("moe_route refused its args");
  run_moe_group(&group, OUTPUTS({order, PAIRS * (int64_t)sizeof *order}, {offsets, (E + 1) * (int64_t)sizeof *offsets}));
}

int main(void) {
  void (*const operators[])(void) = {gated_delta, solve_tri, causal_conv, norm, rope, attention, attention_merge,
                                     quant, matmul, moe, moe_choice};
  catch_stops();
  for (size_t i = 0; i < sizeof operators / sizeof *operators; i++) {
    operators[i]();
    release();
  }
  return failures > 0;
}
