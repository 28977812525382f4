/* Fibers, barriers, warp operations, and the book on who touched which shared element. One launch runs on the calling
   thread; what a launch needs is kept and used again. */
#include "executor.h"

#include <atomic>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#if !(defined(__ELF__) && (defined(__x86_64__) || defined(__aarch64__)))
#define Q3N_HOST_UCONTEXT
#include <ucontext.h>
#endif

namespace q3n_host {

__thread current now;

enum { MAX_THREADS = 1024, MAX_WARPS = 32, MAX_ARRAYS = 64, MAX_COPIES = 64 };
/* What an SM of compute capability 9.0 gives a block; without asking for more it is 48 KiB. */
enum { SHARED_BYTES = 227 * 1024, STATIC_BYTES = 48 * 1024 };
/* The odd lines keep the tops of the stacks apart in the cache. */
enum { STACK_BYTES = 64 * 1024 + 17 * 64 };
/* Below the first stack: where it overflows before anyone looks. */
enum { SLACK_BYTES = 256 * 1024 };
static const uint64_t canary = 0x5ac71e57ac75ca1eu;

struct pending_copy {
  array *a;
  int64_t first, n;
  const void *from;
  int group;
  place at;
};

struct workspace {
  workspace *next;
  const char *kernel;
  void (*body)(const void *);
  const void *context;
  char *stacks; /* behind SLACK_BYTES of the allocation */
  char *memory; /* shared memory of the block: dynamic first */
  shadow *words;
  pending_copy *copies;
  thread threads[MAX_THREADS];
  int count;
  uint16_t warp_epoch[MAX_WARPS];
  unsigned waiting[MAX_WARPS], gone[MAX_WARPS]; /* lanes at a warp operation; lanes that have returned */
  array arrays[MAX_ARRAYS];
  int array_count;
  int64_t dynamic_bytes, memory_used, words_used;
  uint32_t epoch, block_epoch; /* now, and at the start of the block */
  bool failed;
#ifdef Q3N_HOST_UCONTEXT
  ucontext_t scheduler, fiber[MAX_THREADS];
#else
  void *scheduler;
#endif
};

static __thread workspace *here;
static __thread char text[640];

/* Switching stacks: registers that a call preserves are pushed, the stack pointer is exchanged. */
#ifdef Q3N_HOST_UCONTEXT
static void to_scheduler() { swapcontext(&here->fiber[now.self->id], &here->scheduler); }
static void to_thread(thread *t) { swapcontext(&here->scheduler, &here->fiber[t->id]); }
#else
extern "C" __attribute__((visibility("hidden"))) void q3n_host_switch(void **from, void *to);
#if defined(__x86_64__)
asm(".text\n"
    ".globl q3n_host_switch\n"
    ".hidden q3n_host_switch\n"
    ".type q3n_host_switch, @function\n"
    "q3n_host_switch:\n"
    "  push %rbp\n  push %rbx\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
    "  mov %rsp, (%rdi)\n"
    "  mov %rsi, %rsp\n"
    "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbx\n  pop %rbp\n"
    "  ret\n"
    ".size q3n_host_switch, . - q3n_host_switch\n");
enum { SAVED_WORDS = 6, ENTRY_WORD = 6, FRAME_WORDS = 8 };
#else
asm(".text\n"
    ".globl q3n_host_switch\n"
    ".hidden q3n_host_switch\n"
    ".type q3n_host_switch, %function\n"
    "q3n_host_switch:\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n"
    "  str x9, [x0]\n"
    "  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n"
    "  ret\n"
    ".size q3n_host_switch, . - q3n_host_switch\n");
enum { SAVED_WORDS = 20, ENTRY_WORD = 11, FRAME_WORDS = 20 };
#endif
static void to_scheduler() { q3n_host_switch(&now.self->stack_pointer, here->scheduler); }
static void to_thread(thread *t) { q3n_host_switch(&here->scheduler, t->stack_pointer); }
#endif

/* "kernel: block (x,y,z), thread (x,y,z): ... (file:line)". The first failure of a launch counts. */
static void report(const thread *t, place at, const char *format, va_list args) {
  if (here->failed) return;
  here->failed = true;
  int n = snprintf(text, sizeof text, "%s: block (%u,%u,%u), thread (%u,%u,%u): ", here->kernel, now.block.x,
                   now.block.y, now.block.z, t->index.x, t->index.y, t->index.z);
  if (n >= 0 && n < (int)sizeof text) n += vsnprintf(text + n, sizeof text - (size_t)n, format, args);
  if (n >= 0 && n < (int)sizeof text && at.file)
    snprintf(text + n, sizeof text - (size_t)n, " (%s:%d)", at.file, at.line);
}

void fail(place at, const char *format, ...) {
  va_list args;
  va_start(args, format);
  report(now.self, at, format, args);
  va_end(args);
  to_scheduler();
  __builtin_unreachable();
}

__attribute__((format(printf, 3, 4))) static void stuck(const thread *t, place at, const char *format, ...) {
  va_list args;
  va_start(args, format);
  report(t, at, format, args);
  va_end(args);
}

static bool same(place a, place b) { return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file)); }

