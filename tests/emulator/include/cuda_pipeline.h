// Stands in for CUDA's header of this name. A copy is made as late as allowed, when it is waited for, and
// its destination holds NaN patterns until then: a missing wait shows in the values. For the sanitizers the
// destination is written both when the copy is issued and when it is waited for, since on a device it may
// land at any time in between.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size, size_t zfill = 0,
                                    ::emulator::Place place = {__builtin_FILE(), __builtin_LINE()}) {
  ::emulator::queue_copy(to, from, size, zfill, place);
  if (size > zfill) {
    (void)*static_cast<const volatile char*>(from);
    (void)*(static_cast<const volatile char*>(from) + (size - zfill - 1));
  }
  for (size_t i = 0; i < size / 4; ++i) static_cast<volatile uint32_t*>(to)[i] = 0xFFFFFFFFu;
}

inline void __pipeline_commit() { ::emulator::commit_copies(); }

inline void __pipeline_wait_prior(unsigned keep) {
  ::emulator::Copy copy;
  while (::emulator::next_copy(keep, &copy)) {
    auto* to = static_cast<unsigned char*>(copy.to);
    auto* from = static_cast<const unsigned char*>(copy.from);
    if (copy.bytes == 16) {
      __builtin_memcpy(__builtin_assume_aligned(to, 16), __builtin_assume_aligned(from, 16), 16);
    } else {
      for (unsigned i = 0; i < copy.bytes; ++i) to[i] = from[i];
      for (unsigned i = 0; i < copy.zeros; ++i) to[copy.bytes + i] = 0;
    }
  }
}
