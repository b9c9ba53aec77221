// What the bindings take from Python, and how they check it: addresses, sizes and strides of tensors, and
// where a call goes. An error names the kernel, the argument, what came and what was wanted.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.h"

namespace dsts::cuda {

using Address = std::uintptr_t;  // 0 is null
using Sizes3 = std::array<int, 3>;
using Strides5 = std::array<int64, 5>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Where a call goes: device, its compute capability times ten, stream.
struct Target {
  int device, capability;
  Address stream;
};

// The device is current while a launch is made, and the one before is current again afterwards.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice"), switched_ = true;
  }
  ~OnDevice() {
    if (switched_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool switched_ = false;
};

inline std::string text(const std::string& words) { return words; }
inline std::string text(int64 number) { return std::to_string(number); }

template <class... Pieces>
[[noreturn]] void fail(const char* kernel, const Pieces&... pieces) {
  throw std::invalid_argument(std::string("cuda.") + kernel + ": " + (text(pieces) + ...));
}

// "0 (float32), 2 (bfloat16) or 3 (float16)"
inline std::string dtype_codes() {
  std::vector<std::string> codes;
#define CODE(code, name, T) codes.push_back(std::to_string(code) + " (" name ")");
  DSTS_DTYPES(CODE)
#undef CODE
  std::string list = codes[0];
  for (size_t i = 1; i < codes.size(); ++i) list += (i + 1 < codes.size() ? ", " : " or ") + codes[i];
  return list;
}

inline void check_dtype(const char* kernel, const char* name, int dtype) {
#define CODE(code, name, T) \
  if (dtype == code) return;
  DSTS_DTYPES(CODE)
#undef CODE
  fail(kernel, name, " is ", dtype, "; wanted ", dtype_codes());
}

struct NamedSize {
  const char* name;
  int64 size;
};

inline void check_sizes(const char* kernel, std::initializer_list<NamedSize> sizes) {
  for (const auto& [name, size] : sizes)
    if (size < 1) fail(kernel, name, " is ", size, "; wanted 1 or more");
}

struct NamedAddress {
  const char* name;
  Address address;
};

inline void check_given(const char* kernel, std::initializer_list<NamedAddress> addresses) {
  for (const auto& [name, address] : addresses)
    if (address == 0) fail(kernel, name, " is null; wanted an address");
}

// Of a tap sum or a scoring kernel.
inline void check_taps(const char* kernel, int taps) {
  if (taps != 1 && taps != kMaxSumTaps) fail(kernel, "taps is ", taps, "; wanted 1 or ", kMaxSumTaps);
}

inline Extent extent(const char* kernel, const Sizes3& s) {
  check_sizes(kernel, {{"size[0]", s[0]}, {"size[1]", s[1]}, {"size[2]", s[2]}});
  if (static_cast<int64>(s[0]) * s[1] * s[2] >= (1ll << 31) - kTile)
    fail(kernel, "size is ", s[0], "x", s[1], "x", s[2], ", too many positions; wanted fewer than 2^31");
  return extent_of(s[0], s[1], s[2]);
}

inline Strides strides(const Strides5& s) { return {s[0], s[1], s[2], s[3], s[4]}; }

// Taps of a kernel that convolutions take: 1x1x1, 1x3x3, 3x1x1 and the like.
inline int taps_of(const char* kernel, const Sizes3& sides) {
  bool ok = true;
  for (const int side : sides) ok &= side == 1 || side == 3;
  const int taps = sides[0] * sides[1] * sides[2];
  if (!ok || taps > kSpatialTaps)
    fail(kernel, "the kernel is ", sides[0], "x", sides[1], "x", sides[2],
         "; wanted sides of 1 or 3 and at most ", kSpatialTaps, " taps");
  return taps;
}

}  // namespace dsts::cuda
