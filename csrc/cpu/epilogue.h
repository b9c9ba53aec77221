// Epilogue of the gated convolution: join the two operators' panels, bias, ReLU, skip connection, store, and
// the tap sums that the next layer's scores start from.
#pragma once

#include "cpu/common.h"

namespace dsts::cpu {

// s = samples[i]: out[s, o, p] = relu(zs[i, p, o] + zt[i, p, o] + bias[s * bias_stride_b + o]) + skip[s, o,
// p] and sums[s, o, :] = tap sums (see TapSums) of out as stored, after rounding. out may be zs itself, in
// place, exactly when the dtype is one and the layout is the panel's with samples null; else they must not
// overlap.
struct Epilogue {
  const void* zs;         // (nb, T, H, W, O) dense, in_dtype, or null
  const void* zt;         // the same, or null
  const void* bias;       // float (double for float64), or null
  int64_t bias_stride_b;  // 0: one bias for all
  bool relu;
  const void* skip;  // (.., O, T, H, W), out_dtype, or null
  Strides skip_strides;
  void* out;  // (.., O, T, H, W), out_dtype
  Strides out_strides;
  const int64_t* samples;  // (nb), or null for 0..nb-1
  int64_t nb;
  void* sums;  // (.., O, taps) contiguous, float (double for float64), or null
  int taps;
  int64_t O, T, H, W;
  int in_dtype;  // out_dtype, or float32 for a half out
  int out_dtype;
  int threads;
};

#ifdef DSTS_ISA
namespace DSTS_ISA {
Status epilogue(const Epilogue& a);
}  // namespace DSTS_ISA
#endif

}  // namespace dsts::cpu
