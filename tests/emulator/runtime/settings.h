// What the runtime asks of its settings; runtime.h is how they are made.
#pragma once

#include <stdint.h>

#include <atomic>

#include "emulator.h"

namespace emulator {

inline std::atomic<bool> warp_operations_order{false}, fresh_threads{false};

uint64_t next_seed();  // another one for each launch
int workers();

// A lock that ThreadSanitizer does not see: one that it sees would order the threads that take it.
struct SpinLock {
  std::atomic_flag flag = ATOMIC_FLAG_INIT;
  void lock() {
    while (flag.test_and_set(std::memory_order_acquire)) {
    }
  }
  void unlock() { flag.clear(std::memory_order_release); }
};

// Counts changes of what is skipped; each makes sites look anew.
inline std::atomic<unsigned> epoch{1};
void look_up(Site* site);

inline bool is_skipped(Site* site) {
  if (__atomic_load_n(&site->epoch, __ATOMIC_ACQUIRE) != epoch.load(std::memory_order_relaxed)) look_up(site);
  return __atomic_load_n(&site->skipped, __ATOMIC_RELAXED);
}

}  // namespace emulator
