// Warps: where some or all of the lanes wait for one another and may exchange values.
#pragma once

#include "emulator.h"

namespace emulator {

struct Fiber;

// Lanes of a warp that wait for one another; found by the lowest lane of the mask.
struct Meeting {
  const char* name = nullptr;
  unsigned mask = 0, arrived = 0, generation = 0;
  void (*finish)(Fiber* first_lane, unsigned lanes) = nullptr;
};

struct Warp {
  Fiber* lanes = nullptr;
  unsigned alive = 0;
  Meeting meetings[32];
};

// Waits for the lanes of `mask` that have not exited; the last one runs `finish`.
void meet(Fiber* f, const char* name, unsigned mask, Place place, bool orders,
          void (*finish)(Fiber*, unsigned));
// Fails where some lanes of the warp have exited.
void require_whole_warp(const char* name, Place place);
float widened(uint16_t half);  // to float, as in cuda_fp16.h
// Of functions that take the time: products.
#ifdef __x86_64__
#  define EMULATOR_CLONES __attribute__((target_clones("avx2", "default"), optimize("O3")))
#else
#  define EMULATOR_CLONES
#endif
// Takes a fiber that exits out of its warp; others may have waited for it alone.
void leave_warp(Fiber* f);

}  // namespace emulator
