/* Cuts a call over the threads of torch. `parallel` is GOMP_parallel of the OpenMP runtime that libtorch_cpu itself is
   linked with (libgomp's interface, which LLVM's and Intel's runtimes have too): the team is the one at::parallel_for
   runs on. Nothing of torch is compiled in, so one build serves every version of it. */
#include <stdatomic.h>
#include <stdint.h>
#include <stddef.h>

typedef int32_t (*run_fn)(const void *variant, const void *args, int64_t begin, int64_t end, void *scratch,
                          int64_t scratch_bytes);
typedef void (*parallel_fn)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

typedef struct call {
  run_fn run;
  const void *variant, *args;
  int64_t items, parts;
  char *scratch;
  int64_t scratch_bytes;
  _Atomic int64_t next;
  _Atomic int32_t status;
} call;

/* Parts are taken, not assigned: a smaller team than asked for does all of them too. */
static void body(void *data) {
  call *c = data;
  for (int64_t part; (part = atomic_fetch_add(&c->next, 1)) < c->parts;) {
    const int32_t status = c->run(c->variant, c->args, c->items * part / c->parts, c->items * (part + 1) / c->parts,
                                  c->scratch ? c->scratch + part * c->scratch_bytes : NULL, c->scratch_bytes);
    int32_t none = 0;
    if (status) atomic_compare_exchange_strong(&c->status, &none, status);
  }
}

/* scratch holds parts * scratch_bytes bytes. parallel NULL: on the calling thread. */
int32_t q3n_ranges(parallel_fn parallel, run_fn run, const void *variant, const void *args, int64_t items, int64_t parts,
                   void *scratch, int64_t scratch_bytes) {
  call c = {run, variant, args, items, parts, scratch, scratch_bytes, 0, 0};
  if (parallel && parts > 1)
    parallel(body, &c, (unsigned)parts, 0);
  else
    body(&c);
  return atomic_load(&c.status);
}
