// Binds selftest.cu in the place of the project's kernels. Arrays come as addresses.
#include <pybind11/pybind11.h>

#include <type_traits>

#include "selftest.h"

namespace dsts::cuda {
namespace {

template <class T>
using Argument = std::conditional_t<std::is_pointer_v<T>, uintptr_t, T>;

template <class... T>
void def(pybind11::module_& m, const char* name, int (*function)(T...)) {
  m.def(
      name, [function](Argument<T>... a) { return function((T)a...); },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace

void bind(pybind11::module_& m);
void bind(pybind11::module_& m) {
  def(m, "block_sum", &selftest::block_sum);
  def(m, "warp_sum", &selftest::warp_sum);
  def(m, "last_block_sum", &selftest::last_block_sum);
  def(m, "double_buffer", &selftest::double_buffer);
  def(m, "product", &selftest::product);
  def(m, "quads", &selftest::quads);
  def(m, "matrices", &selftest::matrices);
  def(m, "fragment_product", &selftest::fragment_product);
  def(m, "divergent", &selftest::divergent);
  def(m, "round_trip", &selftest::round_trip);
  def(m, "misaligned_product", &selftest::misaligned_product);
  def(m, "bare", &selftest::bare);
  def(m, "barriers", &selftest::barriers);
}

}  // namespace dsts::cuda
