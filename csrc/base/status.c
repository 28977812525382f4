#include "status.h"

#define ROW(text)                                                                      \
  {                                                                                    \
    "ok", text ": is NULL", text ": size is negative, unsupported or overflows",       \
        text ": stride is negative or lets elements of an output overlap",             \
        text ": overlaps an argument it must not overlap",                             \
        text ": scratch is NULL, too small or not 64-byte aligned",                    \
        text ": dtype not supported by this operator", text ": value out of range",    \
        text ": needs instructions that this CPU or the ISA mask does not offer",      \
        text ": not a sub-range of the work items", text ": holds a NaN",              \
        text ": not the struct size of this library version",                          \
        text ": failed on the device or in the host executor"                          \
  }

static const char *const messages[Q3N_ARG_COUNT][Q3N_KIND_COUNT] = {
#define X(id, text) ROW(text),
#include "args.inc"
#undef X
};

static const char *const names[Q3N_ARG_COUNT] = {
#define X(id, text) text,
#include "args.inc"
#undef X
};

const char *q3n_status_string(q3n_status status) {
  uint32_t kind = (uint32_t)status & 0xff, arg = (uint32_t)status >> 8;
  if (kind >= Q3N_KIND_COUNT || arg >= Q3N_ARG_COUNT) return "not a q3n_status";
  return messages[arg][kind];
}

const char *q3n_status_arg(q3n_status status) {
  uint32_t arg = (uint32_t)status >> 8;
  return arg < Q3N_ARG_COUNT ? names[arg] : "";
}
