// Gather chosen channels of chosen samples into a dense panel, scaled or not, in any layout. Serves features
// (B, C, T, H, W) and, with output channels as the batch and taps as positions, convolution weights.
#pragma once

#include "cpu/common.h"

namespace dsts::cpu {

// out[i, j, p] = src[samples[i], channels[j], p] * s for j < nc, and 0 for nc <= j < width, where
// s = scale[samples[i] * scale_stride_b + channels[j]], or 1 - that with complement, or 1 without scale.
struct GatherPanel {
  const void* src;
  Strides src_strides;
  const int64_t* samples;  // (nb), or null for 0..nb-1
  int64_t nb;
  const int32_t* channels;  // (nc), or null for 0..nc-1
  int64_t nc;
  const void* scale;  // src's dtype, or null for a copy
  int64_t scale_stride_b;
  bool complement;
  void* out;  // (nb, width, T, H, W), every element written
  Strides out_strides;
  int64_t width, T, H, W;
  int src_dtype;
  int out_dtype;  // src_dtype, or float32 for a half src
  int threads;
};

#ifdef DSTS_ISA
namespace DSTS_ISA {
Status gather_panel(const GatherPanel& a);
}  // namespace DSTS_ISA
#endif

}  // namespace dsts::cpu
