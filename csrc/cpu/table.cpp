// One instruction set's table of kernels; compiled once for each set, like the kernels themselves.
#include "cpu/kernels.h"

namespace dsts::cpu::DSTS_ISA {

#define DSTS_STRING_(x) #x
#define DSTS_STRING(x) DSTS_STRING_(x)

extern const Kernels table;
const Kernels table = {DSTS_STRING(DSTS_ISA),
                       semhash_forward,
                       semhash_backward,
                       tap_sums,
                       gather_panel,
                       epilogue,
                       gate_merge,
                       winograd,
                       winograd_weight_gradient};

}  // namespace dsts::cpu::DSTS_ISA
