// What the bindings take from Python: arguments by keyword, each asked for by its name and checked. An error
// names the kernel, the argument, what came and what was wanted.
//
// A launch has up to 34 arguments and takes a few microseconds on the host, so these do not go through
// pybind11's own keywords, which cost 0.2 microseconds each: the caller's keywords are read in its order.
#pragma once

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.h"

namespace dsts::cuda {

namespace py = pybind11;

// Where a call goes: device, its compute capability times ten, stream.
struct Target {
  int device, capability;
  std::uintptr_t stream;
};

// The device is current while a launch is made, and the one before is current again afterwards.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice"), switched_ = true;
  }
  ~OnDevice() {
    if (switched_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool switched_ = false;
};

// "0 (float32), 2 (bfloat16) or 3 (float16)"
inline std::string dtype_codes() {
  std::vector<std::string> codes;
#define CODE(code, name, T) codes.push_back(std::to_string(code) + " (" name ")");
  DSTS_DTYPES(CODE)
#undef CODE
  std::string list = codes[0];
  for (size_t i = 1; i < codes.size(); ++i) list += (i + 1 < codes.size() ? ", " : " or ") + codes[i];
  return list;
}

class Call {
 public:
  Call(const char* kernel, PyObject* const* values, Py_ssize_t positional, PyObject* names)
      : kernel_(kernel), values_(values), names_(names), count_(names ? PyTuple_GET_SIZE(names) : 0) {
    if (positional)
      throw py::type_error(std::string("cuda.") + kernel + ": wanted its arguments by keyword only");
  }

  template <class... Pieces>
  [[noreturn]] void fail(const Pieces&... pieces) const {
    throw std::invalid_argument(std::string("cuda.") + kernel_ + ": " + (text(pieces) + ...));
  }

  int64 integer(const char* name) {
    const int64 value = PyLong_AsLongLong(find(name));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  int number(const char* name) {
    const int64 value = integer(name);
    if (value != static_cast<int>(value)) fail(name, " is ", value, "; wanted 32 bits");
    return static_cast<int>(value);
  }
  int size(const char* name) {
    const int value = number(name);
    if (value < 1) fail(name, " is ", value, "; wanted 1 or more");
    return value;
  }
  bool flag(const char* name) { return integer(name) != 0; }
  float real(const char* name) {
    const double value = PyFloat_AsDouble(find(name));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return static_cast<float>(value);
  }
  std::string word(const char* name) { return py::cast<std::string>(py::handle(find(name))); }
  Target target(const char* name) { return py::cast<Target>(py::handle(find(name))); }

  // An address, 0 is null.
  template <class T>
  T* optional(const char* name) {
    const unsigned long long address = PyLong_AsUnsignedLongLong(find(name));
    if (address == ~0ull && PyErr_Occurred()) throw py::error_already_set();
    return reinterpret_cast<T*>(static_cast<std::uintptr_t>(address));
  }
  template <class T>
  T* given(const char* name) {
    T* address = optional<T>(name);
    if (!address) fail(name, " is null; wanted an address");
    return address;
  }

  int dtype(const char* name) {
    const int value = number(name);
#define CODE(code, name, T) \
  if (value == code) return value;
    DSTS_DTYPES(CODE)
#undef CODE
    fail(name, " is ", value, "; wanted ", dtype_codes());
  }
  // Of tap sums, and of a scoring kernel.
  int taps(const char* name) {
    const int value = number(name);
    if (value != 1 && value != kMaxSumTaps) fail(name, " is ", value, "; wanted 1 or ", kMaxSumTaps);
    return value;
  }

  Extent extent(const char* name) {
    const auto s = integers<3>(name);
    for (int i = 0; i < 3; ++i)
      if (s[i] < 1) fail(name, "[", i, "] is ", s[i], "; wanted 1 or more");
    constexpr int64 most = (1ll << 31) - kTile;
    if (s[0] >= most || s[1] >= most || s[2] >= most || s[0] * s[1] >= most || s[0] * s[1] * s[2] >= most)
      fail(name, " is ", s[0], "x", s[1], "x", s[2], ", too many positions; wanted fewer than 2^31");
    return extent_of(static_cast<int>(s[0]), static_cast<int>(s[1]), static_cast<int>(s[2]));
  }
  Strides strides(const char* name) {
    const auto s = integers<5>(name);
    return {s[0], s[1], s[2], s[3], s[4]};
  }
  // Sides of a kernel that convolutions take: 1x1x1, 1x3x3, 3x1x1 and the like.
  std::array<int, 3> sides(const char* name) {
    const auto s = integers<3>(name);
    bool ok = true;
    for (const int64 side : s) ok &= side == 1 || side == 3;
    if (!ok || s[0] * s[1] * s[2] > kSpatialTaps)
      fail(name, " is ", s[0], "x", s[1], "x", s[2], "; wanted sides of 1 or 3 and at most ", kSpatialTaps,
           " taps");
    return {static_cast<int>(s[0]), static_cast<int>(s[1]), static_cast<int>(s[2])};
  }

  // After all arguments: launches on the target.
  template <class Launch>
  void launch(const Launch& on_stream) {
    const Target to = target("target");
    if (asked_ != count_) fail("got ", count_, " arguments, wanted ", asked_);
    const py::gil_scoped_release unlocked;
    const OnDevice guard(to.device);
    on_stream(to, reinterpret_cast<void*>(to.stream));
  }

 private:
  static std::string text(const std::string& words) { return words; }
  static std::string text(int64 number) { return std::to_string(number); }

  bool is(Py_ssize_t i, const char* name) const {
    const char* word = PyUnicode_AsUTF8(PyTuple_GET_ITEM(names_, i));
    return word && std::strcmp(word, name) == 0;
  }

  // At once where the caller's order is that of the questions, else after a search.
  PyObject* find(const char* name) {
    ++asked_;
    for (Py_ssize_t i = 0; i < count_; ++i) {
      const Py_ssize_t at = next_ + i < count_ ? next_ + i : next_ + i - count_;
      if (!is(at, name)) continue;
      next_ = at + 1;
      return values_[at];
    }
    throw py::type_error(std::string("cuda.") + kernel_ + ": " + name + " is missing");
  }

  template <size_t N>
  std::array<int64, N> integers(const char* name) {
    const py::object items =
        py::reinterpret_steal<py::object>(PySequence_Fast(find(name), "wanted a sequence of integers"));
    if (!items) throw py::error_already_set();
    if (PySequence_Fast_GET_SIZE(items.ptr()) != static_cast<Py_ssize_t>(N))
      fail(name, " has ", PySequence_Fast_GET_SIZE(items.ptr()), " numbers; wanted ", static_cast<int64>(N));
    std::array<int64, N> numbers;
    for (size_t i = 0; i < N; ++i) {
      numbers[i] = PyLong_AsLongLong(PySequence_Fast_GET_ITEM(items.ptr(), static_cast<Py_ssize_t>(i)));
      if (numbers[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
    }
    return numbers;
  }

  const char* kernel_;
  PyObject* const* values_;
  PyObject* names_;
  Py_ssize_t count_, asked_ = 0, next_ = 0;
};

// A function of the module that hands its call to RUN.
template <void (*RUN)(Call&)>
class Function {
 public:
  static void define(py::module_& m, const char* name) {
    method_.ml_name = name;
    const auto entry = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call));
    method_.ml_meth = entry, method_.ml_flags = METH_FASTCALL | METH_KEYWORDS;
    m.add_object(name, py::reinterpret_steal<py::object>(PyCFunction_New(&method_, nullptr)));
  }

 private:
  static PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
    try {
      Call arguments(method_.ml_name, values, positional, names);
      RUN(arguments);
      Py_RETURN_NONE;
    } catch (py::error_already_set& error) {
      error.restore();
    } catch (const py::builtin_exception& error) {
      error.set_error();
    } catch (const std::invalid_argument& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }

  static inline PyMethodDef method_{};
};

}  // namespace dsts::cuda
