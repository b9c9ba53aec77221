// What every operator's contract shares: dtype codes, strides, status. Seen by the binding and by every
// instruction set's translation units, so it holds plain types only.
#pragma once

#include <cstdint>

namespace dsts::cpu {

// Codes of the Python side. Half types are computed in float, double in double ("A" in the kernels).
enum DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

enum class Status { ok, bad_neuron, no_memory };

// Element strides of a 5-d tensor (B, C, T, H, W); 0 for an expanded dimension, never negative.
struct Strides {
  int64_t b, c, t, h, w;
};

}  // namespace dsts::cpu
