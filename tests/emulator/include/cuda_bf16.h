// Stands in for CUDA's header of this name: __nv_bfloat16 as a storage type with exact conversions.
#pragma once

#include "cuda_runtime.h"

namespace emulator {

inline float float_of_bfloat16(uint16_t b) { return bits_as<float>(uint32_t(b) << 16); }

// To nearest, ties to even; NaN stays NaN.
inline uint16_t bfloat16_of_float(float x) {
  const uint32_t u = bits_as<uint32_t>(x);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFFu;
  return uint16_t((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}

}  // namespace emulator

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) : bits(::emulator::bfloat16_of_float(x)) {}
  operator float() const { return ::emulator::float_of_bfloat16(bits); }
};
struct __align__(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
static_assert(sizeof(__nv_bfloat16) == 2 && __is_trivially_copyable(__nv_bfloat16));

inline float __bfloat162float(__nv_bfloat16 x) { return float(x); }
inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {float(v.x), float(v.y)}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  return ::emulator::bits_as<__nv_bfloat16>(bits);
}
