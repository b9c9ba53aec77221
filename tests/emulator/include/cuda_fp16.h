// Stands in for CUDA's header of this name: __half as a storage type with exact conversions.
#pragma once

#include "cuda_runtime.h"

namespace emulator {

inline float float_of_half(uint16_t h) {
  const uint32_t w = uint32_t(h) << 16, twice = w + w;
  // Normal numbers, Inf and NaN: move the exponent so that one multiplication rebiases it. Subnormals:
  // build 0.5 + value and take 0.5 away. Both are exact.
  const float normal = bits_as<float>((twice >> 4) + (0xE0u << 23)) * 0x1p-112f;
  const float subnormal = bits_as<float>((twice >> 17) | (126u << 23)) - 0.5f;
  const uint32_t magnitude = bits_as<uint32_t>(twice < (1u << 27) ? subnormal : normal);
  return bits_as<float>((w & 0x80000000u) | magnitude);
}

// To nearest, ties to even: the float adder overflows to Inf and rounds at half's last bit.
inline uint16_t half_of_float(float x) {
  const uint32_t w = bits_as<uint32_t>(x), twice = w + w;
  const float base = (bits_as<float>(w & 0x7FFFFFFFu) * 0x1p+112f) * 0x1p-110f;
  const uint32_t exponent = twice & 0xFF000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const uint32_t sum = bits_as<uint32_t>(bits_as<float>((bias >> 1) + 0x07800000u) + base);
  const uint32_t magnitude = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  return uint16_t((w >> 16 & 0x8000u) | (twice > 0xFF000000u ? 0x7E00u : magnitude));
}

}  // namespace emulator

struct __half {
  uint16_t bits;
  __half() = default;
  __half(float x) : bits(::emulator::half_of_float(x)) {}
  operator float() const { return ::emulator::float_of_half(bits); }
};
using half = __half;
struct __align__(4) __half2 {
  __half x, y;
};
using half2 = __half2;
static_assert(sizeof(__half) == 2 && __is_trivially_copyable(__half));

inline float __half2float(__half x) { return float(x); }
inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float2 __half22float2(__half2 v) { return {float(v.x), float(v.y)}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return ::emulator::bits_as<__half>(bits); }
