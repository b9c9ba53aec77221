#include "cpu/arguments.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

namespace dsts::cpu {

namespace {

// Attributes of tensors, interned once: never freed, as modules are not.
struct AttributeNames {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
};

py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

int64_t as_int64(PyObject* number) {
  const long long value = PyLong_AsLongLong(number);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

std::string type_name(py::handle value) { return Py_TYPE(value.ptr())->tp_name; }

// The codes of dtypes, by their name after the last dot: "torch.float32".
int element_named(const std::string& name) {
  const std::string last = name.substr(name.rfind('.') + 1);
  for (const DTypeFacts& known : kDTypes)
    if (last == known.name) return known.dtype;
  return last == "int32" ? kInt32 : last == "int64" ? kInt64 : last == "bool" ? kBool : -1;
}

std::string wanted_dtypes() {
  std::string names;
  for (const DTypeFacts& known : kDTypes) names += (names.empty() ? "" : ", ") + std::string(known.name);
  return names;
}

std::string element_name(int element) {
  if (element == kInt32) return "int32";
  if (element == kInt64) return "int64";
  return element == kBool ? "bool" : name_of(static_cast<DType>(element));
}

}  // namespace

const DTypeFacts& facts_of(DType dtype) {
  for (const DTypeFacts& known : kDTypes)
    if (known.dtype == dtype) return known;
  throw std::logic_error("a dtype is not in the table");
}

int64_t Tensor::elements() const {
  int64_t n = given() ? 1 : 0;
  for (int i = 0; i < ndim; ++i) n *= sizes[i];
  return n;
}

bool Tensor::dense() const {
  int64_t stride = 1;
  if (elements() == 0) return true;
  for (int i = ndim - 1; i >= 0; stride *= sizes[i--])
    if (sizes[i] > 1 && strides[i] != stride) return false;
  return true;
}

void Arguments::fail(const std::string& reason) const {
  throw std::invalid_argument(std::string(op_) + ": " + reason);
}

int Arguments::element_of(const char* name, py::handle dtype) const {
  static std::vector<std::pair<PyObject*, int>> known;  // a handful of dtypes, each kept alive
  for (const auto& [object, element] : known)
    if (object == dtype.ptr()) return element;
  const std::string text = py::str(dtype);
  const int element = element_named(text);
  require(element >= 0, name, " has dtype ", text, "; wanted one of ", wanted_dtypes());
  known.emplace_back(dtype.inc_ref().ptr(), element);
  return element;
}

Tensor Arguments::read(const char* name, py::handle value, int ndim, bool optional) const {
  static const AttributeNames names;
  Tensor t;
  if (value.is_none()) {
    require(optional, name, " is None; wanted a tensor");
    return t;
  }
  const py::object shape = py::reinterpret_steal<py::object>(PyObject_GetAttr(value.ptr(), names.shape));
  if (!shape) {
    PyErr_Clear();
    throw py::type_error(std::string(op_) + ": " + name + " is a " + type_name(value) + "; wanted a tensor");
  }
  const py::object strides = checked(PyObject_CallMethodNoArgs(value.ptr(), names.stride));
  if (!PyTuple_Check(shape.ptr()) || !PyTuple_Check(strides.ptr()))
    throw py::type_error(std::string(op_) + ": " + name + " is a " + type_name(value) + "; wanted a tensor");
  const Py_ssize_t dimensions = PyTuple_GET_SIZE(shape.ptr());
  const bool counted = dimensions == PyTuple_GET_SIZE(strides.ptr()) && dimensions <= kMaxDimensions;
  if (ndim == kAnyDimensions)
    require(counted && dimensions >= 1, name, " has ", dimensions, " dimensions; wanted 1 to ",
            kMaxDimensions);
  else
    require(counted && dimensions == ndim, name, " has ", dimensions, " dimensions; wanted ", ndim);
  t.ndim = static_cast<int>(dimensions);
  for (int i = 0; i < t.ndim; ++i) {
    t.sizes[i] = as_int64(PyTuple_GET_ITEM(shape.ptr(), i));
    t.strides[i] = as_int64(PyTuple_GET_ITEM(strides.ptr(), i));
    if (t.strides[i] < 0) require(false, name, " has a negative stride; wanted strides >= 0");
  }
  t.element = element_of(name, checked(PyObject_GetAttr(value.ptr(), names.dtype)));
  const py::object address = checked(PyObject_CallMethodNoArgs(value.ptr(), names.data_ptr));
  t.data = PyLong_AsVoidPtr(address.ptr());
  if (!t.data && PyErr_Occurred()) throw py::error_already_set();
  if (!t.data) require(t.elements() == 0, name, " has no memory");
  return t;
}

Tensor Arguments::tensor(const char* name, py::handle value, int ndim, bool optional) const {
  const Tensor t = read(name, value, ndim, optional);
  if (t.element >= kInt32)
    require(false, name, " has dtype ", element_name(t.element), "; wanted one of ", wanted_dtypes());
  return t;
}

Tensor Arguments::dense(const char* name, py::handle value, int ndim, bool optional) const {
  const Tensor t = tensor(name, value, ndim, optional);
  require(t.dense(), name, " has gaps; wanted a contiguous tensor");
  return t;
}

Tensor Arguments::integers(const char* name, py::handle value, int ndim, Integer kind, bool optional) const {
  const Tensor t = read(name, value, ndim, optional);
  require(t.dense(), name, " has gaps; wanted a contiguous tensor");
  if (t.given() && t.element != kind)
    require(false, name, " has dtype ", element_name(t.element), "; wanted ", element_name(kind));
  return t;
}

Features Arguments::features(const char* name, py::handle value, bool optional) const {
  const Tensor t = tensor(name, value, 5, optional);
  const int64_t *n = t.sizes, *s = t.strides;
  return {t.data, n[0], n[1], n[2], n[3], n[4], {s[0], s[1], s[2], s[3], s[4]}, t.dtype()};
}

Samples Arguments::samples(const char* name, py::handle value, int64_t batch) const {
  const Tensor t = integers(name, value, 1, kInt64, true);
  if (!t.given()) return {nullptr, batch};
  const int64_t* index = static_cast<const int64_t*>(t.data);
  for (int64_t i = 0; i < t.sizes[0]; ++i)
    if (index[i] < 0 || index[i] >= batch)
      require(false, name, " holds ", index[i], "; wanted 0 <= sample < ", batch);
  return {index, t.sizes[0]};
}

const int32_t* Arguments::list(const char* name, py::handle value, int64_t start, int64_t count,
                               int64_t limit) const {
  if (value.is_none()) return nullptr;
  const Tensor t = integers(name, value, kAnyDimensions, kInt32);
  if (start < 0 || start + count > t.elements())
    require(false, name, " has ", t.elements(), " channels; wanted ", count, " from ", start, " on");
  const int32_t* listed = static_cast<const int32_t*>(t.data) + start;
  for (int64_t i = 0; i < count; ++i)
    if (listed[i] < 0 || listed[i] >= limit)
      require(false, name, " lists channel ", listed[i], "; wanted 0 <= channel < ", limit);
  return listed;
}

std::array<int64_t, 3> Arguments::strides(const char* name, py::handle value) const {
  if (!PyTuple_Check(value.ptr()) || PyTuple_GET_SIZE(value.ptr()) != 3)
    throw py::type_error(std::string(op_) + ": " + name + " is a " + type_name(value) +
                         "; wanted a tuple of three");
  std::array<int64_t, 3> strides;
  for (int i = 0; i < 3; ++i) strides[i] = as_int64(PyTuple_GET_ITEM(value.ptr(), i));
  return strides;
}

int64_t Arguments::integer(const char* name, py::handle value, int64_t least) const {
  const int64_t n = as_int64(value.ptr());
  if (n < least) require(false, name, " is ", n, "; wanted ", least, " or more");
  return n;
}

bool Arguments::boolean(const char* name, py::handle value) const {
  if (!PyBool_Check(value.ptr()))
    throw py::type_error(std::string(op_) + ": " + name + " is a " + type_name(value) + "; wanted a bool");
  return value.ptr() == Py_True;
}

int Arguments::threads(int count) const {
  require(count >= 1, "threads is ", count, "; wanted 1 or more");
  return count;
}

void Arguments::dtype_is(const char* name, DType dtype, DType wanted) const {
  if (dtype != wanted) require(false, name, " has dtype ", name_of(dtype), "; wanted ", name_of(wanted));
}

void Arguments::float_or_half(const char* name, DType dtype) const {
  if (dtype == kFloat64) require(false, name, " has dtype float64; wanted float32 or a half type");
}

void Arguments::dtype_pair(const char* narrow_name, DType narrow, const char* wide_name, DType wide) const {
  if (wide != narrow && !(wide == kFloat32 && is_narrow(narrow)))
    require(false, wide_name, " has dtype ", name_of(wide), "; wanted that of ", narrow_name, " (",
            name_of(narrow), ")", (is_narrow(narrow) ? " or float32" : ""));
}

void Arguments::size_is(const char* name, const char* dimension, int64_t size, int64_t wanted) const {
  if (size != wanted) require(false, name, " has ", dimension, " = ", size, "; wanted ", wanted);
}

void Arguments::same_grid(const char* name, const Features& features, const Features& wanted) const {
  size_is(name, "T", features.T, wanted.T);
  size_is(name, "H", features.H, wanted.H);
  size_is(name, "W", features.W, wanted.W);
}

void FieldNames::find(const Arguments& arguments, const char* name, py::handle record) {
  std::string wanted;
  for (size_t i = 0; i < count_; ++i) wanted += (i ? ", " : "") + std::string(names_[i]);
  const bool named = PyTuple_Check(record.ptr()) && py::hasattr(record, "_fields");
  if (!named)
    throw py::type_error(std::string(arguments.op()) + ": " + name + " is a " + type_name(record) +
                         "; wanted a NamedTuple of " + wanted);
  const py::tuple fields = record.attr("_fields");
  bool same = fields.size() == count_;
  Py_ssize_t index[kMost];
  for (size_t i = 0; i < count_ && same; ++i) {
    const int contained = PySequence_Contains(fields.ptr(), py::str(names_[i]).ptr());
    same = contained == 1;
    if (same) index[i] = PySequence_Index(fields.ptr(), py::str(names_[i]).ptr());
  }
  arguments.require(same, name, " has fields ", std::string(py::str(static_cast<py::handle>(fields))),
                    "; wanted ", wanted);
  std::copy_n(index, count_, index_);  // not before: the last type's are in use until then
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(record.ptr()));
  Py_INCREF(type);
  Py_XDECREF(type_);
  type_ = type;
}

}  // namespace dsts::cpu
