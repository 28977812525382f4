/* What every operator offers, declared and defined once.

   An operator `op` has an args struct q3n_<op>_args (its header is the contract) and a list of variants. Work is
   cut into items (heads, rows, tiles); a call computes the items begin <= i < end, so the caller owns the threads.
   Calls over disjoint ranges may run at the same time, each with its own scratch, and the result does not depend on
   how the items were cut, bit for bit. Nothing here allocates, starts a thread, aborts or keeps state. */
#ifndef Q3N_BASE_OPERATOR_H
#define Q3N_BASE_OPERATOR_H

#include <stddef.h>
#include <stdint.h>

#include "isa.h"
#include "status.h"

/* Bumped when an args struct or a function changes incompatibly. */
#define Q3N_ABI_VERSION 3
int32_t q3n_abi_version(void);

/* Scratch handed to a run must be aligned to this many bytes. */
#define Q3N_SCRATCH_ALIGN 64

/* Declares for operator `op`:
   q3n_<op>_variant        one implementation; `items`, `scratch_bytes` and `run` take checked args
   q3n_<op>_check          validates args alone; every _run does this too
   q3n_<op>_variant_count  how many variants are built in
   q3n_<op>_variant_at     the i-th, NULL outside the list
   q3n_<op>_best           the variant that dispatch chooses for these args under the ISA mask
   q3n_<op>_run            checks everything, then runs items begin..end; variant NULL means best */
#define Q3N_DECLARE_OPERATOR(op)                                                                     \
  typedef struct q3n_##op##_variant {                                                                \
    const char *name;                                                                                \
    q3n_isa isa;                                                                                     \
    int64_t (*items)(const q3n_##op##_args *args);                                                   \
    int64_t (*scratch_bytes)(const q3n_##op##_args *args);                                           \
    q3n_status (*run)(const q3n_##op##_args *args, int64_t begin, int64_t end, void *scratch);       \
  } q3n_##op##_variant;                                                                              \
  q3n_status q3n_##op##_check(const q3n_##op##_args *args);                                          \
  int64_t q3n_##op##_variant_count(void);                                                            \
  const q3n_##op##_variant *q3n_##op##_variant_at(int64_t i);                                        \
  const q3n_##op##_variant *q3n_##op##_best(const q3n_##op##_args *args);                            \
  q3n_status q3n_##op##_run(const q3n_##op##_variant *variant, const q3n_##op##_args *args,          \
                            int64_t begin, int64_t end, void *scratch, int64_t scratch_bytes)

/* Defines all of them but _check and _best, from the list in <op>.inc:
   VARIANTS(X) expands to X(name, isa, items, scratch_bytes, run) ...; `name` is an identifier. */
#define Q3N_VARIANT_DECLARE(op, name, isa, items, scratch_bytes, run)                                \
  q3n_status run(const q3n_##op##_args *args, int64_t begin, int64_t end, void *scratch);
#define Q3N_VARIANT_ENTRY(op, name, isa, items, scratch_bytes, run) {#name, isa, items, scratch_bytes, run},

#define Q3N_DEFINE_OPERATOR(op, VARIANTS)                                                            \
  VARIANTS(Q3N_VARIANT_DECLARE)                                                                      \
  static const q3n_##op##_variant q3n_##op##_table[] = {VARIANTS(Q3N_VARIANT_ENTRY)};                \
  int64_t q3n_##op##_variant_count(void) {                                                           \
    return (int64_t)(sizeof q3n_##op##_table / sizeof q3n_##op##_table[0]);                          \
  }                                                                                                  \
  const q3n_##op##_variant *q3n_##op##_variant_at(int64_t i) {                                       \
    return i >= 0 && i < q3n_##op##_variant_count() ? &q3n_##op##_table[i] : NULL;                   \
  }                                                                                                  \
  q3n_status q3n_##op##_run(const q3n_##op##_variant *variant, const q3n_##op##_args *args,          \
                            int64_t begin, int64_t end, void *scratch, int64_t scratch_bytes) {      \
    q3n_status status = q3n_##op##_check(args);                                                      \
    if (status != Q3N_OK) return status;                                                             \
    if (!variant) variant = q3n_##op##_best(args);                                                   \
    if (!q3n_isa_available(variant->isa)) return q3n_fail(Q3N_ISA, Q3N_ARG_VARIANT);                 \
    if (begin < 0 || end < begin || end > variant->items(args))                                      \
      return q3n_fail(Q3N_RANGE, Q3N_ARG_BEGIN_END);                                                 \
    if (begin == end) return Q3N_OK;                                                                 \
    int64_t need = variant->scratch_bytes(args);                                                     \
    if (need > 0 && (!scratch || scratch_bytes < need || (uintptr_t)scratch % Q3N_SCRATCH_ALIGN))    \
      return q3n_fail(Q3N_SCRATCH, Q3N_ARG_SCRATCH);                                                 \
    return variant->run(args, begin, end, scratch);                                                  \
  }

/* Dispatch of an operator whose list is in order of preference: the first variant that the CPU and the mask allow. */
#define Q3N_DEFINE_BEST_FIRST(op)                                                                    \
  const q3n_##op##_variant *q3n_##op##_best(const q3n_##op##_args *args) {                           \
    (void)args;                                                                                      \
    int64_t i = 0, last = q3n_##op##_variant_count() - 1;                                            \
    while (i < last && !q3n_isa_available(q3n_##op##_table[i].isa)) i++;                             \
    return &q3n_##op##_table[i];                                                                     \
  }

#endif
