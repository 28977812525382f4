/* Wrong calls of kernels for devices: each gives a status that names the argument, text for it, and touches no output;
   a launch that fails says what the CUDA runtime, or the executor, says. Needs no GPU but for the last call. */
#include "device.h"

#if defined(Q3N_CUDA_ON_HOST)
#include <sys/resource.h>
#endif

enum { T = 3, D = 64 };

static float x[T * D], w[D], y[T * D];
static _Alignas(64) char scratch[64];
static int failed;

static void expect(const char *what, q3n_status got, q3n_status want, const char *text) {
  int untouched = 1;
  for (int i = 0; i < T * D; i++) untouched &= y[i] == 7;
  const int ok = got == want && untouched && !strcmp(q3n_status_string(got), text);
  printf("%-28s %s%s\n", what, q3n_status_string(got), ok ? "" : "   <- WRONG");
  failed |= !ok;
}

static q3n_norm_args norm_of(float *to, const float *from, const float *weight) {
  return (q3n_norm_args){.struct_bytes = sizeof(q3n_norm_args), .y = to, .x = from, .w = weight, .kind = Q3N_NORM_RMS,
                         .y_t = D, .x_t = D, .T = T, .H = 1, .D = D};
}

/* A launch that can't succeed: no GPU; no memory for the executor's stacks. 0 where neither can be had. */
static int launch_fails(void) {
  const q3n_norm_args a = norm_of(y, x, w);
#if defined(Q3N_CUDA_ON_HOST)
  struct rlimit limit, none;
  if (getrlimit(RLIMIT_AS, &limit)) return 0;
  none = limit;
  none.rlim_cur = 1;
  if (setrlimit(RLIMIT_AS, &none)) return 0;
  const q3n_status status = q3n_norm_cuda(&a, NULL, NULL);
  setrlimit(RLIMIT_AS, &limit);
  const char *wanted = "no memory for the host executor";
#else
  if (!device_missing()) return 0;
  const q3n_status status = q3n_norm_cuda(&a, NULL, NULL);
  const char *wanted = "cudaError";
#endif
  expect("a launch that fails", status, q3n_fail(Q3N_DEVICE, Q3N_ARG_KERNEL), q3n_status_string(status));
  printf("%-28s %s\n", "  its report", q3n_cuda_report());
  if (!strstr(q3n_cuda_report(), wanted)) failed = 1;
  return 1;
}

/* The same call where it is right. */
static void right_call(void) {
  float *memory = device_alloc(2 * sizeof x + sizeof w);
  const q3n_stream stream = device_stream();
  const q3n_norm_args a = norm_of(memory, memory + T * D, memory + 2 * T * D);
  if (!memory || !device_copy(memory + T * D, x, sizeof x) || !device_copy(memory + 2 * T * D, w, sizeof w) ||
      q3n_norm_check(&a) != Q3N_OK || q3n_norm_cuda(&a, NULL, stream) != Q3N_OK || !device_wait(stream) ||
      !device_copy(y, memory, sizeof y))
    failed = 1;
  for (int i = 0; i < T * D; i++) failed |= !(y[i] > 0.999f && y[i] < 1.001f);
  device_close(stream);
  device_free(memory);
}

int main(void) {
  for (int i = 0; i < T * D; i++) x[i] = 3, y[i] = 7;
  for (int i = 0; i < D; i++) w[i] = 1;
  if (!launch_fails()) printf("SKIPPED a launch that fails: there is %s\n", device_kind);

  q3n_norm_args a = norm_of(y, x, w);
  a.y_t = -1;
  expect("a negative stride", q3n_norm_check(&a), q3n_fail(Q3N_STRIDE, Q3N_ARG_Y),
         "y: stride is negative or lets elements of an output overlap");
  a = norm_of(y, x, w);
  a.struct_bytes -= 8;
  expect("args of another version", q3n_norm_check(&a), q3n_fail(Q3N_ABI, Q3N_ARG_STRUCT_BYTES),
         "struct_bytes: not the struct size of this library version");

  /* A slot that the pool has not: seen where the CPU reads the indices, before any kernel does. */
  const int64_t slot = 1;
  const q3n_causal_conv_args conv = {.struct_bytes = sizeof conv, .y = y, .x = x, .w = w, .state_out = y + D,
                                     .slot_out = &slot, .y_t = 1, .x_t = 1, .w_c = 4, .state_slot = 3, .state_c = 3,
                                     .slots = 1, .B = 1, .T = 1, .C = 1, .width = 4};
  expect("a slot outside the pool", q3n_causal_conv_check(&conv), q3n_fail(Q3N_VALUE, Q3N_ARG_SLOT_OUT),
         "slot_out: value out of range");

  const char *text = "scratch: scratch is NULL, too small or not 64-byte aligned";
  const q3n_status status = q3n_fail(Q3N_SCRATCH, Q3N_ARG_SCRATCH);
  a = norm_of(y, x, w);
  expect("scratch off its alignment", q3n_norm_cuda(&a, scratch + 8, NULL), status, text);
#if defined(Q3N_CUDA_ON_HOST)
  /* The one here that needs scratch; by nvcc run.sh leaves it out, for its time. */
  const int32_t id = 0;
  int64_t order = 7, offsets[2];
  const q3n_moe_group_args group = {.struct_bytes = sizeof group, .order = &order, .offsets = offsets, .ids = &id,
                                    .T = 1, .E = 1, .top_k = 1};
  expect("no scratch", q3n_moe_group_cuda(&group, NULL, NULL), status, text);
  if (q3n_moe_group_cuda_scratch_bytes(&group) <= 0 || order != 7) failed = 1;
#endif

  /* A block a row: more than a grid can have. */
  const q3n_row_gate_args gate = {.struct_bytes = sizeof gate, .y = y, .x = x, .w = w, .T = INT64_C(1) << 31, .D = D};
  expect("more blocks than a grid has", q3n_row_gate_cuda(&gate, NULL, NULL), q3n_fail(Q3N_SIZE, Q3N_ARG_GRID),
         "grid: size is negative, unsupported or overflows");

  const char *missing = device_missing();
  if (missing)
    printf("SKIPPED the right call on %s: %s\n", device_kind, missing);
  else
    right_call();
  puts(failed ? "misuse on devices: FAILED" : "misuse on devices: refused by name");
  return failed;
}
