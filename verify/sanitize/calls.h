/* Calls of every operator for programs in C: arrays of exactly the size their headers state, and variants behind types
   that all operators share. A program defines visit(), which RUN hands every variant that this CPU offers. */
#ifndef Q3N_VERIFY_CALLS_H
#define Q3N_VERIFY_CALLS_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../csrc/q3n.h"

enum { MAX_OUTPUTS = 4, MAX_ARRAYS = 1024 };

static void *arrays[MAX_ARRAYS];
static int array_count, failures;

static void give_up(const char *what) {
  printf("%s\n", what);
  exit(2);
}

/* A block of its own; freed by release. */
static void *take(int64_t bytes) {
  void *p = NULL;
  if (array_count == MAX_ARRAYS || posix_memalign(&p, Q3N_SCRATCH_ALIGN, (size_t)bytes)) give_up("no more arrays");
  return arrays[array_count++] = p;
}

static void release(void) {
  while (array_count > 0) free(arrays[--array_count]);
}

static uint64_t random_state = 1;

static uint32_t draw(void) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(random_state >> 33);
}

/* n numbers from low to high. */
static float *floats(int64_t n, double low, double high) {
  float *x = take(n * (int64_t)sizeof *x);
  for (int64_t i = 0; i < n; i++) x[i] = (float)(low + (high - low) * draw() / 2147483648.0);
  return x;
}

/* Room for n numbers that the call must write. */
static float *room(int64_t n) { return take(n * (int64_t)sizeof(float)); }

static int64_t *indices(int64_t n, const int64_t *values) {
  int64_t *x = take(n * (int64_t)sizeof *x);
  memcpy(x, values, (size_t)n * sizeof *x);
  return x;
}

/* n elements of a dtype, made by the quantiser under test. */
static void *weights(q3n_dtype dtype, int64_t rows, int64_t n) {
  void *y = take(rows * q3n_dtype_bytes(dtype, n));
  q3n_quantize_args args = {.struct_bytes = sizeof args, .y = y, .x = floats(rows * n, -1, 1), .dtype = dtype,
                            .y_row = n, .x_row = n, .rows = rows, .N = n};
  if (q3n_quantize_run(NULL, &args, 0, rows, NULL, 0) != Q3N_OK) give_up("quantize refused its args");
  return y;
}

/* rows of n 8-bit activations for weights of a block dtype, made by the quantiser under test. */
static void *eights(q3n_dtype dtype, int64_t rows, int64_t n) {
  const q3n_dtype type = q3n_dtype_activations(dtype);
  void *y = take(rows * q3n_dtype_bytes(type, n));
  q3n_activations_args args = {.struct_bytes = sizeof args, .y = y, .x = floats(rows * n, -1, 1), .dtype = type,
                               .x_row = n, .rows = rows, .N = n};
  if (q3n_activations_run(NULL, &args, 0, rows, NULL, 0) != Q3N_OK) give_up("activations refused its args");
  return y;
}

/* As weights, with every 16 rows interleaved. */
static void *interleaved(q3n_dtype dtype, int64_t rows, int64_t n) {
  void *y = take(rows * q3n_dtype_bytes(dtype, n));
  q3n_repack_args args = {.struct_bytes = sizeof args, .y = y, .x = weights(dtype, rows, n), .dtype = dtype,
                          .x_row = n, .rows = rows, .N = n};
  if (q3n_repack_run(NULL, &args, 0, rows / 16, NULL, 0) != Q3N_OK) give_up("repack refused its args");
  return y;
}

/* What a call writes. */
typedef struct output {
  void *at;
  int64_t bytes;
} output;

/* One variant on one set of args, behind types that all operators share. */
typedef struct call {
  const char *op, *variant;
  q3n_status (*run)(const struct call *, int64_t begin, int64_t end, void *scratch);
  const void *variant_at, *args;
  int64_t items, scratch_bytes;
} call;

/* What the program does with a call. The outputs are as they were when it returns. */
static void visit(const call *c, const output *outputs);

/* Defines run_<op>(args, outputs): every variant that this CPU offers. */
#define RUN(op)                                                                                       \
  static q3n_status call_##op(const call *c, int64_t begin, int64_t end, void *scratch) {             \
    return q3n_##op##_run(c->variant_at, c->args, begin, end, scratch, c->scratch_bytes);             \
  }                                                                                                   \
  static void run_##op(const q3n_##op##_args *args, const output *outputs) {                          \
    q3n_status status = q3n_##op##_check(args);                                                       \
    if (status != Q3N_OK) {                                                                           \
      printf("%s: %s\n", #op, q3n_status_string(status));                                             \
      failures++;                                                                                     \
      return;                                                                                         \
    }                                                                                                 \
    for (int64_t i = 0; i < q3n_##op##_variant_count(); i++) {                                        \
      const q3n_##op##_variant *v = q3n_##op##_variant_at(i);                                         \
      if (!q3n_isa_available(v->isa)) {                                                               \
        printf("SKIPPED %s %s: this CPU lacks %s\n", #op, v->name, q3n_isa_name(v->isa));             \
        continue;                                                                                     \
      }                                                                                               \
      const call c = {#op, v->name, call_##op, v, args, v->items(args), v->scratch_bytes(args)};      \
      visit(&c, outputs);                                                                           \
    }                                                                                                 \
  }

RUN(gated_delta)
RUN(solve_tri)
RUN(causal_conv)
RUN(norm)
RUN(rope)
RUN(attention)
RUN(attention_merge)
RUN(dequantize)
RUN(quantize)
RUN(activations)
RUN(repack)
RUN(matmul)
RUN(moe_route)
RUN(moe_group)
RUN(moe_up)
RUN(moe_down)
RUN(gather)
RUN(add)
RUN(delta_gates)
RUN(kv_store)
RUN(row_gate)

#define OUTPUTS(...) (const output[MAX_OUTPUTS + 1]) { __VA_ARGS__ }
#define F32(at, n) {at, (n) * (int64_t)sizeof(float)}

static const q3n_dtype all_types[] = {Q3N_F32,  Q3N_F16,  Q3N_BF16, Q3N_Q8_0, Q3N_Q4_0,   Q3N_Q4_1,   Q3N_Q5_0, Q3N_Q5_1,
                                      Q3N_Q2_K, Q3N_Q3_K, Q3N_Q4_K, Q3N_Q5_K, Q3N_Q6_K, Q3N_IQ4_NL, Q3N_IQ4_XS, Q3N_MXFP4};
enum { TYPES = sizeof all_types / sizeof *all_types };

#endif
