// Transposition in registers: blocks of N x N lanes, N the vector width of the instruction set being
// compiled. A scalar transposition moves one element a cycle; this one about N, which is what lets layouts
// differ at close to copy speed. Lanes are float or double; 16-bit elements are widened on the way in and
// narrowed on the way out.
#pragma once

#if defined(__AVX512F__) || defined(__F16C__)
#  include <immintrin.h>
#endif

#include "cpu/scalar.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
struct Lanes {};
template <>
struct Lanes<float> {
  using lane = int32_t;
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t index __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Lanes<double> {
  using lane = int64_t;
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t index __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using lanes_t = typename Lanes<A>::type;
template <class A>
using index_t = typename Lanes<A>::lane;
template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));
using Vector = lanes_t<float>;
constexpr int kWide = kLanes<float>;

// Interleaves the low (kHalf = 0) or high (1) halves of a and b: a0 b0 a1 b1 ...
template <class A, int kHalf>
DSTS_INLINE lanes_t<A> zip(lanes_t<A> a, lanes_t<A> b) {
  constexpr int N = kLanes<A>, h = kHalf * N / 2;
#define DSTS_ZIP(i) h + (i) / 2 + ((i) % 2) * N
#ifdef __clang__
#  define DSTS_SHUFFLE(...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#  define DSTS_SHUFFLE(...) __builtin_shuffle(a, b, typename Lanes<A>::index{__VA_ARGS__})
#endif
  if constexpr (N == 2) {
    return DSTS_SHUFFLE(DSTS_ZIP(0), DSTS_ZIP(1));
  } else if constexpr (N == 4) {
    return DSTS_SHUFFLE(DSTS_ZIP(0), DSTS_ZIP(1), DSTS_ZIP(2), DSTS_ZIP(3));
  } else if constexpr (N == 8) {
    return DSTS_SHUFFLE(DSTS_ZIP(0), DSTS_ZIP(1), DSTS_ZIP(2), DSTS_ZIP(3), DSTS_ZIP(4), DSTS_ZIP(5),
                        DSTS_ZIP(6), DSTS_ZIP(7));
  } else {
    return DSTS_SHUFFLE(DSTS_ZIP(0), DSTS_ZIP(1), DSTS_ZIP(2), DSTS_ZIP(3), DSTS_ZIP(4), DSTS_ZIP(5),
                        DSTS_ZIP(6), DSTS_ZIP(7), DSTS_ZIP(8), DSTS_ZIP(9), DSTS_ZIP(10), DSTS_ZIP(11),
                        DSTS_ZIP(12), DSTS_ZIP(13), DSTS_ZIP(14), DSTS_ZIP(15));
  }
#undef DSTS_SHUFFLE
#undef DSTS_ZIP
}

// log2(N) perfect shuffles of the rows transpose the block.
template <class A>
DSTS_INLINE void transpose_block(lanes_t<A> (&r)[kLanes<A>]) {
  constexpr int N = kLanes<A>;
#pragma GCC unroll 4
  for (int stage = 1; stage < N; stage *= 2) {
    lanes_t<A> s[N];
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) {
      s[2 * i] = zip<A, 0>(r[i], r[i + N / 2]);
      s[2 * i + 1] = zip<A, 1>(r[i], r[i + N / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) r[i] = s[i];
  }
}

// Elements to lanes and back by value (load, store) or, kRaw, bit for bit.
template <class A, bool kRaw, class T>
DSTS_INLINE A lane_of(T x) {
  if constexpr (kRaw && sizeof(T) == 2)
    return float_of(x.bits);
  else
    return load(x);
}
template <bool kRaw, class A, class T>
DSTS_INLINE void put_lane(A x, T* to) {
  if constexpr (kRaw && sizeof(T) == 2)
    to->bits = uint16_t(bits_of(x));
  else
    store(x, to);
}

// A vector of half elements widened by the instructions for it, where there are any. (gcc 12 warns of the
// forms without a mask.)
#if defined(__AVX512F__)
constexpr bool kWidens = true;
DSTS_INLINE __m256i half_bits(const void* p) {
  __m256i half;
  memcpy(&half, p, sizeof half);
  return half;
}
DSTS_INLINE Vector widen(const f16* p) { return (Vector)_mm512_maskz_cvtph_ps(0xFFFF, half_bits(p)); }
DSTS_INLINE Vector widen(const bf16* p) {
  return (Vector)_mm512_maskz_slli_epi32(0xFFFF, _mm512_maskz_cvtepu16_epi32(0xFFFF, half_bits(p)), 16);
}
#elif defined(__AVX2__) && defined(__F16C__)
constexpr bool kWidens = true;
DSTS_INLINE __m128i half_bits(const void* p) {
  __m128i half;
  memcpy(&half, p, sizeof half);
  return half;
}
DSTS_INLINE Vector widen(const f16* p) { return (Vector)_mm256_cvtph_ps(half_bits(p)); }
DSTS_INLINE Vector widen(const bf16* p) {
  return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half_bits(p)), 16);
}
#else
constexpr bool kWidens = false;
DSTS_INLINE Vector widen(const void*) { return Vector{}; }
#endif

