// Gated convolution by Winograd's minimal filtering: the spatial 1x3x3 and the temporal 3x1x1 operator on
// their listed channels, summed, with the epilogue. F(m, 3) in each dimension, csrc/winograd.h.
#pragma once

#include "cpu/epilogue.h"

namespace dsts::cpu {

// One operator: which channels it reads, and its filter as it lies in the caller's memory.
struct WinogradOperator {
  const int32_t* channels;  // (count), or null for 0..count-1
  int64_t count;            // channels it sums over; 0: the operator is absent
  const void* scale;        // (.., C) in x's dtype, by channel, or null
  int64_t scale_stride_b;
  bool complement;  // multiply by 1 - scale
  // The weight of output o, summed channel k and tap is weight[rows[o] * stride_o + columns[k] * stride_k +
  // tap * stride_tap]; a null list counts 0, 1, ... With `blocked` they lie dense as [o / 16][k][tap][o %
  // 16], zero past the last output, and neither lists nor strides are used.
  const void* weight;
  const int32_t* rows;
  const int32_t* columns;
  int64_t stride_o, stride_k, stride_tap;
  bool blocked;
};

// The convolutions of x[samples[i]], finished as in Epilogue, whose zs and zt stay null and whose own samples
// say where the results go. Float32 arithmetic throughout.
struct Winograd {
  const void* x;  // (.., C, T, H, W)
  Strides x_strides;
  const int64_t* samples;  // (out.nb), or null for 0..nb-1
  WinogradOperator spatial, temporal;
  int tile_t, tile_h, tile_w;  // outputs of a tile: 1 for a dimension of size 1, else 2, 4 or (t only) 8
  int x_dtype, weight_dtype;   // float32 or half
  Epilogue out;                // nb, O, T, H, W and threads are read from here too
  double* seconds;             // (4): time in input, filter, product and output stages, added to; or null
};

#ifdef DSTS_ISA
namespace DSTS_ISA {
Status winograd(const Winograd& a);
}  // namespace DSTS_ISA
#endif

}  // namespace dsts::cpu
