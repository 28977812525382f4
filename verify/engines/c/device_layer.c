/* The kernels of a Gated DeltaNet layer on a device, queued on the engine's stream: convolution, gates, delta rule,
   gated norm, for a packed prompt of two sequences and then step by step, with the states in slots of pools that stay
   on the device. Nothing is waited for until all is queued. The same calls on the CPU judge it. */
#include <math.h>

#include "device.h"

enum { HK = 2, HV = 4, K = 64, V = 32, W = 4, B = 2, SLOTS = 3, FREE_SLOT = 1, PROMPT = 150, STEPS = 6 };
enum { QKV = 2 * HK * K + HV * V, ROW = QKV + HV * V }; /* a row of the projection: q, k, v, z */
enum { ROWS = PROMPT + STEPS * B };                      /* of the prompt, then those of each step */

/* All that the kernels read and write, on the CPU or on the device. */
typedef struct arrays {
  float row[ROWS][ROW], ba[ROWS][2 * HV];                                 /* what projections left */
  float conv_w[QKV][W], norm_w[V], a[HV], dt_bias[HV];                    /* weights */
  float conv_state[SLOTS][QKV][W - 1], state[SLOTS][HV][V][K];            /* pools */
  float qkv[ROWS][QKV], g[ROWS][HV], beta[ROWS][HV], o[ROWS][HV][V];
  int64_t slot[B], starts[B + 1];
} arrays;

typedef struct calls {
  q3n_causal_conv_args conv;
  q3n_delta_gates_args gates;
  q3n_gated_delta_args delta;
  q3n_norm_args norm;
} calls;

typedef q3n_status (*delta_launcher)(const q3n_gated_delta_args *, void *, q3n_stream);

/* The rows first .. first + n: the packed prompt, from empty states, or a token of every sequence. `at` and `indices`
   are only reckoned with here: they may be the device's. */
static calls make(arrays *at, const arrays *indices, int64_t first, int64_t n) {
  const int prompt = first == 0;
  const int64_t *starts = prompt ? indices->starts : NULL, T = prompt ? n : 1;
  calls c = {
      .conv = {.struct_bytes = sizeof c.conv, .y = at->qkv[first], .x = at->row[first], .w = at->conv_w[0], .silu = 1,
               .state_in = prompt ? NULL : at->conv_state[0][0], .state_out = at->conv_state[0][0],
               .slot_in = indices->slot, .slot_out = indices->slot, .cu_seqlens = starts, .y_b = QKV, .y_t = QKV,
               .x_b = ROW, .x_t = ROW, .w_c = W, .state_slot = QKV * (W - 1), .state_c = W - 1, .slots = SLOTS, .B = B,
               .T = T, .C = QKV, .width = W},
      .gates = {.struct_bytes = sizeof c.gates, .g = at->g[first], .beta = at->beta[first], .ba = at->ba[first],
                .a = at->a, .dt_bias = at->dt_bias, .g_t = HV, .beta_t = HV, .ba_t = 2 * HV, .T = n, .HK = HK,
                .HV = HV},
      .delta = {.struct_bytes = sizeof c.delta, .o = at->o[first][0], .state_out = at->state[0][0][0],
                .state_in = prompt ? NULL : at->state[0][0][0], .q = at->qkv[first], .k = at->qkv[first] + HK * K,
                .v = at->qkv[first] + 2 * HK * K, .g = at->g[first], .beta = at->beta[first], .slot_in = indices->slot,
                .slot_out = indices->slot, .cu_seqlens = starts, .gate = Q3N_GATE_SCALAR,
                .head_map = Q3N_HEADS_GROUPED, .qk_l2norm = 1, .qk_l2norm_eps = 1e-6f, .scale = 1.0f / sqrtf(K),
                .o_b = HV * V, .o_t = HV * V, .o_h = V, .q_b = QKV, .q_t = QKV, .q_h = K, .k_b = QKV, .k_t = QKV,
                .k_h = K, .v_b = QKV, .v_t = QKV, .v_h = V, .g_b = HV, .g_t = HV, .g_h = 1, .beta_b = HV, .beta_t = HV,
                .beta_h = 1, .state_slot = HV * V * K, .state_h = V * K, .state_v = K, .slots = SLOTS, .B = B, .T = T,
                .HK = HK, .HV = HV, .K = K, .V = V},
      .norm = {.struct_bytes = sizeof c.norm, .y = at->o[first][0], .x = at->o[first][0], .w = at->norm_w,
               .z = at->row[first] + QKV, .kind = Q3N_NORM_RMS_GATED, .eps = 1e-6f, .y_t = HV * V, .y_h = V,
               .x_t = HV * V, .x_h = V, .z_t = ROW, .z_h = V, .T = n, .H = HV, .D = V},
  };
  return c;
}

