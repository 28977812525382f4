/* Runs every variant of the operators in csrc on cases that `qwen3next verify --write-cases` wrote, where there is a C
   compiler and no Rust. README.md in this folder has the format of the files and says what is checked. Needs POSIX.

     replay FILE... [OP:VARIANT...]

   OP:VARIANT must be among those that ran. Exit status 0: every variant passed; 1: one failed or was missing; 2: a file is
   no file of cases. */
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../csrc/q3n.h"

enum { MAX_ARRAYS = 32, MAX_VARIANTS = 64, ZONE = 256, MAX_REPORTS = 20 };

static const uint32_t poison = 0x7fc0dead;

/* What consecutive elements of an output must hold: want and bound in f64, or bits of floats, or four bytes that are no
   float. */
typedef enum { WITHIN = 0, BITS = 1, BYTES = 2 } expectation_kind;
typedef struct expectation {
  uint64_t first, count;
  expectation_kind kind;
  const uint8_t *want, *bound;
} expectation;

/* An array of the case, and where it lies now: its data between a zone and an inaccessible page. */
typedef struct array {
  int output;
  uint64_t bytes, expectations;
  const uint8_t *data;
  const uint8_t *expected, *expected_end; /* as in the file */
  uint8_t *at, *map;
  size_t mapped;
} array;

typedef struct name {
  const char *text;
  uint32_t length;
} name;

typedef struct test_case {
  name op, form, note;
  uint8_t *args; /* malloced: aligned as any struct */
  uint32_t args_bytes;
  uint32_t count;
  array arrays[MAX_ARRAYS];
  uint8_t *neon[MAX_ARRAYS]; /* what the first variant in NEON, with dot products or without, made of the outputs */
} test_case;

/* One operator's table, its functions called through any args. */
typedef struct variant {
  const char *name;
  q3n_isa isa;
  int64_t cases;
  double worst; /* largest multiple of a bound */
  int skipped;
} variant;

typedef struct operator_table {
  const char *name;
  q3n_status (*check)(const void *args);
  int64_t (*count)(void);
  void (*describe)(int64_t i, variant *v);
  int64_t (*items)(int64_t i, const void *args);
  int64_t (*scratch_bytes)(int64_t i, const void *args);
  q3n_status (*run)(int64_t i, const void *args, int64_t begin, int64_t end, void *scratch, int64_t bytes);
  int used;
  variant variants[MAX_VARIANTS];
} operator_table;

#define OPERATOR(op)                                                                                                   \
  static q3n_status op##_check(const void *args) { return q3n_##op##_check(args); }                                    \
  static void op##_describe(int64_t i, variant *v) {                                                                   \
    v->name = q3n_##op##_variant_at(i)->name;                                                                          \
    v->isa = q3n_##op##_variant_at(i)->isa;                                                                            \
  }                                                                                                                    \
  static int64_t op##_items(int64_t i, const void *args) { return q3n_##op##_variant_at(i)->items(args); }             \
  static int64_t op##_scratch(int64_t i, const void *args) { return q3n_##op##_variant_at(i)->scratch_bytes(args); }   \
  static q3n_status op##_run(int64_t i, const void *args, int64_t begin, int64_t end, void *scratch, int64_t bytes) {  \
    return q3n_##op##_run(q3n_##op##_variant_at(i), args, begin, end, scratch, bytes);                                 \
  }

#define OPERATORS(X)                                                                                              \
  X(gated_delta) X(solve_tri) X(causal_conv) X(norm) X(rope) X(attention) X(attention_merge) X(dequantize)        \
  X(matmul) X(moe_up) X(moe_down) X(activations) X(repack) X(gather) X(add) X(delta_gates) X(row_gate)

OPERATORS(OPERATOR)

#define ENTRY(op) {#op, op##_check, q3n_##op##_variant_count, op##_describe, op##_items, op##_scratch, op##_run, 0, {{0}}},
static operator_table operators[] = {OPERATORS(ENTRY)};
enum { OPERATOR_COUNT = sizeof operators / sizeof *operators };

static int64_t failures, elements, runs;

static void bad_file(const char *file, const char *what) {
  fprintf(stderr, "%s: %s\n", file, what);
  exit(2);
}

/* Counts a failure and says which command runs the case on a machine with Rust. */
static void fail(const test_case *c, const variant *v, const char *what) {
  if (failures++ < MAX_REPORTS)
    printf("%.*s %s: %s\n  qwen3next verify --op %.*s %.*s\n", (int)c->op.length, c->op.text, v->name, what,
           (int)c->op.length, c->op.text, (int)c->note.length, c->note.text);
}

