// The few functions of the CUDA driver that `bare` uses, declared here and found at run time: it builds
// without CUDA.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

namespace bare {

using Address = unsigned long long;  // CUdeviceptr
using Context = struct ContextObject*;
using Module = struct ModuleObject*;
using Function = struct FunctionObject*;
using Stream = struct StreamObject*;
using Event = struct EventObject*;

// CUdevice_attribute and CUfunction_attribute.
constexpr int kProcessors = 16, kMajor = 75, kMinor = 76, kSharedOfProcessor = 81;
constexpr int kMaxDynamicShared = 8;

#define DRIVER_FUNCTIONS(FUNCTION)                                                                       \
  FUNCTION(cuInit, (unsigned flags))                                                                     \
  FUNCTION(cuGetErrorString, (int error, const char** text))                                             \
  FUNCTION(cuDeviceGet, (int* device, int ordinal))                                                      \
  FUNCTION(cuDeviceGetName, (char* name, int length, int device))                                        \
  FUNCTION(cuDeviceGetAttribute, (int* value, int attribute, int device))                                \
  FUNCTION(cuCtxCreate_v2, (Context * context, unsigned flags, int device))                              \
  FUNCTION(cuCtxSynchronize, ())                                                                         \
  FUNCTION(cuModuleLoadData, (Module * module, const void* image))                                       \
  FUNCTION(cuModuleGetFunction, (Function * function, Module module, const char* name))                  \
  FUNCTION(cuFuncSetAttribute, (Function function, int attribute, int value))                            \
  FUNCTION(cuMemAlloc_v2, (Address * address, size_t bytes))                                             \
  FUNCTION(cuMemcpyHtoD_v2, (Address to, const void* from, size_t bytes))                                \
  FUNCTION(cuMemcpyDtoH_v2, (void* to, Address from, size_t bytes))                                      \
  FUNCTION(cuMemsetD8_v2, (Address at, unsigned char value, size_t bytes))                               \
  FUNCTION(cuEventCreate, (Event * event, unsigned flags))                                               \
  FUNCTION(cuEventRecord, (Event event, Stream stream))                                                  \
  FUNCTION(cuEventSynchronize, (Event event))                                                            \
  FUNCTION(cuEventElapsedTime, (float* milliseconds, Event start, Event end))                            \
  FUNCTION(cuLaunchKernel, (Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z,        \
                            unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes, \
                            Stream stream, void** parameters, void** extra))

class Driver {
 public:
  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) throw std::runtime_error(std::string("no CUDA driver: ") + dlerror());
#define FIND(name, parameters)                                       \
  name = reinterpret_cast<int(*) parameters>(dlsym(library, #name)); \
  if (!name) throw std::runtime_error("libcuda.so.1 has no " #name);
    DRIVER_FUNCTIONS(FIND)
#undef FIND
    check(cuInit(0), "cuInit");
    check(cuDeviceGet(&device_, 0), "cuDeviceGet");
    Context context;
    check(cuCtxCreate_v2(&context, 0, device_), "cuCtxCreate");
  }

#define MEMBER(name, parameters) int(*name) parameters;
  DRIVER_FUNCTIONS(MEMBER)
#undef MEMBER

  void check(int error, const char* what) const {
    if (error == 0) return;
    const char* text = nullptr;
    cuGetErrorString(error, &text);
    throw std::runtime_error(std::string(what) + ": error " + std::to_string(error) + (text ? ", " : "") +
                             (text ? text : ""));
  }

  std::string name() const {
    char text[256] = "";
    check(cuDeviceGetName(text, sizeof text, device_), "cuDeviceGetName");
    return text;
  }

  int attribute(int number) const {
    int value = 0;
    check(cuDeviceGetAttribute(&value, number, device_), "cuDeviceGetAttribute");
    return value;
  }

  // Memory is not freed: the process ends soon.
  Address allocate(size_t bytes, unsigned char value) const {
    Address at;
    check(cuMemAlloc_v2(&at, bytes), "cuMemAlloc");
    check(cuMemsetD8_v2(at, value, bytes), "cuMemsetD8");
    return at;
  }

  template <class T>
  T* upload(const std::vector<T>& values) const {
    const Address at = allocate(values.size() * sizeof(T), 0);
    check(cuMemcpyHtoD_v2(at, values.data(), values.size() * sizeof(T)), "cuMemcpyHtoD");
    return reinterpret_cast<T*>(at);
  }

 private:
  int device_ = 0;
};

}  // namespace bare
