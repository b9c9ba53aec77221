// Gather chosen channels of chosen samples into a dense panel, scaled or not, in any layout. Serves features
// (B, C, T, H, W) and, with output channels as the batch and taps as positions, convolution weights.
#pragma once

#include "cpu/isa.h"

namespace dsts::cpu {

// out[i, j, p] = src[samples[i], channels[j], p] * s for j < num_channels, and 0 for the rest of out, where
// s = scale[samples[i] * scale_stride_b + channels[j]], or 1 - that with complement, or 1 without scale.
struct GatherPanel {
  Features src;             // [.., C, T, H, W]
  Samples samples;          // of src
  const int32_t* channels;  // [num_channels], or null for 0..num_channels-1
  int64_t num_channels;
  const void* scale;  // [.., C] in src's dtype, or null for a copy
  int64_t scale_stride_b;
  bool complement;
  Features out;  // [nb, width, T, H, W], every element written; src's dtype, or float32 for a half src
  int threads;
};

DSTS_KERNEL(gather_panel, GatherPanel)

}  // namespace dsts::cpu