void barrier(place at) {
  now.self->state = thread::AT_BARRIER;
  now.self->at = at;
  to_scheduler();
}

void warp(unsigned mask, finish op, int parameter, int width, const void *in, int bytes, void *out, place at) {
  thread *t = now.self, *lanes = here->threads + t->warp * 32;
  const int present = here->count - t->warp * 32 < 32 ? here->count - t->warp * 32 : 32;
  if (!(mask >> t->lane & 1u))
    fail(at, "warp operation: lane %d calls it with a mask %08x without itself", t->lane, mask);
  if (present < 32 && mask >> present)
    fail(at, "warp operation: the mask %08x names lanes from %d on, which the block has not", mask, present);
  if (mask & here->gone[t->warp])
    fail(at, "warp operation: the mask %08x names lane %d, which has returned", mask,
         __builtin_ctz(mask & here->gone[t->warp]));
  t->call = {op, mask, parameter, width, bytes, in, out, at};
  const unsigned others = mask & ~(1u << t->lane);
  bool complete = (here->waiting[t->warp] & others) == others;
  lane_call *calls[32];
  for (int i = 0; complete && i < 32; i++) {
    const thread *other = lanes + i;
    calls[i] = mask >> i & 1u ? &lanes[i].call : nullptr;
    if (!calls[i] || other == t || (other->call.op == op && other->call.mask == mask && same(other->at, at))) continue;
    if (other->call.mask >> t->lane & 1u)
      fail(at, "warp operation: lane %d waits at another one (%s:%d, mask %08x; here %08x)", i, other->at.file,
           other->at.line, other->call.mask, mask);
    complete = false; /* it waits for others, and may still come here */
  }
  if (!complete) {
    t->state = thread::AT_WARP;
    t->at = at;
    here->waiting[t->warp] |= 1u << t->lane;
    to_scheduler();
    return;
  }
  op(calls, mask);
  here->waiting[t->warp] &= ~mask;
  for (int i = 0; i < present; i++)
    if (mask >> i & 1u) lanes[i].state = thread::READY;
}

static void finish_sync(lane_call *const *, unsigned mask) {
  if (mask == 0xffffffffu) here->warp_epoch[now.self->warp]++;
}
void sync_warp(unsigned mask, place at) { warp(mask, finish_sync, 0, 32, nullptr, 0, nullptr, at); }

array *find_array(const void *declared, const char *name, int64_t count, int64_t size, int64_t offset, place at) {
  workspace *w = here;
  for (int i = 0; i < w->array_count; i++) {
    array *a = w->arrays + i;
    if (a->declared == declared && a->count == count && a->offset == offset) return a;
    if (offset >= 0 && a->offset >= 0 && offset < a->offset + a->count * a->size && a->offset < offset + count * size)
      fail(at, "shared memory: %s and %s overlap", name, a->name);
  }
  const int64_t start = offset < 0 ? (w->memory_used + 15) & ~(int64_t)15 : offset;
  if (w->array_count == MAX_ARRAYS) fail(at, "shared memory: more than %d arrays", MAX_ARRAYS);
  if (offset >= 0 && offset % 16 != 0) fail(at, "shared memory: %s starts at byte %lld", name, (long long)offset);
  if (offset >= 0 && offset + count * size > w->dynamic_bytes)
    fail(at, "shared memory: %s ends at byte %lld, the launch gave %lld", name, (long long)(offset + count * size),
         (long long)w->dynamic_bytes);
  if (offset < 0 && start - w->dynamic_bytes + count * size > STATIC_BYTES)
    fail(at, "shared memory: static arrays of more than %d bytes", STATIC_BYTES);
  if (start + count * size > SHARED_BYTES) fail(at, "shared memory: more than %d bytes", SHARED_BYTES);
  if (offset < 0) w->memory_used = start + count * size;
  array *a = w->arrays + w->array_count++;
  *a = {declared, name, w->memory + start, w->words + w->words_used, count, size, offset};
  w->words_used += count;
  return a;
}

