// Improved SemHash gates: logits of each sample's neuron plus noise, hard or soft by sample; and their
// gradient, which adds a neuron's samples up in order. The maths is that of the CPU kernels, csrc/semhash.h.
// A neuron out of range shows as NaN.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "semhash.h"

namespace dsts::cuda {

constexpr int kSemhashThreads = 256;

template <class T>
__device__ __forceinline__ float noisy_logit(const SemhashParams& p, int b, int c) {
  int64 row = b;
  if (p.neuron) {
    row = p.neuron[b];
    if (row < 0 || row >= p.neurons) return not_a_number();
  }
  float q = to_float(static_cast<const T*>(p.logits)[row * p.channels + c]);
  if (p.noise) q += to_float(static_cast<const T*>(p.noise)[static_cast<int64>(b) * p.channels + c]);
  return q;
}

template <class T>
__global__ void __launch_bounds__(kSemhashThreads)
    semhash_forward_kernel(const __grid_constant__ SemhashParams p) {
  const int across = ceil_div(p.channels, kSemhashThreads);
  const int b = blockIdx.x / across, c = blockIdx.x % across * kSemhashThreads + threadIdx.x;
  if (c >= p.channels) return;
  const float q = noisy_logit<T>(p, b, c);
  float gate = p.hard && !p.hard[b] ? semhash_soft(q) : semhash_hard(q);
  if (p.neuron && q != q) gate = q;
  static_cast<T*>(p.out)[static_cast<int64>(b) * p.channels + c] = from_float<T>(gate);
}

template <class T>
__global__ void __launch_bounds__(kSemhashThreads)
    semhash_backward_kernel(const __grid_constant__ SemhashParams p) {
  const int across = ceil_div(p.channels, kSemhashThreads);
  const int n = blockIdx.x / across, c = blockIdx.x % across * kSemhashThreads + threadIdx.x;
  if (c >= p.channels) return;
  float total = 0;
  const int first = p.neuron ? 0 : n, last = p.neuron ? p.batch : n + 1;
  for (int b = first; b < last; ++b) {
    if (p.neuron && p.neuron[b] != n) continue;
    const float slope = semhash_slope(noisy_logit<T>(p, b, c));
    if (slope != 0)
      total += slope * to_float(static_cast<const T*>(p.grad)[static_cast<int64>(b) * p.channels + c]);
  }
  static_cast<T*>(p.out)[static_cast<int64>(n) * p.channels + c] = from_float<T>(total);
}

#define INSTANTIATE(code, name, T)                                                           \
  template __global__ void semhash_forward_kernel<T>(const __grid_constant__ SemhashParams); \
  template __global__ void semhash_backward_kernel<T>(const __grid_constant__ SemhashParams);
DSTS_DTYPES(INSTANTIATE)
#undef INSTANTIATE

#ifndef __CUDACC_RTC__
void semhash(const SemhashParams& p, bool backward, int dtype, void* stream) {
  const int rows = backward ? p.neurons : p.batch;
  const dim3 grid(static_cast<unsigned>(rows * ceil_div(p.channels, kSemhashThreads)));
  for_element(dtype, [&](auto element) {
    using T = decltype(element);
    launch(backward ? semhash_backward_kernel<T> : semhash_forward_kernel<T>, grid, kSemhashThreads, 0,
           stream, p);
  });
}
#endif

}  // namespace dsts::cuda
