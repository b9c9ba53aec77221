// Python's arguments as the structs that the kernels take. A tensor is anything with data_ptr(), shape,
// stride() and dtype, so nothing here knows torch; a record is a NamedTuple, whose fields are read by name.
// What is read is checked before a kernel runs; the arguments keep their memory alive until it has.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>

#include "cpu/common.h"

namespace dsts::cpu {

// What a tensor holds: a code of the table in dtypes.h, or one of these.
enum Integer : int { kInt32 = 1000, kInt64, kBool };

constexpr int kMaxDimensions = 6, kAnyDimensions = -1;
constexpr int64_t kAnyChannel = INT32_MAX;  // a limit of lists that the caller vouches for

// A tensor; None has a null address and no dimensions.
struct Tensor {
  void* data = nullptr;
  int ndim = 0;
  int64_t sizes[kMaxDimensions] = {}, strides[kMaxDimensions] = {};
  int element = 0;  // DType or Integer

  bool given() const { return ndim > 0; }
  DType dtype() const { return static_cast<DType>(element); }
  int64_t elements() const;
  bool dense() const;  // row-major without gaps
};

// Reads and checks the arguments of one call; `op` begins every message.
class Arguments {
 public:
  explicit Arguments(const char* op) : op_(op) {}

  // Raises with a message of these parts, texts and numbers, put together only then.
  template <class... Parts>
  void require(bool ok, const Parts&... parts) const {
    if (!ok) fail((text(parts) + ...));
  }

  // A tensor of `ndim` dimensions, or of any number, in one of the dtypes of the table; `optional`: or None.
  Tensor tensor(const char* name, pybind11::handle value, int ndim, bool optional = false) const;
  // Likewise, row-major without gaps.
  Tensor dense(const char* name, pybind11::handle value, int ndim, bool optional = false) const;
  Tensor dense(const char* name, pybind11::handle value, int ndim, Integer kind) const = delete;
  // Likewise, of integers.
  Tensor integers(const char* name, pybind11::handle value, int ndim, Integer kind,
                  bool optional = false) const;

  Features features(const char* name, pybind11::handle value, bool optional = false) const;
  // Indices of samples of a batch; None is the whole of it.
  Samples samples(const char* name, pybind11::handle value, int64_t batch) const;
  // A list [count] of channels below `limit`, from element `start` on; None gives null.
  const int32_t* list(const char* name, pybind11::handle value, int64_t start, int64_t count,
                      int64_t limit) const;

  std::array<int64_t, 3> strides(const char* name, pybind11::handle value) const;
  int64_t integer(const char* name, pybind11::handle value, int64_t least) const;
  bool boolean(const char* name, pybind11::handle value) const;
  int threads(int count) const;

  void dtype_is(const char* name, DType dtype, DType wanted) const;
  void float_or_half(const char* name, DType dtype) const;
  // `wide` must be `narrow`, or float32 beside a half type.
  void dtype_pair(const char* narrow_name, DType narrow, const char* wide_name, DType wide) const;
  void size_is(const char* name, const char* dimension, int64_t size, int64_t wanted) const;
  void same_grid(const char* name, const Features& features, const Features& wanted) const;

  const char* op() const { return op_; }

 private:
  static std::string text(const std::string& part) { return part; }
  static std::string text(int64_t part) { return std::to_string(part); }
  [[noreturn]] void fail(const std::string& reason) const;
  Tensor read(const char* name, pybind11::handle value, int ndim, bool optional) const;
  int element_of(const char* name, pybind11::handle dtype) const;
  const char* op_;
};

// The items of a NamedTuple in the order of `names`. It must have exactly these fields, in any order: they
// are looked up once for every type of tuple.
class FieldNames {
 public:
  static constexpr int kMost = 16;

  template <size_t N>
  explicit FieldNames(const std::array<const char*, N>& names) : names_(names.data()), count_(N) {
    static_assert(N <= kMost);
  }

  template <size_t N>
  std::array<pybind11::handle, N> read(const Arguments& arguments, const char* name,
                                       pybind11::handle record) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(record.ptr())) != type_) find(arguments, name, record);
    std::array<pybind11::handle, N> items;
    for (size_t i = 0; i < N; ++i) items[i] = PyTuple_GET_ITEM(record.ptr(), index_[i]);
    return items;
  }

 private:
  void find(const Arguments& arguments, const char* name, pybind11::handle record);

  const char* const* names_;
  size_t count_;
  PyObject* type_ = nullptr;  // whose fields are at `index_`; kept alive
  Py_ssize_t index_[kMost];
};

inline DType accumulate_dtype(DType dtype) { return dtype == kFloat64 ? kFloat64 : kFloat32; }
const DTypeFacts& facts_of(DType dtype);
inline const char* name_of(DType dtype) { return facts_of(dtype).name; }
inline bool is_narrow(DType dtype) { return facts_of(dtype).bytes < 4; }  // storage, computed in float32

}  // namespace dsts::cpu
