// Tap sums of a feature tensor: what a convolution's outputs, summed, need to know of its input.
#pragma once

#include "cpu/isa.h"

namespace dsts::cpu {

// taps == 1: out[b, c] = sum over positions. taps == 9: out[b, c, 3 * i + j] = sum over the positions that
// tap (i, j) of a zero-padded 1x3x3 kernel sees: i = 0 all rows but the last, 1 all, 2 all but the first;
// j likewise for columns.
struct TapSums {
  Features x;  // [B, C, T, H, W]
  void* out;   // [B, C, taps] contiguous, float (double for float64 input)
  int taps;
  int threads;
};

DSTS_KERNEL(tap_sums, TapSums)

}  // namespace dsts::cpu
