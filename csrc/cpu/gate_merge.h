// Epilogue of the data gradient: merge the two operators' data gradients under the gate, and reduce the
// gate's own gradient in the same pass.
#pragma once

#include "cpu/isa.h"

namespace dsts::cpu {

// One operator's data gradient, for the channels that it has.
struct GradientPanel {
  const void* data;        // [nb, T, H, W, width] dense, in panel_dtype; null where width is 0
  const int32_t* columns;  // [C] of the panel by channel, -1 for none; null: channel c is column c
  int64_t width;
};

// With s = samples[i], g = gate[s, c], a and d the two panels' values (0 for a channel that a panel lacks):
// dx[s, c, p] = g * a + (1 - g) * d (exactly a at g == 1 and d at g == 0, whatever the other holds)
// dgate[s, c] = sum over p of x[s, c, p] * (a - d).
struct GateMerge {
  GradientPanel spatial, temporal;
  DType panel_dtype;  // x's, or float32 for a half x
  Samples samples;
  const void* gate;  // [.., C] in x's dtype
  int64_t gate_stride_b;
  Features x;   // [.., C, T, H, W]; its memory is read for dgate only
  Features dx;  // [.., C, T, H, W] in x's dtype, or absent
  void* dgate;  // [.., C] contiguous, in x's dtype, or null
  int threads;
};

DSTS_KERNEL(gate_merge, GateMerge)

}  // namespace dsts::cpu
