// Stands in for CUDA's header of this name: the part of the language and of the runtime API that the
// project's kernels use, on top of the emulator.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))

#define DSTS_DYNAMIC_SMEM(name) unsigned char* name = ::emulator::dynamic_shared()

#define threadIdx (::emulator::current->thread_index)
#define blockIdx (::emulator::current->block_index)
#define blockDim (::emulator::current->block_size)
#define gridDim (::emulator::current->grid_size)
constexpr int warpSize = 32;

#define EMULATOR_AT_SITE(name, function, ...)                                       \
  __extension__({                                                                   \
    static ::emulator::Site emulator_site = {name, {__FILE__, __LINE__}, 0, false}; \
    ::emulator::function(&emulator_site __VA_OPT__(, ) __VA_ARGS__);                \
  })
#define __syncthreads() EMULATOR_AT_SITE("__syncthreads", block_barrier)
#define __syncwarp(...) EMULATOR_AT_SITE("__syncwarp", warp_barrier __VA_OPT__(, ) __VA_ARGS__)
#define __threadfence() EMULATOR_AT_SITE("__threadfence", fence)

// Vectors.
using uint3 = ::emulator::Index;
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
#define EMULATOR_VECTORS(type, name)                                         \
  struct __align__(2 * sizeof(type)) name##2 { type x, y; };                 \
  struct __align__(4 * sizeof(type)) name##4 { type x, y, z, w; };           \
  inline constexpr name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline constexpr name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATOR_VECTORS(int, int)
EMULATOR_VECTORS(unsigned, uint)
EMULATOR_VECTORS(float, float)
EMULATOR_VECTORS(unsigned short, ushort)
#undef EMULATOR_VECTORS

// Arithmetic.
#define EMULATOR_MINMAX(type)                                         \
  inline constexpr type min(type a, type b) { return b < a ? b : a; } \
  inline constexpr type max(type a, type b) { return a < b ? b : a; }
EMULATOR_MINMAX(int)
EMULATOR_MINMAX(unsigned)
EMULATOR_MINMAX(long)
EMULATOR_MINMAX(unsigned long)
EMULATOR_MINMAX(long long)
EMULATOR_MINMAX(unsigned long long)
#undef EMULATOR_MINMAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }

namespace emulator {
template <class To, class From>
To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}
}  // namespace emulator
inline int __float_as_int(float x) { return ::emulator::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return ::emulator::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return ::emulator::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return ::emulator::bits_as<float>(x); }

// Loads with a cache hint.
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}

// Warp operations. Lanes outside `width` groups read their own value, as on the device.
#define EMULATOR_SHUFFLE(type, name, source)                                                                \
  inline type name(unsigned mask, type value, int argument, int width = 32,                                 \
                   ::emulator::Place place = ::emulator::Place::here(__builtin_FILE(), __builtin_LINE())) { \
    const int lane = ::emulator::lane(), first = lane & ~(width - 1);                                       \
    const int from = source;                                                                                \
    const bool inside = from >= first && from < first + width;                                              \
    return ::emulator::bits_as<type>(::emulator::shuffle(#name, mask, ::emulator::bits_as<uint32_t>(value), \
                                                         inside ? from : lane, place));                     \
  }
#define EMULATOR_SHUFFLES(type)                                         \
  EMULATOR_SHUFFLE(type, __shfl_sync, first + (argument & (width - 1))) \
  EMULATOR_SHUFFLE(type, __shfl_xor_sync, lane ^ argument)              \
  EMULATOR_SHUFFLE(type, __shfl_down_sync, lane + argument)             \
  EMULATOR_SHUFFLE(type, __shfl_up_sync, lane - argument)
EMULATOR_SHUFFLES(int)
EMULATOR_SHUFFLES(unsigned)
EMULATOR_SHUFFLES(float)
#undef EMULATOR_SHUFFLES
#undef EMULATOR_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              ::emulator::Place place = {__builtin_FILE(), __builtin_LINE()}) {
  return ::emulator::vote("__ballot_sync", ::emulator::Vote::kBallot, mask, predicate != 0, place);
}
inline int __any_sync(unsigned mask, int predicate,
                      ::emulator::Place place = {__builtin_FILE(), __builtin_LINE()}) {
  return int(::emulator::vote("__any_sync", ::emulator::Vote::kAny, mask, predicate != 0, place));
}
inline int __all_sync(unsigned mask, int predicate,
                      ::emulator::Place place = {__builtin_FILE(), __builtin_LINE()}) {
  return int(::emulator::vote("__all_sync", ::emulator::Vote::kAll, mask, predicate != 0, place));
}

// Atomics: relaxed, as CUDA's are. A relaxed operation orders nothing for ThreadSanitizer but still races
// with plain accesses; the runtime adds the order that fences around it give.
namespace emulator {
template <class T, class F>
T atomically(T* p, F f) {
  before_atomic(p);
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, f(old), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  after_atomic();
  return old;
}
}  // namespace emulator
#define EMULATOR_ATOMIC(type, name, expression)                             \
  inline type name(type* p, type value) {                                   \
    return ::emulator::atomically(p, [&](type old) { return expression; }); \
  }
#define EMULATOR_ATOMICS(type)                                     \
  EMULATOR_ATOMIC(type, atomicAdd, static_cast<type>(old + value)) \
  EMULATOR_ATOMIC(type, atomicMax, max(old, value))                \
  EMULATOR_ATOMIC(type, atomicMin, min(old, value))                \
  EMULATOR_ATOMIC(type, atomicOr, static_cast<type>(old | value))  \
  EMULATOR_ATOMIC(type, atomicAnd, static_cast<type>(old & value)) \
  EMULATOR_ATOMIC(type, atomicExch, ((void)old, value))
EMULATOR_ATOMICS(int)
EMULATOR_ATOMICS(unsigned)
EMULATOR_ATOMICS(unsigned long long)
#undef EMULATOR_ATOMICS
#undef EMULATOR_ATOMIC

// Host API.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
using cudaStream_t = struct CUstream_st*;

namespace emulator {
inline thread_local cudaError_t last_error = cudaSuccess;
inline cudaError_t result(Error error) {
  const cudaError_t code = error == Error::kNone           ? cudaSuccess
                           : error == Error::kInvalidValue ? cudaErrorInvalidValue
                                                           : cudaErrorInvalidConfiguration;
  if (code != cudaSuccess) last_error = code;
  return code;
}
inline Index index_of(dim3 d) { return {d.x, d.y, d.z}; }
}  // namespace emulator

template <class P>
cudaError_t cudaLaunchKernel(void (*kernel)(P), dim3 grid, dim3 block, void** args, size_t shared_bytes = 0,
                             cudaStream_t = nullptr) {
  const ::emulator::Invoke invoke = [](const void* kernel, void* params) {
    reinterpret_cast<void (*)(P)>(const_cast<void*>(kernel))(*static_cast<P*>(params));
  };
  return ::emulator::result(::emulator::launch(reinterpret_cast<const void*>(kernel), invoke, args[0],
                                               ::emulator::index_of(grid), ::emulator::index_of(block),
                                               shared_bytes));
}
template <class P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P), cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  return ::emulator::result(::emulator::allow_shared(reinterpret_cast<const void*>(kernel), value));
}
inline cudaError_t cudaPeekAtLastError() { return ::emulator::last_error; }
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = ::emulator::last_error;
  ::emulator::last_error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    default:
      return "invalid configuration argument";
  }
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : ::emulator::result(::emulator::Error::kInvalidValue);
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t = nullptr) {
  return memset(p, value, bytes), cudaSuccess;
}