/* What runs, for the handler of a kernel that dies. */
static char running[1000];

static void died(int signal) {
  static const char what[] = "\na kernel touched memory that is not its own, or an instruction that this CPU lacks: ";
  (void)signal;
  if (write(STDOUT_FILENO, what, sizeof what - 1) < 0 || write(STDOUT_FILENO, running, strlen(running)) < 0) _exit(2);
  _exit(1);
}

static void announce(const test_case *c, const variant *v) {
  snprintf(running, sizeof running, "%.*s %s\n  qwen3next verify --op %.*s %.*s\n", (int)c->op.length, c->op.text,
           v->name, (int)c->op.length, c->op.text, (int)c->note.length, c->note.text);
}

/* A file and how far it is read. */
typedef struct reader {
  const char *file;
  const uint8_t *at, *end;
} reader;

static const uint8_t *take(reader *r, uint64_t bytes) {
  if ((uint64_t)(r->end - r->at) < bytes) bad_file(r->file, "ends in the middle of a case");
  const uint8_t *from = r->at;
  r->at += bytes;
  return from;
}

static uint32_t take_u32(reader *r) {
  uint32_t x;
  memcpy(&x, take(r, sizeof x), sizeof x);
  return x;
}

static uint64_t take_u64(reader *r) {
  uint64_t x;
  memcpy(&x, take(r, sizeof x), sizeof x);
  return x;
}

static name take_name(reader *r) {
  name n = {NULL, take_u32(r)};
  n.text = (const char *)take(r, n.length);
  return n;
}

static expectation take_expectation(reader *r) {
  expectation e = {.first = take_u64(r)};
  const uint32_t kind = take_u32(r);
  if (kind > BYTES) bad_file(r->file, "expects something of a kind that this program does not know");
  e.kind = (expectation_kind)kind;
  e.count = take_u64(r);
  if (e.count > UINT64_MAX / 16) bad_file(r->file, "holds a size that no file has");
  e.want = take(r, e.count * (e.kind == WITHIN ? 8 : 4));
  if (e.kind == WITHIN) e.bound = take(r, e.count * 8);
  return e;
}

