// Stands in for libcuda.so.1: the functions that benchmarks/compiled/bare uses, on the CPU, with the
// convolution that the emulator runs behind cuLaunchKernel. With FAKE_DRIVER_IDLE set a launch does nothing.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/params.h"

namespace dsts::cuda {
template <class E, bool BY_K>
void conv_kernel(const ConvParams p);
extern template void conv_kernel<__half, true>(const ConvParams p);
}  // namespace dsts::cuda

namespace {

constexpr int kInvalidValue = 1, kNotFound = 500;
constexpr auto* kKernel = &dsts::cuda::conv_kernel<__half, true>;

// The chip: a V100 with three multiprocessors, so that few samples already share tiles.
int attribute_of(int number) {
  switch (number) {
    case 16:
      return 3;  // multiprocessors
    case 75:
      return 7;
    case 76:
      return 0;
    case 81:
      return 96 * 1024;  // shared memory of one
    default:
      return -1;
  }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int cuInit(unsigned) { return 0; }
EXPORT int cuGetErrorString(int error, const char** text) {
  *text = error == kNotFound ? "named symbol not found" : "invalid argument";
  return 0;
}
EXPORT int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}
EXPORT int cuDeviceGetName(char* name, int length, int) {
  strncpy(name, "emulator", static_cast<size_t>(length));
  return 0;
}
EXPORT int cuDeviceGetAttribute(int* value, int number, int) {
  *value = attribute_of(number);
  return *value < 0 ? kInvalidValue : 0;
}
EXPORT int cuCtxCreate_v2(void** context, unsigned, int) {
  *context = nullptr;
  return 0;
}
EXPORT int cuCtxSynchronize() { return 0; }

EXPORT int cuModuleLoadData(void** module, const void* image) {
  *module = nullptr;
  return image ? 0 : kInvalidValue;
}
EXPORT int cuModuleGetFunction(void** function, void*, const char* name) {
  if (strcmp(name, "_ZN4dsts4cuda11conv_kernelI6__halfLb1EEEvNS0_10ConvParamsE") != 0) return kNotFound;
  *function = reinterpret_cast<void*>(kKernel);
  return 0;
}
EXPORT int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (function != reinterpret_cast<void*>(kKernel) ||
      attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
    return kInvalidValue;
  return cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, value);
}

EXPORT int cuMemAlloc_v2(unsigned long long* address, size_t bytes) {
  *address = reinterpret_cast<unsigned long long>(aligned_alloc(256, (bytes + 255) / 256 * 256));
  return *address ? 0 : 2;
}
EXPORT int cuMemcpyHtoD_v2(unsigned long long to, const void* from, size_t bytes) {
  memcpy(reinterpret_cast<void*>(to), from, bytes);
  return 0;
}
EXPORT int cuMemcpyDtoH_v2(void* to, unsigned long long from, size_t bytes) {
  memcpy(to, reinterpret_cast<const void*>(from), bytes);
  return 0;
}
EXPORT int cuMemsetD8_v2(unsigned long long at, unsigned char value, size_t bytes) {
  memset(reinterpret_cast<void*>(at), value, bytes);
  return 0;
}

EXPORT int cuEventCreate(void** event, unsigned) {
  *event = nullptr;
  return 0;
}
EXPORT int cuEventRecord(void*, void*) { return 0; }
EXPORT int cuEventSynchronize(void*) { return 0; }
EXPORT int cuEventElapsedTime(float* milliseconds, void*, void*) {
  *milliseconds = 1;
  return 0;
}

EXPORT int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared_bytes, void*, void** parameters,
                          void** extra) {
  if (function != reinterpret_cast<void*>(kKernel) || extra) return kInvalidValue;
  if (getenv("FAKE_DRIVER_IDLE")) return 0;
  return cudaLaunchKernel(kKernel, dim3(grid_x, grid_y, grid_z), dim3(block_x, block_y, block_z), parameters,
                          shared_bytes);
}
