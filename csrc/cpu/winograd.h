// Gated convolution by Winograd's minimal filtering: the spatial 1x3x3 and the temporal 3x1x1 operator on
// their listed channels, summed, with the epilogue. F(m, 3) in each dimension, csrc/winograd.h.
#pragma once

#include "cpu/epilogue.h"

namespace dsts::cpu {

// One operator, as Python's Operator: which channels it reads, and its filter as it lies in memory.
//
// The weight of output o, summed channel k and tap is
//   weight[o_list[o] * stride_o + k_list[k] * stride_k + tap * stride_tap];
// a null list counts 0, 1, ... With `blocked` they lie dense as [o / 16][k][tap][o % 16], zero past the last
// output, and neither lists nor strides are used.
struct Operator {
  void* weight;             // the first weight that is used; a weight gradient is written there
  DType dtype;              // of weight: float32 or half
  int64_t k_channels;       // that it sums over; 0: the operator is absent
  const int32_t* channels;  // [k_channels] of the features, or null for 0..k_channels-1
  const int32_t* o_list;    // [O], or null
  const int32_t* k_list;    // [k_channels], or null
  int64_t stride_o, stride_k, stride_tap;
  const void* scale;  // [.., C] in the features' dtype, by channel, or null
  int64_t scale_stride_b;
  bool complement;  // multiply by 1 - scale
  bool blocked;
};

// Outputs of a tile along each dimension: one of the sizes in winograd_tiles.h.
struct TileSizes {
  int t, h, w;
};

// The convolutions of x[samples[i]], ended by the epilogue, whose own samples say where the results go.
// Float32 arithmetic throughout; every dtype is float32 or half.
struct Winograd {
  Features x;       // [.., C, T, H, W]
  Samples samples;  // of x
  Operator spatial, temporal;
  TileSizes tiles;
  Epilogue epilogue;
  int threads;
  double* stage_seconds;  // [4]: time in input, filter, product and output stages, added to; or null
};

DSTS_KERNEL(winograd, Winograd)

}  // namespace dsts::cpu
