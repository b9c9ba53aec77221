// Epilogue of the gated convolution: join the two operators' panels, bias, ReLU, skip connection, store, and
// the tap sums that the next layer's scores start from.
#pragma once

#include "cpu/isa.h"

namespace dsts::cpu {

// What is done to a result z on its way to memory. With s = samples[i]:
// out[s, o, p] = relu(z[i, o, p] + bias[o]) + skip[s, o, p]
// and sums[s, o, :] = tap sums (see TapSums) of out as stored, after rounding.
struct Epilogue {
  Features out;      // [.., O, T, H, W]
  Samples samples;   // where the results go: in out, skip and sums
  const void* bias;  // [O], float (double for float64), or null
  bool relu;
  Features skip;  // [.., O, T, H, W] in out's dtype, or absent
  void* sums;     // [.., O, taps], float (double for float64), or null; a sample's are dense
  int64_t sums_stride_b;
  int taps;
};

// Both operators' panels, summed. `out` may be the spatial panel itself, in place, exactly when the dtype is
// one, the layout is the panel's and no samples are listed; else they must not overlap.
struct PanelEpilogue {
  const void* spatial;   // [nb, T, H, W, O] dense, in panel_dtype, or null
  const void* temporal;  // [nb, T, H, W, O] likewise, or null
  DType panel_dtype;     // out's, or float32 for a half out
  Epilogue epilogue;
  int threads;
};

DSTS_KERNEL(epilogue, PanelEpilogue)

}  // namespace dsts::cpu
