// How launchers launch: a kernel of one struct, on the caller's stream, the error raised if there is one; and
// which instance of a template a dtype takes.
#pragma once

#include "cuda/dtypes.h"

#ifndef __CUDACC_RTC__
#  include <cuda_bf16.h>
#  include <cuda_fp16.h>
#  include <cuda_runtime.h>

#  include <stdexcept>
#  include <string>

#  include "cuda/params.h"

namespace dsts::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or whoever asks next would be told of it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <class P>
void launch(void (*kernel)(P), dim3 grid, int threads, size_t smem_bytes, void* stream, const P& params) {
  if (smem_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(smem_bytes)),
          "shared memory");
  P copy = params;
  void* arguments[] = {&copy};
  check(cudaLaunchKernel(kernel, grid, dim3(static_cast<unsigned>(threads)), arguments, smem_bytes,
                         static_cast<cudaStream_t>(stream)),
        "launch");
}

// Calls `run` with an element of `dtype`.
template <class F>
void for_element(int dtype, F&& run) {
  switch (dtype) {
#  define CASE(code, name, T) \
    case code:                \
      return run(T{});
    DSTS_DTYPES(CASE)
#  undef CASE
  }
  throw std::invalid_argument("dtype is " + std::to_string(dtype) + ", which csrc/cuda/dtypes.h lacks");
}

inline int element_bytes(int dtype) {
  int bytes = 0;
  for_element(dtype, [&](auto element) { bytes = sizeof element; });
  return bytes;
}

template <class E>
struct Tag {
  using Type = E;
};

struct Tf32;

// Calls `run` with a tag of what multiplies elements of `dtype`.
template <class F>
void for_mma(int dtype, bool tf32, F&& run) {
  if (dtype == kFloat32 && tf32)
    run(Tag<Tf32>{});
  else
    for_element(dtype, [&](auto element) { run(Tag<decltype(element)>{}); });
}

}  // namespace dsts::cuda
#endif