static void in_bounds(const array *a, int64_t first, int64_t n, place at) {
  if (first < 0 || first + n > a->count)
    fail(at, "out of bounds: %s[%lld], it has %lld elements", a->name, (long long)(first < 0 ? first : first + n - 1),
         (long long)a->count);
}

[[noreturn]] static void race(const array *a, int64_t i, const char *mine, const char *others, int other, int line,
                              place at) {
  fail(at, "race: %s[%lld] is %s here and %s by thread %d in line %d, with no barrier between", a->name, (long long)i,
       mine, others, other, line);
}

/* 1 where the last write of another thread is not ordered before this access. */
static bool write_races(const shadow &s, const thread *t) {
  return s.write_epoch == here->epoch && s.writer != t->id &&
         (s.writer / 32 != t->warp || s.write_warp_epoch == here->warp_epoch[t->warp]);
}

static bool read_races(const shadow &s, const thread *t) {
  return s.read_epoch == here->epoch &&
         (s.many_warps || s.reader / 32 != t->warp ||
          (s.read_warp_epoch == here->warp_epoch[t->warp] && (s.many_lanes || s.reader != t->id)));
}

void on_read(array *a, int64_t first, int64_t n, place at) {
  in_bounds(a, first, n, at);
  const thread *t = now.self;
  const uint16_t warp_epoch = here->warp_epoch[t->warp];
  for (int64_t i = first; i < first + n; i++) {
    shadow &s = a->words[i];
    if (s.write_epoch < here->block_epoch)
      fail(at, "uninitialised: %s[%lld] is read before any write", a->name, (long long)i);
    if (write_races(s, t)) race(a, i, "read", "written", s.writer, s.write_line, at);
    if (s.read_epoch != here->epoch) {
      s.many_lanes = s.many_warps = false;
    } else if (s.reader / 32 != t->warp) {
      s.many_warps = true;
    } else if (s.read_warp_epoch != warp_epoch) {
      s.many_lanes = false;
    } else if (s.reader != t->id) {
      s.many_lanes = true;
    }
    s.read_epoch = here->epoch;
    s.reader = (uint16_t)t->id;
    s.read_warp_epoch = warp_epoch;
    s.read_line = at.line;
  }
}

static void wrote(shadow &s, bool atomic, place at) {
  s.write_epoch = here->epoch;
  s.writer = (uint16_t)now.self->id;
  s.write_warp_epoch = here->warp_epoch[now.self->warp];
  s.write_line = at.line;
  s.atomic = atomic;
}

void on_write(array *a, int64_t first, int64_t n, place at) {
  in_bounds(a, first, n, at);
  const thread *t = now.self;
  for (int64_t i = first; i < first + n; i++) {
    shadow &s = a->words[i];
    if (write_races(s, t)) race(a, i, "written", "written", s.writer, s.write_line, at);
    if (read_races(s, t)) race(a, i, "written", "read", s.reader, s.read_line, at);
    wrote(s, false, at);
  }
}

void on_atomic(array *a, int64_t i, place at) {
  in_bounds(a, i, 1, at);
  shadow &s = a->words[i];
  if (s.write_epoch < here->block_epoch)
    fail(at, "uninitialised: %s[%lld] is updated before any write", a->name, (long long)i);
  if (write_races(s, now.self) && !s.atomic) race(a, i, "updated", "written", s.writer, s.write_line, at);
  if (read_races(s, now.self)) race(a, i, "updated", "read", s.reader, s.read_line, at);
  wrote(s, true, at);
}

