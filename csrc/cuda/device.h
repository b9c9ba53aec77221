// What kernels have in common: element types, positions and taps, arrivals at a counter, sums over a block.
// Device code only, and without the standard library, so that NVRTC compiles it too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/params.h"

#ifndef DSTS_DYNAMIC_SMEM  // tests run kernels on the CPU, where this is another kind of memory
#  define DSTS_DYNAMIC_SMEM(name) extern __shared__ __align__(128) unsigned char name[]
#endif

namespace dsts::cuda {

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float v) {
  return __float2bfloat16_rn(v);
}

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }

__host__ __device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ __forceinline__ int quotient(const FastDivmod& d, int n) {
  return static_cast<int>((__umulhi(static_cast<unsigned>(n), d.magic) + static_cast<unsigned>(n)) >>
                          d.shift);
}

// `base` and `times` times `elements` on, which fit 32 bits each. In a loop the product is taken where it is
// used: several of them, of 64 bits each, would take registers.
template <class T>
__device__ __forceinline__ const T* further(const T* base, unsigned elements, unsigned times) {
  unsigned bytes = elements * static_cast<unsigned>(sizeof(T));
#ifndef DSTS_NO_PTX
  asm volatile("" : "+r"(bytes));
#endif
  return reinterpret_cast<const T*>(reinterpret_cast<const unsigned char*>(base) +
                                    static_cast<unsigned long long>(bytes) * times);
}

// Neighbours that are read and written at once.
template <class T, int V>
struct __align__(V * sizeof(T)) Pack {
  T v[V];
};

struct Place {
  int t, h, w;
};

__device__ __forceinline__ Place place_of(const Extent& e, int position) {
  const int row = quotient(e.w_divmod, position), t = quotient(e.h_divmod, row);
  return {t, row - t * e.h, position - row * e.w};
}

__device__ __forceinline__ int64 offset_of(const Strides& s, const Place& p) {
  return p.t * s.t + p.h * s.h + p.w * s.w;
}

__device__ __forceinline__ bool inside(const Extent& e, int t, int h, int w) {
  return t >= 0 && t < e.t && h >= 0 && h < e.h && w >= 0 && w < e.w;
}

// One plan of many. An offset worked out in 32 bits takes fewer registers than one in 64.
__device__ __forceinline__ const Plan& plan_at(const Plan* plans, int number) {
  constexpr int kInts = sizeof(Plan) / sizeof(int);
  return *reinterpret_cast<const Plan*>(reinterpret_cast<const int*>(plans) + number * kInts);
}

// How far a tap of a zero-padded kernel reaches; sign -1 turns it round.
__device__ __forceinline__ Place reach(int tap, int kt, int kh, int kw, int sign) {
  const int row = tap / kw, t = row / kh;
  return {sign * (t - kt / 2), sign * (row - t * kh - kh / 2), sign * (tap - row * kw - kw / 2)};
}

// Whether tap `tap` of a 1x3x3 scoring kernel reads row h and column w for some output.
__device__ __forceinline__ bool tap_reads(int tap, int h, int w, const Extent& e) {
  const int i = tap / 3, j = tap - 3 * i;
  return !(i == 0 && h == e.h - 1) && !(i == 2 && h == 0) && !(j == 0 && w == e.w - 1) && !(j == 2 && w == 0);
}

// Counts this CTA in, after everything that any of its threads wrote; true for all threads of the CTA
// that makes `all` of them, which then may read what the others wrote. `is_last` is a shared int.
__device__ __forceinline__ bool last_to_arrive(int* counter, int all, int* is_last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *is_last = atomicAdd(counter, 1) == all - 1;
    __threadfence();
  }
  __syncthreads();
  return *is_last != 0;
}

__device__ __forceinline__ float warp_sum(float v) {
  for (int lane = 16; lane; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
  return v;
}

}  // namespace dsts::cuda
