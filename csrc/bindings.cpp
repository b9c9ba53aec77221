// dsts_kernels._C: the native kernels for Python, and what this build holds. It knows nothing of torch,
// neither here nor in the bindings of either kind of kernel (cpu/bindings.cpp, cuda/bindings.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "build_flags.h"

namespace py = pybind11;
using namespace py::literals;
namespace dsts::cpu {
void bind(py::module_& m);
}
namespace dsts::cuda {
void bind(py::module_& m);
}

namespace {

py::dict build_info() {
  std::vector<std::string> isas{"portable"};
#ifdef DSTS_HAVE_AVX2
  isas.emplace_back("avx2");
#endif
#ifdef DSTS_HAVE_AVX512
  isas.emplace_back("avx512");
#endif
#ifdef _OPENMP
  const bool openmp = true;
#else
  const bool openmp = false;
#endif
#ifdef DSTS_HAVE_CUDA
  const py::object cuda =
      py::dict("version"_a = DSTS_CUDA_VERSION, "targets"_a = std::vector<int>{DSTS_CUDA_TARGETS});
#else
  const py::object cuda = py::none();
#endif
  return py::dict("compiler"_a = DSTS_COMPILER, "version"_a = DSTS_COMPILER_VERSION, "isas"_a = isas,
                  "openmp"_a = openmp, "cuda"_a = cuda, "flags"_a = DSTS_FLAGS);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of dsts_kernels: those for the CPU here, those for CUDA in the submodule cuda.";
  dsts::cpu::bind(m);
  m.def("build_info", &build_info,
        "Compiler, its version and flags, instruction sets, OpenMP; CUDA toolkit and targets, or None.");
#ifdef DSTS_HAVE_CUDA
  py::module_ cuda = m.def_submodule("cuda", "CUDA kernels: see csrc/cuda/bindings.cpp.");
  dsts::cuda::bind(cuda);
#endif
}
