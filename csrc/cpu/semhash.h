// Improved SemHash gate: contract of the forward and backward kernels.
#pragma once

#include "cpu/isa.h"

namespace dsts::cpu {

// gate[b, c] = hard[b] ? (q > 0) : r(q), q = logits[neuron[b], c] + noise[b, c].
struct SemhashForward {
  const void* logits;     // [N, C]
  const int64_t* neuron;  // [B], or null: sample b reads row b
  const void* noise;      // [B, C], or null for none
  const uint8_t* hard;    // [B], or null: every sample is hard
  void* gate;             // [B, C], written whole
  int64_t B, N, C;
  DType dtype;
  int threads;
};

// dlogits[n, c] = sum over b with neuron[b] == n, in order, of grad[b, c] * dr/dq; an unchosen row is 0.
struct SemhashBackward {
  const void* grad;       // [B, C]
  const void* logits;     // [N, C]
  const int64_t* neuron;  // [B], or null
  const void* noise;      // [B, C], or null
  void* dlogits;          // [N, C], written whole
  int64_t B, N, C;
  DType dtype;
  int threads;
};

DSTS_KERNEL(semhash_forward, SemhashForward)
DSTS_KERNEL(semhash_backward, SemhashBackward)

}  // namespace dsts::cpu