static void must(q3n_status status, const char *what) {
  if (status == Q3N_OK) return;
  const int device = (status & 0xff) == Q3N_DEVICE;
  fprintf(stderr, "%s: %s%s%s\n", what, q3n_status_string(status), device ? ": " : "", device ? q3n_cuda_report() : "");
  exit(1);
}

/* Bytes of scratch that the calls need at most: one piece does for all, as they run one after the other. */
static int64_t scratch_bytes(const calls *c) {
  const int64_t each[] = {q3n_causal_conv_cuda_scratch_bytes(&c->conv), q3n_delta_gates_cuda_scratch_bytes(&c->gates),
                          q3n_gated_delta_cuda_scratch_bytes(&c->delta), q3n_norm_cuda_scratch_bytes(&c->norm)};
  int64_t most = 0;
  for (int i = 0; i < 4; i++) most = each[i] > most ? each[i] : most;
  return most;
}

/* Queues the layer for these rows. */
static void queue(arrays *device, const arrays *host, int64_t first, int64_t n, delta_launcher delta, void *scratch,
                  q3n_stream stream) {
  /* Checked with index arrays that the CPU can read, launched with those of the device. */
  calls c = make(device, host, first, n);
  must(q3n_causal_conv_check(&c.conv), "causal_conv");
  must(q3n_delta_gates_check(&c.gates), "delta_gates");
  must(q3n_gated_delta_check(&c.delta), "gated_delta");
  must(q3n_norm_check(&c.norm), "norm");
  c = make(device, device, first, n);
  must(q3n_causal_conv_cuda(&c.conv, scratch, stream), "causal_conv");
  must(q3n_delta_gates_cuda(&c.gates, scratch, stream), "delta_gates");
  must(delta(&c.delta, scratch, stream), "gated_delta");
  must(q3n_norm_cuda(&c.norm, scratch, stream), "norm");
}

