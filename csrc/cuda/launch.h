// How launchers launch: a kernel of one struct, on the caller's stream, the error raised if there is one.
// `DSTS_ELEMENTS` and `DSTS_ENGINES` name the instances of templates once.
#pragma once

#define DSTS_ELEMENTS(INSTANCE) \
  INSTANCE(float)               \
  INSTANCE(__half)              \
  INSTANCE(__nv_bfloat16)

#define DSTS_ENGINES(INSTANCE) DSTS_ELEMENTS(INSTANCE) INSTANCE(Tf32)

#ifndef __CUDACC_RTC__
#  include <cuda_bf16.h>
#  include <cuda_fp16.h>
#  include <cuda_runtime.h>

#  include <stdexcept>
#  include <string>

#  include "cuda/kernels.h"

namespace dsts::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or whoever asks next would be told of it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <class P>
void launch(void (*kernel)(P), dim3 grid, int threads, size_t shared, void* stream, const P& params) {
  if (shared > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
          "shared memory");
  P copy = params;
  void* arguments[] = {&copy};
  check(cudaLaunchKernel(kernel, grid, dim3(static_cast<unsigned>(threads)), arguments, shared,
                         static_cast<cudaStream_t>(stream)),
        "launch");
}

template <class F>
void for_element(int dtype, F&& run) {
  if (dtype == kFloat32)
    run(float{});
  else if (dtype == kFloat16)
    run(__half{});
  else
    run(__nv_bfloat16{});
}

template <class E>
struct Tag {
  using Type = E;
};

struct Tf32;

template <class F>
void for_engine(int dtype, bool tf32, F&& run) {
  if (dtype == kFloat32 && tf32)
    run(Tag<Tf32>{});
  else
    for_element(dtype, [&](auto element) { run(Tag<decltype(element)>{}); });
}

inline Divide divide_by(int divisor) {
  unsigned shift = 0;
  while ((1ull << shift) < static_cast<unsigned>(divisor)) ++shift;
  const unsigned long long one = 1, magic = ((one << 32) * ((one << shift) - divisor)) / divisor + 1;
  return {static_cast<unsigned>(divisor), static_cast<unsigned>(magic), shift};
}

inline Extent extent_of(int t, int h, int w) { return {t, h, w, t * h * w, divide_by(w), divide_by(h)}; }

}  // namespace dsts::cuda
#endif
