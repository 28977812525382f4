/* reload LIBRARY OTHER_VERSION: the library is loaded, used, unloaded, loaded again; then with another version of it in
   one process, in both orders and both scopes. Nothing of the library is linked into this program. */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "q3n.h"

typedef struct library {
  void *handle;
  int32_t (*abi_version)(void);
  uint32_t (*isa_mask)(void);
  void (*isa_set_mask)(uint32_t);
  const q3n_norm_variant *(*best)(const q3n_norm_args *);
  q3n_status (*run)(const q3n_norm_variant *, const q3n_norm_args *, int64_t, int64_t, void *, int64_t);
} library;

static void find(void *handle, const char *name, void *function) {
  void *symbol = dlsym(handle, name);
  if (!symbol) fprintf(stderr, "%s\n", dlerror());
  memcpy(function, &symbol, sizeof symbol);
}

static int open_library(library *l, const char *path, int scope) {
  l->handle = dlopen(path, RTLD_NOW | scope);
  if (!l->handle) return fprintf(stderr, "%s\n", dlerror()), 0;
  find(l->handle, "q3n_abi_version", &l->abi_version);
  find(l->handle, "q3n_isa_mask", &l->isa_mask);
  find(l->handle, "q3n_isa_set_mask", &l->isa_set_mask);
  find(l->handle, "q3n_norm_best", &l->best);
  find(l->handle, "q3n_norm_run", &l->run);
  return l->abi_version && l->isa_mask && l->isa_set_mask && l->best && l->run;
}

enum { D = 100 };

static int norm(const library *l, float *y) {
  float x[D];
  for (int i = 0; i < D; i++) x[i] = (float)(i * i % 17) - 8;
  q3n_norm_args a = {.struct_bytes = sizeof a, .y = y, .x = x, .kind = Q3N_NORM_RMS, .T = 1, .H = 1, .D = D};
  const q3n_norm_variant *variant = l->best(&a);
  if (variant->scratch_bytes(&a)) return 0;
  return l->run(variant, &a, 0, variant->items(&a), NULL, 0) == Q3N_OK;
}

#define MUST(condition)                                              \
  do {                                                               \
    if (!(condition)) {                                              \
      fprintf(stderr, "line %d: %s\n", __LINE__, #condition);        \
      return 1;                                                      \
    }                                                                \
  } while (0)

int main(int argc, char **argv) {
  MUST(argc == 3);
  float first[D], y[D];
  uint32_t mask = 0;
  for (int round = 0; round < 20; round++) {
    library l;
    MUST(open_library(&l, argv[1], RTLD_LOCAL));
    if (round == 0) mask = l.isa_mask();
    MUST(l.isa_mask() == mask); /* what was set before the last unloading is gone with it */
    MUST(norm(&l, y));
    if (round == 0) memcpy(first, y, sizeof y);
    MUST(!memcmp(first, y, sizeof y));
    l.isa_set_mask(1);
    MUST(!dlclose(l.handle));
    MUST(!dlopen(argv[1], RTLD_NOW | RTLD_NOLOAD));
  }
  puts("unloaded and loaded again 20 times: the same bits");

  const int scopes[] = {RTLD_LOCAL, RTLD_GLOBAL};
  for (int order = 0; order < 2; order++)
    for (int scope = 0; scope < 2; scope++) {
      library l, other;
      MUST(open_library(order ? &other : &l, argv[order ? 2 : 1], scopes[scope]));
      MUST(open_library(order ? &l : &other, argv[order ? 1 : 2], scopes[scope]));
      MUST(l.abi_version() == Q3N_ABI_VERSION);
      MUST(other.abi_version() == Q3N_ABI_VERSION + 1);
      /* each has its own state, and its own calls reach it: under a mask of plain C only, the choice changes in one */
      l.isa_set_mask(1);
      MUST(l.isa_mask() == 1 && other.isa_mask() == mask);
      q3n_norm_args a = {.struct_bytes = sizeof a};
      MUST(l.best(&a)->isa == Q3N_ISA_SCALAR);
      l.isa_set_mask(mask);
      other.isa_set_mask(1);
      MUST(other.best(&a)->isa == Q3N_ISA_SCALAR && l.isa_mask() == mask);
      other.isa_set_mask(mask);
      MUST(norm(&l, y) && !memcmp(first, y, sizeof y));
      MUST(norm(&other, y) && !memcmp(first, y, sizeof y));
      MUST(!dlclose(l.handle));
      MUST(norm(&other, y) && !memcmp(first, y, sizeof y));
      MUST(!dlclose(other.handle));
    }
  puts("two versions in one process: each keeps to itself");
  return 0;
}
