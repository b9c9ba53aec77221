// Switching between fibers, and their stacks.
#include "fiber.h"

#include <pthread.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

namespace emulator {

#ifdef __x86_64__
asm(R"(
.text
.p2align 4
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
#endif

void start_at(Context& context, char* stack, unsigned slot, void (*entry)()) {
  // Stacks lie a multiple of the page size apart; tops at the same offset would share a few cache sets.
  char* top = stack + kStackBytes - (slot * 320u) % 4096u;
  top = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(63));
  context.stack_bottom = stack;
  context.stack_bytes = kStackBytes;
  context.fake_stack = nullptr;
#ifdef __x86_64__
  auto** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  context.stack_pointer = sp;
#else
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack;
  context.registers.uc_stack.ss_size = size_t(top - stack);
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
#endif
}

void describe_thread([[maybe_unused]] Context& context) {
#ifdef EMULATOR_ADDRESS
  pthread_attr_t attributes;
  void* bottom = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &bottom, &context.stack_bytes);
  pthread_attr_destroy(&attributes);
  context.stack_bottom = bottom;
#endif
#ifdef EMULATOR_THREAD
  context.sanitizer_fiber = __tsan_get_current_fiber();
#endif
}

void forget_stack([[maybe_unused]] char* stack) {
#ifdef EMULATOR_THREAD
  unsigned char resident[kStackBytes / kPage];
  if (mincore(stack, kStackBytes, resident) != 0) return;
  size_t first = 0;
  while (first < sizeof resident && !(resident[first] & 1)) ++first;
  if (first < sizeof resident)
    mmap(stack + first * kPage, kStackBytes - first * kPage, PROT_READ | PROT_WRITE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
#endif
}

}  // namespace emulator