void copy_async(array *a, int64_t first, int64_t n, const void *from, place at) {
  thread *t = now.self;
  in_bounds(a, first, n, at);
  if (t->copy_count == MAX_COPIES) fail(at, "cp.async: more than %d copies of a thread wait", MAX_COPIES);
  t->copies[t->copy_count++] = {a, first, n, from, t->copy_group, at};
}

void copy_commit() { now.self->copy_group++; }

/* Copies arrive as late as they may: with the wait. What reads them earlier finds them missing. */
void copy_wait(int groups) {
  thread *t = now.self;
  int kept = 0;
  for (int i = 0; i < t->copy_count; i++) {
    const pending_copy c = t->copies[i];
    if (c.group >= t->copy_group - groups) {
      t->copies[kept++] = c;
      continue;
    }
    on_write(c.a, c.first, c.n, c.at);
    memcpy(c.a->data + c.first * c.a->size, c.from, (size_t)(c.n * c.a->size));
  }
  t->copy_count = kept;
}

static void fiber_main() {
  here->body(here->context);
  now.self->state = thread::DONE;
  here->gone[now.self->warp] |= 1u << now.self->lane;
  to_scheduler();
}

static void prepare(thread *t) {
  char *bottom = here->stacks + (int64_t)t->id * STACK_BYTES;
  memcpy(bottom, &canary, sizeof canary);
#ifdef Q3N_HOST_UCONTEXT
  getcontext(&here->fiber[t->id]);
  here->fiber[t->id].uc_stack.ss_sp = bottom + sizeof canary;
  here->fiber[t->id].uc_stack.ss_size = STACK_BYTES - sizeof canary;
  here->fiber[t->id].uc_link = &here->scheduler;
  makecontext(&here->fiber[t->id], fiber_main, 0);
#else
  void **stack = (void **)(((uintptr_t)bottom + STACK_BYTES) & ~(uintptr_t)15) - FRAME_WORDS;
  for (int i = 0; i < FRAME_WORDS; i++) stack[i] = nullptr;
  stack[ENTRY_WORD] = (void *)fiber_main;
  t->stack_pointer = stack;
#endif
}

/* Nobody can go on. All wait at one barrier: it opens. Anything else is a mistake of the kernel. */
static bool resolve(workspace *w) {
  for (int i = 0; i < w->count; i++) {
    const thread *t = w->threads + i;
    if (t->state != thread::AT_WARP) continue;
    for (int lane = 0; lane < 32; lane++) {
      const thread *other = w->threads + t->warp * 32 + lane;
      if (!(t->call.mask >> lane & 1u)) continue;
      if (other->state == thread::AT_WARP && other->call.mask == t->call.mask) continue;
      if (other->state == thread::DONE)
        stuck(t, t->at, "warp operation: the mask %08x names lane %d, which has returned", t->call.mask, lane);
      else
        stuck(t, t->at, "warp operation: the mask %08x names lane %d, which waits at %s:%d", t->call.mask, lane,
              other->at.file, other->at.line);
      return false;
    }
  }
  const thread *waiting = nullptr;
  for (int i = 0; i < w->count && !waiting; i++)
    if (w->threads[i].state == thread::AT_BARRIER) waiting = w->threads + i;
  for (int i = 0; i < w->count; i++) {
    const thread *t = w->threads + i;
    if (t->state == thread::DONE) {
      stuck(waiting, waiting->at, "divergent barrier: thread %d has returned", i);
      return false;
    }
    if (!same(t->at, waiting->at)) {
      stuck(waiting, waiting->at, "divergent barrier: thread %d waits at %s:%d", i, t->at.file, t->at.line);
      return false;
    }
  }
  for (int i = 0; i < w->count; i++) w->threads[i].state = thread::READY;
  w->epoch++;
  return true;
}

