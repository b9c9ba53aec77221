// How a fiber takes turns with others on an OS thread, and what the sanitizers are told of it:
// AddressSanitizer which stack is in use, ThreadSanitizer which fiber runs and exactly the order that CUDA
// promises, so what it reports does not depend on the schedule.
#pragma once

#include <stddef.h>

#ifndef __x86_64__
#  include <ucontext.h>
#endif

#ifdef EMULATOR_THREAD
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
}
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

#ifdef EMULATOR_ADDRESS
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
}
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

namespace emulator {

constexpr size_t kPage = 4096;

// ThreadSanitizer's view. What a fiber acquires from an address is what others released there before.
inline void order_release([[maybe_unused]] void* key) {
#ifdef EMULATOR_THREAD
  __tsan_release(key);
#endif
}
inline void order_acquire([[maybe_unused]] void* key) {
#ifdef EMULATOR_THREAD
  __tsan_acquire(key);
#endif
}
// While one of these lives, memory handed out or back counts as never touched.
struct Untouched {
#ifdef EMULATOR_THREAD
  Untouched() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__); }
  ~Untouched() { AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
#else
  ~Untouched() {}
#endif
};

// Where a flow of control stands while it does not run.
struct Context {
#ifdef __x86_64__
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
  void* sanitizer_fiber = nullptr;
};

#ifdef __x86_64__
// Saves what the calling convention says a function keeps, and takes up the other stack. (The rounding
// mode and the like are the same everywhere.)
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void** save, void* load);
#endif

// Leaves `from`, `for_good` where it will not run again, and goes on at `to`.
inline void jump(Context& from, Context& to, [[maybe_unused]] bool for_good) {
#ifdef EMULATOR_ADDRESS
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack_bottom, to.stack_bytes);
#endif
#ifdef EMULATOR_THREAD
  __tsan_switch_to_fiber(to.sanitizer_fiber, 1);  // 1: orders nothing
#endif
#ifdef __x86_64__
  emulator_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
#ifdef EMULATOR_ADDRESS
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// What a fiber has to call first.
inline void arrive() {
#ifdef EMULATOR_ADDRESS
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

// Makes a context whose first jump calls `entry`, which must not return.
void start_at(Context& context, char* stack, unsigned slot, void (*entry)());
// Makes one of the flow of control that calls this, an OS thread's own.
void describe_thread(Context& context);
// Forgets what was done to a stack: another thread will use it that is not ordered after this one.
void forget_stack(char* stack);

}  // namespace emulator
