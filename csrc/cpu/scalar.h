// Element types of the kernels, their conversion to and from the accumulation type A, the dtype switch (from
// the table in dtypes.h) and the parallel loop. Everything is branch-free C++ that the compiler vectorises.
//
// This header and the kernels are compiled once for every instruction set. All of it has internal linkage,
// and no std:: template or inline function is called in those translation units: of a symbol with external
// linkage the linker keeps one copy, and the portable path could end up calling the AVX-512 one. `TileList` of
// winograd_tiles.h has external linkage: kernels read it in constant expressions only, which leave no code.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#  include <omp.h>
#endif

#include "cpu/common.h"

#define DSTS_INLINE inline __attribute__((always_inline))

namespace dsts::cpu::DSTS_ISA {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct Acc {
  using type = float;
};
template <>
struct Acc<double> {
  using type = double;
};
template <class T>
using acc_t = typename Acc<T>::type;

template <class T, class U>
constexpr bool same = false;
template <class T>
constexpr bool same<T, T> = true;

DSTS_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
DSTS_INLINE float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

DSTS_INLINE float load(float x) { return x; }
DSTS_INLINE double load(double x) { return x; }
DSTS_INLINE float load(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
// Normal numbers, Inf and NaN: shift the exponent so that one multiplication rebiases it. Subnormals: build
// 0.5 + value and take 0.5 away. Both are exact.
DSTS_INLINE float load(f16 x) {
  const uint32_t w = uint32_t(x.bits) << 16;
  const uint32_t twice = w + w;
  const float normal = float_of((twice >> 4) + (0xE0u << 23)) * 0x1p-112f;
  const float subnormal = float_of((twice >> 17) | (126u << 23)) - 0.5f;
  const uint32_t magnitude = twice < (1u << 27) ? bits_of(subnormal) : bits_of(normal);
  return float_of((w & 0x80000000u) | magnitude);
}

// Round to nearest, ties to even; NaN stays NaN.
DSTS_INLINE void store(float x, float* p) { *p = x; }
DSTS_INLINE void store(double x, double* p) { *p = x; }
DSTS_INLINE void store(float x, bf16* p) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const uint32_t nan = (u >> 16) | 0x40u;
  p->bits = uint16_t((u & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded);
}
// Scaling up and down lets the float adder overflow to Inf and round at half's last bit.
DSTS_INLINE void store(float x, f16* p) {
  const uint32_t w = bits_of(x);
  const uint32_t twice = w + w;
  const float base = (float_of(w & 0x7FFFFFFFu) * 0x1p+112f) * 0x1p-110f;
  const uint32_t exponent = twice & 0xFF000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const uint32_t sum = bits_of(float_of((bias >> 1) + 0x07800000u) + base);
  const uint32_t magnitude = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  p->bits = uint16_t((w >> 16 & 0x8000u) | (twice > 0xFF000000u ? 0x7E00u : magnitude));
}

// The value that memory would hold.
template <class T, class A>
DSTS_INLINE A rounded(A x) {
  T stored;
  store(x, &stored);
  return load(stored);
}

template <class T>
struct Tag {
  using type = T;
};

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// f(Tag<element type>). The binding has refused every code that is not in the table.
template <class F>
DSTS_INLINE Status with_dtype(DType dtype, F f) {
#define DSTS_CASE(name, constant, code, bytes, type)      \
  case constant:                                          \
    static_assert(sizeof(type) == bytes, "see dtypes.h"); \
    return f(Tag<type>{});
  switch (dtype) { DSTS_DTYPES(DSTS_CASE) }
#undef DSTS_CASE
  __builtin_trap();
}

// Likewise for kernels that compute in float: all dtypes but float64, which the binding has refused there.
template <class F>
DSTS_INLINE void with_float(DType dtype, F f) {
  with_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (same<acc_t<T>, float>)
      f(tag);
    else
      __builtin_trap();
    return Status::ok;
  });
}

// A pair of dtypes that is equal, or a narrower type with float32 as `wide`: f(Tag<narrow>, Tag<wide>).
template <class F>
DSTS_INLINE Status with_dtypes(DType narrow, DType wide, F f) {
  return with_dtype(narrow, [&](auto n) {
    if constexpr (sizeof(typename decltype(n)::type) < sizeof(float))
      if (wide == kFloat32) return f(n, Tag<float>{});
    return f(n, n);
  });
}

DSTS_INLINE int64_t sample_at(const Samples& samples, int64_t i) {
  return samples.index ? samples.index[i] : i;
}

constexpr int64_t kSerialElements = 32768;  // below this, waking threads costs more than it saves

// f(0) .. f(n - 1), each task touched by one thread. What a task computes never depends on `threads`.
template <class F>
void parallel_for(int64_t n, int64_t elements, int threads, F f) {
  (void)elements, (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && elements >= kSerialElements)
  for (int64_t i = 0; i < n; ++i) f(i);
}

// Which of the threads runs this task, from 0 on: for scratch memory of its own.
inline int worker() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

DSTS_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
DSTS_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int max_of(int a, int b) { return a > b ? a : b; }
DSTS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A piece of memory that a thread keeps for its next call of the same kernel: small calls would else get theirs
// from the system each time, page by page, which takes longer than what they do.
constexpr size_t kKeptBytes = size_t(1) << 20;
struct KeptMemory {
  void* data = nullptr;
  size_t bytes = 0;
  ~KeptMemory() { free(data); }
};
inline KeptMemory& kept_memory() {
  thread_local KeptMemory kept;
  return kept;
}

// Uninitialised scratch; ok() is false when memory ran out.
template <class T>
struct Scratch {
  explicit Scratch(int64_t n) : bytes(size_t(n > 0 ? n : 1) * sizeof(T)) {
    KeptMemory& kept = kept_memory();
    if (kept.data && kept.bytes >= bytes) {
      data = static_cast<T*>(kept.data), bytes = kept.bytes;
      kept.data = nullptr, kept.bytes = 0;
    } else {
      data = static_cast<T*>(malloc(bytes));
    }
  }
  ~Scratch() {
    KeptMemory& kept = kept_memory();
    if (data && bytes <= kKeptBytes && bytes > kept.bytes) {
      free(kept.data);
      kept.data = data, kept.bytes = bytes;
    } else {
      free(data);
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  bool ok() const { return data != nullptr; }
  T* data;

 private:
  size_t bytes;
};

}  // namespace
}  // namespace dsts::cpu::DSTS_ISA