#define ON_CPU(op, args)                                                                                        \
  do {                                                                                                          \
    must(q3n_##op##_check(args), #op);                                                                          \
    const q3n_##op##_variant *variant = q3n_##op##_best(args);                                                  \
    const int64_t bytes = variant->scratch_bytes(args);                                                         \
    void *scratch = aligned_alloc(Q3N_SCRATCH_ALIGN, ((size_t)bytes / Q3N_SCRATCH_ALIGN + 1) * Q3N_SCRATCH_ALIGN); \
    must(q3n_##op##_run(variant, args, 0, variant->items(args), scratch, bytes), #op);                          \
    free(scratch);                                                                                              \
  } while (0)

static void on_cpu(arrays *host, int64_t first, int64_t n) {
  const calls c = make(host, host, first, n);
  ON_CPU(causal_conv, &c.conv);
  ON_CPU(delta_gates, &c.gates);
  ON_CPU(gated_delta, &c.delta);
  ON_CPU(norm, &c.norm);
}

static uint64_t seed = 5;
/* Uniform in -1..1; splitmix64. */
static float draw(void) {
  uint64_t z = (seed += 0x9e3779b97f4a7c15u);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return (float)((z ^ z >> 31) >> 40) * 0x1p-23f - 1.0f;
}
static void fill(float *x, size_t n, float scale) {
  for (size_t i = 0; i < n; i++) x[i] = scale * draw();
}

/* The worst relative error of a row of n; NaN where anything is. */
static double worst_row(const float *got, const float *want, int64_t rows, int64_t n) {
  double worst = 0;
  for (int64_t r = 0; r < rows; r++) {
    double square = 0, error = 0;
    for (int64_t i = r * n; i < (r + 1) * n; i++) {
      square += (double)want[i] * want[i];
      error += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
    }
    const double row = sqrt(error / square);
    if (!(row <= worst)) worst = row;
  }
  return worst;
}

int main(void) {
  if (q3n_abi_version() != Q3N_ABI_VERSION) {
    fprintf(stderr, "header of ABI %d, library of ABI %d\n", Q3N_ABI_VERSION, q3n_abi_version());
    return 1;
  }
  const char *missing = device_missing();
  if (missing) return printf("SKIPPED DeltaNet layer on %s: %s\n", device_kind, missing), 0;

  static arrays fresh, host, got;
  memset(&fresh, 0xff, sizeof fresh);
  fill(fresh.row[0], ROWS * ROW, 1.0f);
  fill(fresh.ba[0], ROWS * 2 * HV, 2.0f);
  fill(fresh.conv_w[0], QKV * W, 0.5f);
  fill(fresh.dt_bias, HV, 1.0f);
  for (int i = 0; i < V; i++) fresh.norm_w[i] = 1.0f + 0.2f * draw();
  for (int h = 0; h < HV; h++) fresh.a[h] = -expf(draw());
  memcpy(fresh.slot, (int64_t[B]){2, 0}, sizeof fresh.slot);
  memcpy(fresh.starts, (int64_t[B + 1]){0, 87, PROMPT}, sizeof fresh.starts);

  host = fresh;
  on_cpu(&host, 0, PROMPT);
  for (int s = 0; s < STEPS; s++) on_cpu(&host, PROMPT + s * B, B);

  /* The operator's name alone chooses by the sizes: what an engine calls. The others are there to be measured. */
  const struct {
    const char *name;
    delta_launcher launch;
  } deltas[] = {{"chosen by the sizes", q3n_gated_delta_cuda},
                {"recurrent", q3n_gated_delta_recurrent_cuda},
                {"chunked", q3n_gated_delta_chunked_cuda}};
  const calls largest = make(&host, &host, 0, PROMPT);
  const int64_t bytes = scratch_bytes(&largest);
  const q3n_stream stream = device_stream();
  arrays *device = device_alloc(sizeof *device);
  void *scratch = bytes ? device_alloc((size_t)bytes) : NULL;
  if (!device || (bytes && !scratch)) return fprintf(stderr, "no device memory\n"), 1;

  int failed = 0;
  for (size_t i = 0; i < sizeof deltas / sizeof *deltas; i++) {
    if (!device_copy(device, &fresh, sizeof fresh)) return 1;
    queue(device, &fresh, 0, PROMPT, deltas[i].launch, scratch, stream);
    for (int s = 0; s < STEPS; s++) queue(device, &fresh, PROMPT + s * B, B, deltas[i].launch, scratch, stream);
    if (!device_wait(stream) || !device_copy(&got, device, sizeof got)) return 1;

    const double row = worst_row(got.o[0][0], host.o[0][0], ROWS, HV * V);
    double state = 0;
    for (int b = 0; b < B; b++) {
      const int64_t slot = fresh.slot[b];
      const double worst = worst_row(got.state[slot][0][0], host.state[slot][0][0], HV * V, K);
      if (!(worst <= state)) state = worst;
    }
    const int windows = !memcmp(got.conv_state, host.conv_state, sizeof got.conv_state);
    const int untouched = !memcmp(got.state[FREE_SLOT], fresh.state[FREE_SLOT], sizeof fresh.state[FREE_SLOT]);
    printf("DeltaNet layer on %s, delta rule %s: %d packed tokens, %d steps of %d: worst row error %.1e, state %.1e\n",
           device_kind, deltas[i].name, PROMPT, STEPS, B, row, state);
    if (!windows) puts("  the convolution's states DIFFER");
    if (!untouched) puts("  a slot of nobody was WRITTEN");
    /* The bound of layer.c. */
    failed |= !(row <= 1e-5) || !(state <= 1e-5) || !windows || !untouched;
  }
  device_free(scratch);
  device_free(device);
  device_close(stream);
  return failed;
}
