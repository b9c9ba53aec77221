// Binds schedule.cu in the place of the project's kernels. Arrays come as addresses.
#include <pybind11/pybind11.h>

#include "schedule.h"

namespace dsts::cuda {

void bind(pybind11::module_& m);
void bind(pybind11::module_& m) {
  using namespace pybind11::literals;
  m.def(
      "starts",
      [](uintptr_t lengths, uintptr_t starts, uintptr_t dealt, int samples, int per_sample, int num_ctas,
         int waves, int idle_percent, int threads) {
        return schedule::starts(reinterpret_cast<const int*>(lengths), reinterpret_cast<int*>(starts),
                                reinterpret_cast<int*>(dealt), samples, per_sample, num_ctas, waves,
                                idle_percent, threads);
      },
      pybind11::kw_only(), "lengths"_a, "starts"_a, "dealt"_a, "samples"_a, "per_sample"_a, "num_ctas"_a,
      "waves"_a, "idle_percent"_a, "threads"_a);
}

}  // namespace dsts::cuda
