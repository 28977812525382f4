/* The CUDA driver's functions, each a jump to what libcuda.so.1 has under that name: the library is opened when the
   first is called, so that a program on cust starts, and says what is missing, where there is no driver. The list is
   made from cuda.h by build.rs: X(number, name). Engines in C, which call the runtime alone, need nothing of this. */
#include <dlfcn.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

#if !defined(__x86_64__) && !defined(__aarch64__)
#error "the CUDA driver is for x86-64 and AArch64"
#endif

static const char *const names[] = {
#define X(i, name) #name,
#include "driver_symbols.inc"
#undef X
};

static _Atomic(void *) functions[sizeof names / sizeof names[0]];

void *q3n_driver_library(void); /* runtime.cu */

static int no_device(void) { return 100; }      /* CUDA_ERROR_NO_DEVICE */
static int not_supported(void) { return 801; }  /* CUDA_ERROR_NOT_SUPPORTED: an older driver */
static int error_text(int error, const char **text) {
  (void)error;
  *text = "no CUDA driver";
  return 0;
}

__attribute__((visibility("hidden"), used)) void *q3n_driver_find(unsigned i) {
  void *function = atomic_load_explicit(&functions[i], memory_order_relaxed);
  if (function) return function;
  void *open = q3n_driver_library();
  if (!open) return strncmp(names[i], "cuGetError", 10) ? (void *)no_device : (void *)error_text;
  function = dlsym(open, names[i]);
  if (!function) return (void *)not_supported;
  atomic_store_explicit(&functions[i], function, memory_order_relaxed);
  return function;
}

/* Asks for the function and jumps to it with the caller's arguments. */
#if defined(__x86_64__)
__asm__(
    ".text\n"
    ".type q3n_driver_call, @function\n"
    "q3n_driver_call:\n"
    "  push %rdi\n  push %rsi\n  push %rdx\n  push %rcx\n  push %r8\n  push %r9\n"
    "  sub $40, %rsp\n"
    "  movups %xmm0, (%rsp)\n  movups %xmm1, 16(%rsp)\n"
    "  mov %r11d, %edi\n"
    "  call q3n_driver_find\n"
    "  movups (%rsp), %xmm0\n  movups 16(%rsp), %xmm1\n"
    "  add $40, %rsp\n"
    "  pop %r9\n  pop %r8\n  pop %rcx\n  pop %rdx\n  pop %rsi\n  pop %rdi\n"
    "  jmp *%rax\n"
    ".size q3n_driver_call, . - q3n_driver_call\n");
#define X(i, name)                                                                                            \
  __asm__(".text\n.globl " #name "\n.hidden " #name "\n.type " #name ", @function\n" #name ":\n"              \
          "  mov $" #i ", %r11d\n  jmp q3n_driver_call\n.size " #name ", . - " #name "\n");
#else
__asm__(
    ".text\n"
    ".type q3n_driver_call, %function\n"
    "q3n_driver_call:\n"
    "  stp x29, x30, [sp, #-112]!\n"
    "  stp x0, x1, [sp, #16]\n  stp x2, x3, [sp, #32]\n  stp x4, x5, [sp, #48]\n  stp x6, x7, [sp, #64]\n"
    "  stp q0, q1, [sp, #80]\n"
    "  mov w0, w16\n"
    "  bl q3n_driver_find\n"
    "  mov x16, x0\n"
    "  ldp q0, q1, [sp, #80]\n"
    "  ldp x0, x1, [sp, #16]\n  ldp x2, x3, [sp, #32]\n  ldp x4, x5, [sp, #48]\n  ldp x6, x7, [sp, #64]\n"
    "  ldp x29, x30, [sp], #112\n"
    "  br x16\n"
    ".size q3n_driver_call, . - q3n_driver_call\n");
#define X(i, name)                                                                                            \
  __asm__(".text\n.globl " #name "\n.hidden " #name "\n.type " #name ", %function\n" #name ":\n"              \
          "  mov w16, #" #i "\n  b q3n_driver_call\n.size " #name ", . - " #name "\n");
#endif
#include "driver_symbols.inc"