// The first n lanes from p. Reads a whole vector where memory is known to reach (up to `end`); the lanes past
// n are garbage that is never stored.
template <class A, bool kRaw, class T>
DSTS_INLINE lanes_t<A> load_lanes(const T* p, int64_t n, const T* end) {
  constexpr int N = kLanes<A>;
  lanes_t<A> v;
  if (n == N || end - p >= N) {
    if constexpr (same<A, T>) {
      memcpy(&v, p, sizeof v);
    } else if constexpr (kWidens && !kRaw && sizeof(T) == 2) {
      v = widen(p);
    } else {
      A lanes[N];
#pragma omp simd
      for (int i = 0; i < N; ++i) lanes[i] = lane_of<A, kRaw>(p[i]);
      memcpy(&v, lanes, sizeof v);
    }
  } else {
    A lanes[N] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = lane_of<A, kRaw>(p[i]);
    memcpy(&v, lanes, sizeof v);
  }
  return v;
}

template <class A, bool kRaw, class T>
DSTS_INLINE void store_lanes(lanes_t<A> v, T* p, int64_t n) {
  constexpr int N = kLanes<A>;
  if constexpr (same<A, T>) {
    if (n == N) {
      memcpy(p, &v, sizeof v);
      return;
    }
  }
  A lanes[N];
  memcpy(lanes, &v, sizeof v);
  if (n == N) {
#pragma omp simd
    for (int i = 0; i < N; ++i) put_lane<kRaw>(lanes[i], p + i);
  } else {
    for (int64_t i = 0; i < n; ++i) put_lane<kRaw>(lanes[i], p + i);
  }
}

// Transposes rows x cols: read(i, j, n) gives lanes j .. j + n - 1 of row i, write(j, i, n, v) takes lanes
// i .. i + n - 1 of the transposed row j. kRowsInner walks down the rows first: for whom the writes are the
// far side.
template <class A, bool kRowsInner, class Read, class Write>
DSTS_INLINE void transpose(int64_t rows, int64_t cols, Read read, Write write) {
  constexpr int N = kLanes<A>;
  const auto block_at = [&](int64_t i, int64_t j) {
    const int64_t nr = min64(N, rows - i), nc = min64(N, cols - j);
    lanes_t<A> block[N];
    if (nr == N) {
#pragma GCC unroll 16
      for (int k = 0; k < N; ++k) block[k] = read(i + k, j, nc);
    } else {
      for (int k = 0; k < N; ++k) block[k] = k < nr ? read(i + k, j, nc) : lanes_t<A>{};
    }
    transpose_block<A>(block);
    if (nr == N && nc == N) {
#pragma GCC unroll 16
      for (int k = 0; k < N; ++k) write(j + k, i, N, block[k]);
    } else {
      for (int64_t k = 0; k < nc; ++k) write(j + k, i, nr, block[k]);
    }
  };
  const int64_t outer = kRowsInner ? cols : rows, inner = kRowsInner ? rows : cols;
  for (int64_t a = 0; a < outer; a += N)
    for (int64_t b = 0; b < inner; b += N) block_at(kRowsInner ? b : a, kRowsInner ? a : b);
}

}  // namespace
}  // namespace dsts::cpu::DSTS_ISA