/* Where the array lies: at == 0 its last byte before an inaccessible page, at == 1 its first byte after one. */
static void map_array(array *a, int side) {
  const size_t page = (size_t)sysconf(_SC_PAGESIZE), inner = (a->bytes + ZONE + page - 1) / page * page;
  a->mapped = inner + 2 * page;
  a->map = mmap(NULL, a->mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (a->map == MAP_FAILED || mprotect(a->map, page, PROT_NONE) ||
      mprotect(a->map + page + inner, page, PROT_NONE)) {
    perror("replay: memory for an array");
    exit(2);
  }
  a->at = side ? a->map + page : a->map + page + inner - a->bytes;
}

/* The zone beside the array: inside the mapping, on the side without the inaccessible page. */
static uint8_t *zone(const array *a, int side) { return side ? a->at + a->bytes : a->at - ZONE; }

/* The array and its zone as they are before a call. */
static void reset(const array *a, int side) {
  memcpy(a->at, a->data, a->bytes);
  memset(zone(a, side), 0xa5, ZONE);
}

/* One case of the file: everything but the arrays' addresses. */
static void read_case(reader *r, test_case *c) {
  c->op = take_name(r);
  c->form = take_name(r);
  c->note = take_name(r);
  c->args_bytes = take_u32(r);
  c->args = malloc(c->args_bytes);
  if (!c->args) bad_file(r->file, "has args that do not fit into memory");
  memcpy(c->args, take(r, c->args_bytes), c->args_bytes);
  c->count = take_u32(r);
  if (c->count > MAX_ARRAYS) bad_file(r->file, "has more arrays in a case than an operator takes");
}

/* The arrays of a case, each at an address, which goes into the args. */
static void read_arrays(reader *r, test_case *c, int side) {
  for (uint32_t i = 0; i < c->count; i++) {
    array *a = &c->arrays[i];
    a->output = take_u32(r) != 0;
    const uint32_t pointers = take_u32(r);
    const uint8_t *table = take(r, (uint64_t)pointers * 16);
    a->bytes = take_u64(r);
    a->data = take(r, a->bytes);
    map_array(a, side);
    for (uint32_t p = 0; p < pointers; p++) {
      uint64_t where, inside;
      memcpy(&where, table + 16 * p, sizeof where);
      memcpy(&inside, table + 16 * p + 8, sizeof inside);
      if (c->args_bytes < 8 || where > c->args_bytes - 8 || inside > a->bytes)
        bad_file(r->file, "has a pointer outside its args or array");
      uint8_t *pointer = a->at + inside;
      memcpy(c->args + where, &pointer, sizeof pointer);
    }
    a->expectations = take_u32(r);
    a->expected = r->at;
    for (uint64_t e = 0; e < a->expectations; e++) {
      const expectation x = take_expectation(r);
      if (x.first > a->bytes / 4 || x.count > a->bytes / 4 - x.first)
        bad_file(r->file, "expects elements outside an array");
    }
    a->expected_end = r->at;
  }
}

/* Compares one output; marks its expected elements in `expected`. 0: an element fails, later ones were not looked at. */
static int compare(const test_case *c, variant *v, uint32_t which, const char *file, uint8_t *expected) {
  const array *a = &c->arrays[which];
  reader r = {file, a->expected, a->expected_end};
  char what[200];
  for (uint64_t e = 0; e < a->expectations; e++) {
    const expectation x = take_expectation(&r);
    for (uint64_t i = 0; i < x.count; i++) {
      float got;
      memcpy(&got, a->at + (x.first + i) * 4, sizeof got);
      expected[x.first + i] = 1;
      elements++;
      uint32_t bits, wanted;
      memcpy(&bits, &got, sizeof bits);
      if (x.kind == BYTES) {
        memcpy(&wanted, x.want + 4 * i, sizeof wanted);
        if (bits == wanted) continue;
        snprintf(what, sizeof what, "output %u, bytes %llu to %llu: got %08x, expected %08x as a number of 32 bits", which,
                 (unsigned long long)(4 * (x.first + i)), (unsigned long long)(4 * (x.first + i) + 3), bits, wanted);
        fail(c, v, what);
        return 0;
      }
      if (bits == poison) {
        snprintf(what, sizeof what, "output %u, element %llu was left unwritten", which,
                 (unsigned long long)(x.first + i));
        fail(c, v, what);
        return 0;
      }
      if (x.kind == BITS) {
        float want;
        memcpy(&want, x.want + 4 * i, sizeof want);
        if (memcmp(&got, &want, sizeof got) == 0 || (isnan(got) && isnan(want))) continue;
        snprintf(what, sizeof what, "output %u, element %llu: got %.9g, expected the same bits as %.9g", which,
                 (unsigned long long)(x.first + i), (double)got, (double)want);
        fail(c, v, what);
        return 0;
      }
      double want, bound;
      memcpy(&want, x.want + 8 * i, sizeof want);
      memcpy(&bound, x.bound + 8 * i, sizeof bound);
      const float want32 = (float)want;
      /* f32 rounds to infinity what f64 still holds: the reference decides by its f32 value. */
      if (!isfinite(want) || !isfinite(got)) {
        if ((isnan(want32) && isnan(got)) || want32 == got) continue;
      } else {
        const double error = fabs((double)got - want);
        if (error <= bound) {
          if (bound > 0 && error / bound > v->worst) v->worst = error / bound;
          continue;
        }
      }
      snprintf(what, sizeof what, "output %u, element %llu: got %.9g, expected %.17g, bound %.3g", which,
               (unsigned long long)(x.first + i), (double)got, want, bound);
      fail(c, v, what);
      return 0;
    }
  }
  return 1;
}

/* Everything that a call may not have touched: inputs, zones, and what no expectation names (gaps between strides). */
static void check_rest(const test_case *c, const variant *v, uint32_t which, int side, const uint8_t *expected) {
  const array *a = &c->arrays[which];
  char what[200];
  for (int i = 0; i < ZONE; i++)
    if (zone(a, side)[i] != 0xa5) {
      snprintf(what, sizeof what, "wrote outside of array %u", which);
      fail(c, v, what);
      return;
    }
  for (uint64_t i = 0; i < a->bytes; i++)
    if (a->at[i] != a->data[i] && !(expected && i / 4 < a->bytes / 4 && expected[i / 4])) {
      snprintf(what, sizeof what, a->output ? "wrote byte %llu of array %u, which is no output" :
               "changed byte %llu of array %u, an input", (unsigned long long)i, which);
      fail(c, v, what);
      return;
    }
}

/* One call, its items cut into so many parts, from the arrays' first contents. */
static q3n_status call(const operator_table *op, int64_t i, const test_case *c, int side, int64_t parts, array *scratch) {
  const int64_t items = op->items(i, c->args);
  for (uint32_t k = 0; k < c->count; k++) reset(&c->arrays[k], side);
  for (int64_t p = 0; p < parts; p++) {
    memset(scratch->at, 0xff, scratch->bytes);
    memset(zone(scratch, side), 0xa5, ZONE);
    /* later parts first: no part may rest on another */
    const int64_t part = parts - 1 - p;
    const q3n_status status = op->run(i, c->args, items * part / parts, items * (part + 1) / parts, scratch->at,
                                      (int64_t)scratch->bytes);
    runs++;
    if (status != Q3N_OK) return status;
  }
  return Q3N_OK;
}

/* 1 where all floats have the same bits or are NaN. */
static int same_floats(const uint8_t *a, const uint8_t *b, uint64_t bytes) {
  for (uint64_t i = 0; i + 4 <= bytes; i += 4) {
    float x, y;
    memcpy(&x, a + i, sizeof x);
    memcpy(&y, b + i, sizeof y);
    if (memcmp(&x, &y, sizeof x) != 0 && !(isnan(x) && isnan(y))) return 0;
  }
  return 1;
}

static void run_variant(const operator_table *op, int64_t i, variant *v, test_case *c, int side, const char *file) {
  const int64_t items = op->items(i, c->args), need = op->scratch_bytes(i, c->args);
  array scratch = {.bytes = need > 0 ? ((uint64_t)need + 63) / 64 * 64 : 0};
  map_array(&scratch, side);
  uint8_t *expected[MAX_ARRAYS] = {0}, *whole[MAX_ARRAYS] = {0};
  for (uint32_t k = 0; k < c->count; k++)
    if (c->arrays[k].output) {
      expected[k] = calloc(c->arrays[k].bytes / 4 + 1, 1);
      whole[k] = malloc(c->arrays[k].bytes + 1);
      if (!expected[k] || !whole[k]) bad_file(file, "has an array that does not fit into memory");
    }

  v->cases++;
  announce(c, v);
  const q3n_status status = call(op, i, c, side, 1, &scratch);
  if (status != Q3N_OK) {
    fail(c, v, q3n_status_string(status));
  } else {
    for (uint32_t k = 0; k < c->count; k++) {
      if (c->arrays[k].output) memcpy(whole[k], c->arrays[k].at, c->arrays[k].bytes);
      if (!c->arrays[k].output || compare(c, v, k, file, expected[k])) check_rest(c, v, k, side, expected[k]);
    }
    const int64_t cuts[] = {2, 3, items};
    for (int cut = 0; cut < 3; cut++) {
      if (cuts[cut] < 2 || cuts[cut] > items || cuts[cut] > 64 || (cut == 2 && items <= 3)) continue;
      if (call(op, i, c, side, cuts[cut], &scratch) != Q3N_OK) fail(c, v, "a part of the items was refused");
      for (uint32_t k = 0; k < c->count; k++)
        if (c->arrays[k].output && memcmp(whole[k], c->arrays[k].at, c->arrays[k].bytes))
          fail(c, v, "parts of the items give other bits than all at once");
    }
    for (int z = 0; z < ZONE; z++)
      if (zone(&scratch, side)[z] != 0xa5) {
        fail(c, v, "wrote outside of its scratch");
        break;
      }
  }
  for (uint32_t k = 0; k < c->count; k++) {
    free(expected[k]);
    /* sums of integers are exact: dot products or not, the same bits */
    const int neon = v->isa == Q3N_ISA_NEON || v->isa == Q3N_ISA_NEONDOT;
    if (neon && status == Q3N_OK && c->neon[k] && !same_floats(c->neon[k], whole[k], c->arrays[k].bytes))
      fail(c, v, "other bits than the variant with dot products");
    if (neon && !c->neon[k])
      c->neon[k] = whole[k];
    else
      free(whole[k]);
  }
  munmap(scratch.map, scratch.mapped);
}

/* What a variant's name says beside its instruction set: cases are for variants of one form. */
static int has_form(const variant *v, name form) {
  const char *isa = q3n_isa_name(v->isa);
  size_t length = strlen(v->name), suffix = strlen(isa);
  if (length >= suffix && strcmp(v->name + length - suffix, isa) == 0) {
    length -= suffix;
    while (length > 0 && v->name[length - 1] == '_') length--;
  }
  return length == form.length && memcmp(v->name, form.text, length) == 0;
}

static operator_table *find_operator(name n) {
  for (int i = 0; i < OPERATOR_COUNT; i++)
    if (strlen(operators[i].name) == n.length && memcmp(operators[i].name, n.text, n.length) == 0)
      return &operators[i];
  return NULL;
}

static void first_use(operator_table *op) {
  if (op->used++) return;
  if (op->count() > MAX_VARIANTS) bad_file(op->name, "has more variants than this program has room for");
  for (int64_t i = 0; i < op->count(); i++) {
    op->describe(i, &op->variants[i]);
    op->variants[i].skipped = !q3n_isa_available(op->variants[i].isa);
  }
}

static void replay(const char *file) {
  FILE *f = fopen(file, "rb");
  if (!f || fseek(f, 0, SEEK_END)) bad_file(file, "cannot be read");
  const long size = ftell(f);
  rewind(f);
  uint8_t *bytes = size < 0 ? NULL : malloc((size_t)size + 1);
  if (!bytes || fread(bytes, 1, (size_t)size, f) != (size_t)size) bad_file(file, "cannot be read");
  fclose(f);

  reader r = {file, bytes, bytes + size};
  if (size < 12 || memcmp(take(&r, 8), "Q3NCASES", 8) || take_u32(&r) != 1)
    bad_file(file, "is no file of cases, or of another version");
  for (int number = 0; r.at < r.end; number++) {
    /* in turn with the arrays' ends and with their starts at inaccessible memory */
    const int side = number % 2;
    test_case c = {0};
    read_case(&r, &c);
    read_arrays(&r, &c, side);
    operator_table *op = find_operator(c.op);
    if (!op) bad_file(file, "holds cases of an operator that this program does not know");
    first_use(op);
    for (uint32_t k = 0; k < c.count; k++) reset(&c.arrays[k], side);
    const q3n_status status = op->check(c.args);
    if (status != Q3N_OK) fail(&c, &op->variants[0], q3n_status_string(status));
    for (int64_t i = 0; status == Q3N_OK && i < op->count(); i++) {
      variant *v = &op->variants[i];
      if (!v->skipped && has_form(v, c.form)) run_variant(op, i, v, &c, side, file);
    }
    for (uint32_t k = 0; k < c.count; k++) {
      munmap(c.arrays[k].map, c.arrays[k].mapped);
      free(c.neon[k]);
    }
    free(c.args);
  }
  free(bytes);
}

/* Counts OP:VARIANT as a failure unless it ran. */
static void expect_variant(const char *op_and_variant) {
  const char *colon = strchr(op_and_variant, ':');
  const name op_name = {op_and_variant, (uint32_t)(colon - op_and_variant)};
  const operator_table *op = find_operator(op_name);
  for (int64_t i = 0; op && op->used && i < op->count(); i++)
    if (strcmp(op->variants[i].name, colon + 1) == 0 && op->variants[i].cases > 0) return;
  printf("%s did not run\n", op_and_variant);
  failures++;
}

int main(int argc, char **argv) {
  const uint16_t one = 1;
  uint8_t low;
  memcpy(&low, &one, 1);
  if (argc < 2 || !low || sizeof(void *) != 8) {
    fprintf(stderr, argc < 2 ? "usage: replay FILE... [OP:VARIANT...]\n" : "case files are for little-endian machines of 64 bits\n");
    return 2;
  }
  setvbuf(stdout, NULL, _IOLBF, 0);
  signal(SIGSEGV, died);
  signal(SIGBUS, died);
  signal(SIGILL, died);
  for (int i = 1; i < argc; i++)
    if (!strchr(argv[i], ':')) replay(argv[i]);

  int64_t ran = 0, skipped = 0;
  printf("%-16s %-24s %7s %9s\n", "operator", "variant", "cases", "x bound");
  for (int k = 0; k < OPERATOR_COUNT; k++)
    for (int64_t i = 0; operators[k].used && i < operators[k].count(); i++) {
      const variant *v = &operators[k].variants[i];
      if (v->skipped) {
        printf("%-16s %-24s SKIPPED: this CPU lacks %s\n", operators[k].name, v->name, q3n_isa_name(v->isa));
        skipped++;
        continue;
      }
      printf("%-16s %-24s %7lld %9.3f\n", operators[k].name, v->name, (long long)v->cases, v->worst);
      ran++;
      if (v->cases == 0) {
        printf("%s %s: the files hold no case for it\n", operators[k].name, v->name);
        failures++;
      }
    }
  for (int i = 1; i < argc; i++)
    if (strchr(argv[i], ':')) expect_variant(argv[i]);
  printf("%lld variants, %lld calls, %lld elements compared, %lld variants skipped, %lld failures\n", (long long)ran,
         (long long)runs, (long long)elements, (long long)skipped, (long long)failures);
  return failures > 0;
}
