// Picking listed channels out of a channels-last row, and putting them back, a vector at a time. The lists
// are fixed for many rows, so they are turned once into windows of N consecutive elements, each with the
// lane that every wanted element sits in; a row then costs one load, one lane permutation and one store a
// window. Ascending lists give full windows; any order is right. Compilers without a variable shuffle pick
// element by element.
#pragma once

#include "cpu/transpose.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

// The portable baseline has no lane permutation either.
#if defined(__AVX2__) && !defined(__clang__)
constexpr bool kHasPermute = true;
#else
constexpr bool kHasPermute = false;
#endif

template <class A>
DSTS_INLINE lanes_t<A> permute(lanes_t<A> v, typename Lanes<A>::index lane) {
#ifdef __clang__
  lanes_t<A> r;
  for (int i = 0; i < kLanes<A>; ++i) r[i] = v[lane[i]];
  return r;
#else
  return __builtin_shuffle(v, lane);
#endif
}

// out[j] = row[offset[j]] for j < n <= kMax. Rows must reach over N elements; `scale` is read N past n.
template <class A, int kMax>
struct Pick {
  static constexpr int N = kLanes<A>;
  int64_t windows = 0;
  int64_t start[kMax];
  int32_t first[kMax];  // the first j of each
  typename Lanes<A>::index lane[kMax];

  // Elements of the row up to and including `last` may be read.
  void prepare(const int64_t* offset, int64_t n, int64_t last) {
    windows = 0;
    for (int64_t j = 0; j < n;) {
      const int64_t base = max64(0, min64(offset[j], last + 1 - N));
      int64_t k = 0;
      index_t<A> index[N] = {};  // an array: lanes of a vector variable are slow to write one by one
      for (; k < N && j + k < n && offset[j + k] >= base && offset[j + k] < base + N; ++k)
        index[k] = index_t<A>(offset[j + k] - base);
      start[windows] = base;
      first[windows] = int32_t(j);
      memcpy(&lane[windows++], index, sizeof index);
      j += k;
    }
  }

  // Each window stores a whole vector: the next one overwrites its surplus, and near the end only n are
  // stored, unless with kSpare `out` has room for another vector there.
  template <bool kRaw, bool kScaled, bool kSpare = false, class T, class U>
  void run(const T* row, const T* end, const A* scale, int64_t n, U* out) const {
    for (int64_t g = 0; g < windows; ++g) {
      const int64_t j = first[g];
      lanes_t<A> v = permute<A>(load_lanes<A, kRaw>(row + start[g], N, end), lane[g]);
      if constexpr (kScaled) {
        lanes_t<A> s;
        memcpy(&s, scale + j, sizeof s);
        v *= s;
      }
      store_lanes<A, kRaw>(v, out + j, kSpare ? N : min64(N, n - j));
    }
  }
};

// value[c] = row[pos[c]] for channels with pos[c] >= 0, the others 0; c < n <= kMax (a multiple of N).
template <class A, int kMax>
struct Place {
  static constexpr int N = kLanes<A>;
  using Index = typename Lanes<A>::index;
  int64_t windows = 0, singles = 0;
  int64_t start[kMax / N];
  int32_t first[kMax / N];
  Index lane[kMax / N], mask[kMax / N];
  int32_t column[kMax], channel[kMax];
  A value[kMax];

  // The row has `columns` elements.
  void prepare(const int32_t* pos, int64_t n, int64_t columns) {
    windows = singles = 0;
    for (int64_t c = 0; c < ceil_div(n, N) * N; ++c) value[c] = 0;
    for (int64_t c = 0; c < n; c += N) {
      const int64_t m = min64(N, n - c);
      int64_t low = columns, high = -1;
      for (int64_t k = 0; k < m; ++k) {
        if (columns == 0 || pos[c + k] < 0) continue;
        low = min64(low, pos[c + k]);
        high = max64(high, pos[c + k]);
      }
      if (high < 0) continue;
      const int64_t base = min64(low, columns - N);
      if (!kHasPermute || columns < N || high - base >= N) {
        for (int64_t k = 0; k < m; ++k)
          if (pos[c + k] >= 0) column[singles] = pos[c + k], channel[singles++] = int32_t(c + k);
        continue;
      }
      index_t<A> index[N] = {}, listed[N] = {};
      for (int64_t k = 0; k < m; ++k)
        if (pos[c + k] >= 0) index[k] = index_t<A>(pos[c + k] - base), listed[k] = -1;
      start[windows] = base;
      first[windows] = int32_t(c);
      memcpy(&lane[windows], index, sizeof index);
      memcpy(&mask[windows++], listed, sizeof listed);
    }
  }

  template <class T>
  const A* run(const T* row) {
    for (int64_t g = 0; g < windows; ++g) {
      const lanes_t<A> v = permute<A>(load_lanes<A, false>(row + start[g], N, row), lane[g]);
      const lanes_t<A> kept = (lanes_t<A>)((Index)v & mask[g]);
      memcpy(value + first[g], &kept, sizeof kept);
    }
    for (int64_t k = 0; k < singles; ++k) value[channel[k]] = load(row[column[k]]);
    return value;
  }
};

}  // namespace
}  // namespace dsts::cpu::DSTS_ISA
