// Epilogue of the data gradient: merge the two operators' data gradients under the gate, and reduce the
// gate's own gradient in the same pass.
#pragma once

#include "cpu/common.h"

namespace dsts::cpu {

// With s = samples[i], g = gate[s, c], a and d the two panels' values (0 for a channel that a panel lacks):
// dx[s, c, p] = g * a + (1 - g) * d (exactly a at g == 1 and d at g == 0, whatever the other holds)
// dgate[s, c] = sum over p of x[s, c, p] * (a - d).
struct GateMerge {
  const void* dxs;       // (nb, T, H, W, ns) dense, panel_dtype
  const int32_t* pos_s;  // (C) panel column of a channel, -1 for none; null for identity
  int64_t ns;
  const void* dxt;  // (nb, T, H, W, nt)
  const int32_t* pos_t;
  int64_t nt;
  const void* gate;  // dtype; gate[s * gate_stride_b + c]
  int64_t gate_stride_b;
  const void* x;  // (.., C, T, H, W), dtype; may be null without dgate
  Strides x_strides;
  void* dx;  // dtype, or null
  Strides dx_strides;
  void* dgate;  // (.., C) contiguous, dtype, or null
  const int64_t* samples;
  int64_t nb;
  int64_t C, T, H, W;
  int panel_dtype;  // dtype, or float32 for a half dtype
  int dtype;
  int threads;
};

#ifdef DSTS_ISA
namespace DSTS_ISA {
Status gate_merge(const GateMerge& a);
}  // namespace DSTS_ISA
#endif

}  // namespace dsts::cpu
