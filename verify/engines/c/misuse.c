/* Wrong calls: each gives a status that names the argument, text for it, and touches no output. */
#include <stdio.h>
#include <string.h>

#include "q3n.h"

enum { T = 3, H = 2, K = 8, V = 4 };

static float q[T * H * K], k[T * H * K], v[T * H * V], g[T * H], beta[T * H], o[T * H * V];
static _Alignas(64) char scratch[1 << 20];
static int failed;

static q3n_gated_delta_args good(void) {
  return (q3n_gated_delta_args){.struct_bytes = sizeof(q3n_gated_delta_args), .o = o, .q = q, .k = k, .v = v, .g = g,
                                .beta = beta, .gate = Q3N_GATE_SCALAR, .scale = 1, .o_t = H * V, .o_h = V,
                                .q_t = H * K, .q_h = K, .k_t = H * K, .k_h = K, .v_t = H * V, .v_h = V, .g_t = H,
                                .g_h = 1, .beta_t = H, .beta_h = 1, .slots = 1, .B = 1, .T = T, .HK = H, .HV = H,
                                .K = K, .V = V};
}

static void expect(const char *what, q3n_status got, q3n_status want, const char *text) {
  int untouched = 1;
  for (size_t i = 0; i < sizeof o / sizeof *o; i++) untouched &= o[i] == 7;
  const int ok = got == want && untouched && !strcmp(q3n_status_string(got), text);
  printf("%-28s %s%s\n", what, q3n_status_string(got), ok ? "" : "   <- WRONG");
  failed |= !ok;
}

int main(void) {
  for (size_t i = 0; i < sizeof o / sizeof *o; i++) o[i] = 7;
  q3n_gated_delta_args a = good();
  a.q_t = -1;
  expect("a negative stride", q3n_gated_delta_run(NULL, &a, 0, 1, scratch, sizeof scratch),
         q3n_fail(Q3N_STRIDE, Q3N_ARG_Q), "q: stride is negative or lets elements of an output overlap");
  a = good();
  a.o_t = V;
  expect("an output that overlaps", q3n_gated_delta_run(NULL, &a, 0, 1, scratch, sizeof scratch),
         q3n_fail(Q3N_STRIDE, Q3N_ARG_O), "o: stride is negative or lets elements of an output overlap");
  a = good();
  a.v = o + 1;
  expect("an output over an input", q3n_gated_delta_run(NULL, &a, 0, 1, scratch, sizeof scratch),
         q3n_fail(Q3N_ALIAS, Q3N_ARG_O), "o: overlaps an argument it must not overlap");
  a = good();
  a.struct_bytes -= 8;
  expect("args of another version", q3n_gated_delta_run(NULL, &a, 0, 1, scratch, sizeof scratch),
         q3n_fail(Q3N_ABI, Q3N_ARG_STRUCT_BYTES), "struct_bytes: not the struct size of this library version");
  a = good();
  a.k = NULL;
  expect("a missing array", q3n_gated_delta_run(NULL, &a, 0, 1, scratch, sizeof scratch),
         q3n_fail(Q3N_NULL, Q3N_ARG_KEY), "k: is NULL");
  a = good();
  a.dtype = Q3N_Q8_0;
  expect("a type nobody takes", q3n_gated_delta_run(NULL, &a, 0, 1, scratch, sizeof scratch),
         q3n_fail(Q3N_DTYPE, Q3N_ARG_DTYPE), "dtype: dtype not supported by this operator");
  a.dtype = Q3N_BF16; /* of kernels for GPUs */
  expect("a type of other variants", q3n_gated_delta_run(NULL, &a, 0, 1, scratch, sizeof scratch),
         q3n_fail(Q3N_DTYPE, Q3N_ARG_DTYPE), "dtype: dtype not supported by this operator");
  expect("no args", q3n_gated_delta_run(NULL, NULL, 0, 1, scratch, sizeof scratch), q3n_fail(Q3N_NULL, Q3N_ARG_ARGS),
         "args: is NULL");
  a = good();
  expect("items that do not exist", q3n_gated_delta_run(NULL, &a, 0, INT64_MAX, scratch, sizeof scratch),
         q3n_fail(Q3N_RANGE, Q3N_ARG_BEGIN_END), "begin, end: not a sub-range of the work items");

  /* A variant of this CPU that needs scratch. */
  const q3n_gated_delta_variant *variant = NULL;
  int64_t need = 0;
  for (int64_t i = 0; i < q3n_gated_delta_variant_count() && !need; i++) {
    variant = q3n_gated_delta_variant_at(i);
    if (q3n_isa_available(variant->isa)) need = variant->scratch_bytes(&a);
  }
  if (!need || need > (int64_t)sizeof scratch - 64) return fprintf(stderr, "no variant with scratch\n"), 1;
  const char *text = "scratch: scratch is NULL, too small or not 64-byte aligned";
  const q3n_status status = q3n_fail(Q3N_SCRATCH, Q3N_ARG_SCRATCH);
  expect("scratch short by a byte", q3n_gated_delta_run(variant, &a, 0, 1, scratch, need - 1), status, text);
  expect("scratch off its alignment", q3n_gated_delta_run(variant, &a, 0, 1, scratch + 4, need), status, text);
  expect("no scratch", q3n_gated_delta_run(variant, &a, 0, 1, NULL, need), status, text);
  expect("a status of nobody", -1, -1, "not a q3n_status");

  if (q3n_gated_delta_run(variant, &a, 0, variant->items(&a), scratch, need) != Q3N_OK || o[0] == 7) failed = 1;
  puts(failed ? "misuse: FAILED" : "misuse: refused by name, and the right call runs");
  return failed;
}
