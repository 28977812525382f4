#include "peak.h"

#include <stddef.h>

#include "peak.inc"

#define DECLARE(name, kind, isa, work, run) uint32_t run(const void *data, int64_t n);
Q3N_PEAKS(DECLARE)
#undef DECLARE

#define ENTRY(name, kind, isa, work, run) {#name, kind, isa, work, run},
static const q3n_peak table[] = {Q3N_PEAKS(ENTRY)};

int64_t q3n_peak_count(void) { return (int64_t)(sizeof table / sizeof table[0]); }

const q3n_peak *q3n_peak_at(int64_t i) { return i >= 0 && i < q3n_peak_count() ? &table[i] : NULL; }

const char *q3n_peak_kind_name(q3n_peak_kind kind) {
  static const char *const name[Q3N_PEAK_COUNT] = {"read", "f32", "bf16", "int8"};
  return (uint32_t)kind < Q3N_PEAK_COUNT ? name[kind] : "";
}
