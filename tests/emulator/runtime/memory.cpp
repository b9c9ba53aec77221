// Fences and atomic operations, as far as they order others' accesses, and asynchronous copies.
#include "block.h"
#include "settings.h"

namespace emulator {

namespace {
SpinLock atomics_lock;
}  // namespace

void fence(Site* site) {
  if (is_skipped(site)) return;
  Fiber* f = self();
  if (f->last_atomic) order_acquire(f->last_atomic);
  f->releases_next = true;
}

// A release has to cover the atomic operation itself (whoever comes last may reset a counter), and must be
// seen by all who find its result; so for ThreadSanitizer the two are one step.
void before_atomic(const void* address) {
  self()->last_atomic = const_cast<void*>(address);
  if (kThreadSanitizer) atomics_lock.lock();
}

void after_atomic() {
  Fiber* f = self();
  if (f->releases_next) order_release(f->last_atomic);
  f->releases_next = false;
  if (kThreadSanitizer) atomics_lock.unlock();
}

void queue_copy(void* to, const void* from, size_t size, size_t zeros, Place place) {
  Fiber* f = self();
  const char* name = "__pipeline_memcpy_async";
  if (size != 4 && size != 8 && size != 16) fail(place, "%s: cannot copy %zu bytes", name, size);
  if (zeros > size) fail(place, "%s: %zu zeros in %zu bytes", name, zeros, size);
  if (reinterpret_cast<uintptr_t>(to) % size || reinterpret_cast<uintptr_t>(from) % size)
    fail(place, "%s: %p or %p is not %zu-byte aligned", name, to, from, size);
  const auto* target = static_cast<unsigned char*>(to);
  if (target < f->shared || target + size > f->shared + f->worker->launch->shared_bytes)
    fail(place, "%s: the destination is outside shared memory", name);
  if (f->copies_end - f->copies_begin == kCopies) fail(place, "%s: too many copies in flight", name);
  f->copies[f->copies_end++ % kCopies] = {to, from, unsigned(size - zeros), unsigned(zeros), f->open_group};
  f->copy_place = place;
}

void commit_copies() { ++self()->open_group; }

bool next_copy(unsigned keep, Copy* copy) {
  Fiber* f = self();
  if (f->copies_begin == f->copies_end) return false;
  const Copy& next = f->copies[f->copies_begin % kCopies];
  if (next.group + keep >= f->open_group) return false;
  *copy = next;
  ++f->copies_begin;
  return true;
}

}  // namespace emulator
