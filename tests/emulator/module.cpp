// The Python module dsts_emulated: the functions that the CUDA extension module has, with their kernels run
// by the emulator, and a submodule `emulator` for its settings.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "runtime.h"

namespace dsts::cuda {
void bind(pybind11::module_& m);
}

PYBIND11_MODULE(EMULATOR_MODULE, m) {
  using namespace pybind11::literals;
  dsts::cuda::bind(m);
  auto e = m.def_submodule("emulator");
  e.def("seed", &emulator::set_seed, "value"_a);
  e.def("workers", &emulator::set_workers, "count"_a);
  e.def("warp_operations_order", &emulator::set_warp_operations_order, "on"_a);
  e.def("fresh_threads", &emulator::set_fresh_threads, "on"_a);
  e.def("skip_barrier", &emulator::skip_barrier, "file"_a, "line"_a);
  e.def("skip_fence", &emulator::skip_fence, "file"_a, "line"_a);
  e.def("reset", &emulator::reset);
  e.def("barriers", [] { return emulator::sites_met(false); });
  e.def("fences", [] { return emulator::sites_met(true); });
  e.def("arch", &emulator::arch);
}