static bool run_block(workspace *w) {
  w->array_count = 0;
  w->words_used = 0;
  w->memory_used = w->dynamic_bytes;
  w->block_epoch = ++w->epoch;
  memset(w->warp_epoch, 0, sizeof w->warp_epoch);
  memset(w->waiting, 0, sizeof w->waiting);
  memset(w->gone, 0, sizeof w->gone);
  for (int i = 0; i < w->count; i++) {
    thread *t = w->threads + i;
    t->state = thread::READY;
    t->copy_count = t->copy_group = 0;
    prepare(t);
  }
  for (int done = 0; done < w->count;) {
    bool moved = false;
    for (int i = 0; i < w->count; i++) {
      thread *t = w->threads + i;
      if (t->state != thread::READY) continue;
      moved = true;
      now.self = t;
      to_thread(t);
      if (memcmp(w->stacks + (int64_t)t->id * STACK_BYTES, &canary, sizeof canary) != 0)
        stuck(t, {nullptr, 0}, "the thread's stack of %d bytes overflowed", STACK_BYTES);
      if (w->failed) return false;
      done += t->state == thread::DONE;
    }
    if (!moved && !resolve(w)) return false;
  }
  w->epoch++;
  return true;
}

/* Workspaces nobody uses. */
static std::atomic<workspace *> spare{nullptr};
static std::atomic_flag spare_taken = ATOMIC_FLAG_INIT;

static workspace *take() {
  while (spare_taken.test_and_set(std::memory_order_acquire)) {
  }
  workspace *w = spare.load(std::memory_order_relaxed);
  if (w) spare.store(w->next, std::memory_order_relaxed);
  spare_taken.clear(std::memory_order_release);
  if (w) return w;
  /* Pages are touched only where a launch needs them. */
  w = (workspace *)calloc(1, sizeof *w);
  if (!w) return nullptr;
  w->stacks = (char *)calloc(1, SLACK_BYTES + (size_t)MAX_THREADS * STACK_BYTES);
  w->memory = (char *)calloc(1, SHARED_BYTES + 16);
  w->words = (shadow *)calloc(SHARED_BYTES, sizeof(shadow));
  w->copies = (pending_copy *)calloc((size_t)MAX_THREADS * MAX_COPIES, sizeof(pending_copy));
  if (w->stacks && w->memory && w->words && w->copies) {
    w->stacks += SLACK_BYTES;
    return w;
  }
  free(w->stacks);
  free(w->memory);
  free(w->words);
  free(w->copies);
  free(w);
  return nullptr;
}

static void give_back(workspace *w) {
  while (spare_taken.test_and_set(std::memory_order_acquire)) {
  }
  w->next = spare.load(std::memory_order_relaxed);
  spare.store(w, std::memory_order_relaxed);
  spare_taken.clear(std::memory_order_release);
}

bool launch(const char *kernel, dim3 grid, dim3 block, int64_t dynamic_bytes, void (*body)(const void *),
            const void *context) {
  workspace *w = take();
  if (!w) {
    snprintf(text, sizeof text, "%s: no memory for the host executor", kernel);
    return false;
  }
  if (w->epoch > UINT32_MAX / 2) {
    memset(w->words, 0, SHARED_BYTES * sizeof(shadow));
    w->epoch = 0;
  }
  w->kernel = kernel;
  w->body = body;
  w->context = context;
  w->count = (int)(block.x * block.y * block.z);
  w->dynamic_bytes = dynamic_bytes;
  w->failed = false;
  here = w;
  now.block_dim = block;
  now.grid_dim = grid;
  for (int i = 0; i < w->count; i++) {
    thread *t = w->threads + i;
    const unsigned id = (unsigned)i;
    t->index = {id % block.x, id / block.x % block.y, id / block.x / block.y};
    t->id = i;
    t->lane = i % 32;
    t->warp = i / 32;
    t->copies = w->copies + (int64_t)i * MAX_COPIES;
  }
  /* The last block first: one that counts on what an earlier one left, or has not touched yet, is wrong on a GPU. */
  bool good = true;
  for (int64_t i = (int64_t)grid.x * grid.y * grid.z - 1; i >= 0 && good; i--) {
    const int64_t rows = i / grid.x;
    now.block = {(unsigned)(i % grid.x), (unsigned)(rows % grid.y), (unsigned)(rows / grid.y)};
    good = run_block(w);
  }
  here = nullptr;
  now = {};
  give_back(w);
  return good;
}

} /* namespace q3n_host */

extern "C" const char *q3n_cuda_host_report(void) { return q3n_host::text; }
