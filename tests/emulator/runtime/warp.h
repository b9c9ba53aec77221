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
// Takes a fiber that exits out of its warp; others may have waited for it alone.
void leave_warp(Fiber* f);

}  // namespace emulator
