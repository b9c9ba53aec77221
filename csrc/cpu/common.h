// What the contracts of all kernels share: features, samples, status. Seen by the binding, which fills them
// from Python's tensors, and by every instruction set's translation units, so it holds plain types only.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace dsts::cpu {

enum class Status { ok, bad_neuron, no_memory };

// Element strides of a 5-d tensor (B, C, T, H, W); 0 for an expanded dimension, never negative.
struct Strides {
  int64_t b, c, t, h, w;
};

// A 5-d tensor as it lies in memory. Half types are computed in float, double in double ("A" in the kernels).
struct Features {
  void* data;  // [B, C, T, H, W], or null: absent
  int64_t B, C, T, H, W;
  Strides strides;
  DType dtype;
};

// Which samples of a batch a call is about, in order.
struct Samples {
  const int64_t* index;  // [count], or null for 0..count-1
  int64_t count;
};

}  // namespace dsts::cpu
