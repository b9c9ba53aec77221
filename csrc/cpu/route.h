// Where samples go: their scores, and the neuron that these choose.
#pragma once

#include "cpu/isa.h"

namespace dsts::cpu {

// scores[b, n] = <sums[b], scoring[n]> / divisor, summed in double and rounded once. neuron[b] is the first of
// the largest scores; NaN is larger than any number, as for torch's argmax.
struct Route {
  const float* sums;     // [B, C, taps]: tap sums
  const float* scoring;  // [N, C, taps]; centered: [N, C, taps + 1], with [n, 0, taps] added to n's scores
  int64_t B, N, C, taps;
  bool centered;
  double divisor;
  float* scores;    // [B, N]
  int64_t* neuron;  // [B]
  int threads;
};

DSTS_KERNEL(route, Route)

}  // namespace dsts::cpu
