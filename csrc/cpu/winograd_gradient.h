// Gradient of the gated convolution's filters by Winograd's minimal filtering.
#pragma once

#include "cpu/winograd.h"

namespace dsts::cpu {

// For each operator of `forward`, whose weight is written here (in weight_dtype, without blocks; its rows and
// columns are the elements to write, what no list names is left alone): the gradient of the filter, or with
// `add` added to what is there. `forward` is the call that made the features, its output's layout, bias and
// the rest unused.
struct WinogradGradient {
  Winograd forward;
  const void* grad;  // (.., O, T, H, W), by forward's samples
  Strides grad_strides;
  int grad_dtype;
  bool add;
};

#ifdef DSTS_ISA
namespace DSTS_ISA {
Status winograd_gradient(const WinogradGradient& a);
}  // namespace DSTS_ISA
#endif

}  // namespace dsts::cpu
