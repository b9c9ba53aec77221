// The CPU kernels as the binding sees them: one table of function pointers for every instruction set, one of
// them active. A kernel's .cpp is compiled once for each set, into a namespace of its own.
#pragma once

#include "cpu/epilogue.h"
#include "cpu/gate_merge.h"
#include "cpu/gather_panel.h"
#include "cpu/semhash.h"
#include "cpu/tap_sums.h"
#include "cpu/winograd.h"
#include "cpu/winograd_weight_gradient.h"

namespace dsts::cpu {

struct Kernels {
  const char* isa;
  Status (*semhash_forward)(const SemhashForward&);
  Status (*semhash_backward)(const SemhashBackward&);
  Status (*tap_sums)(const TapSums&);
  Status (*gather_panel)(const GatherPanel&);
  Status (*epilogue)(const PanelEpilogue&);
  Status (*gate_merge)(const GateMerge&);
  Status (*winograd)(const Winograd&);
  Status (*winograd_weight_gradient)(const WinogradWeightGradient&);
};

// Tables this build holds and this machine can run, the best last; count of them in *n.
const Kernels* const* supported_kernels(int* n);

// The table in use; set_kernels(null) returns to the best.
const Kernels& kernels();
void set_kernels(const Kernels* table);

}  // namespace dsts::cpu
