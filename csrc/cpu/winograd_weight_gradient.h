// Gradient of the gated convolution's filters by Winograd's minimal filtering.
#pragma once

#include "cpu/winograd.h"

namespace dsts::cpu {

// For each operator the gradient of its filter, written where its `weight` lies (without blocks, taps next to
// each other; what no list names is left alone), or with `add` added to what is there.
struct WinogradWeightGradient {
  Features x;       // [.., C, T, H, W], which the operators read
  Samples samples;  // of x and grad
  Features grad;    // [.., O, T, H, W]
  Operator spatial, temporal;
  TileSizes tiles;
  bool add;
  int threads;
  double* stage_seconds;  // [4]: time in input, gradient, product and weight stages, added to; or null
};

DSTS_KERNEL(winograd_weight_gradient, WinogradWeightGradient)

}  // namespace dsts::cpu
