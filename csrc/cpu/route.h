// Where samples go: their scores, and the neuron that these choose.
#pragma once

#include "cpu/isa.h"

namespace dsts::cpu {

// scores[b, n] = <sums[b], scoring[n]> / divisor, summed in double and rounded once. neuron[b] is the first of
// the largest scores; NaN is larger than any number, as for torch's argmax.
struct Route {
  const float* sums;     // [B, K]: tap sums, K = channels times taps
  const float* scoring;  // [N, K]
  int64_t B, N, K;
  double divisor;
  float* scores;    // [B, N]
  int64_t* neuron;  // [B]
  int threads;
};

DSTS_KERNEL(route, Route)

}  // namespace dsts::cpu
