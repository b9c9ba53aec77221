// The end of a convolution, shared by the kernels that have one: sum of operators, bias, ReLU, skip
// connection, rounding, tap sums and the store, a tile of positions x channels at a time, in any layout. What
// a kernel supplies is where the rows of its result lie.
#pragma once

#include "cpu/epilogue.h"
#include "cpu/tile.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

// One row of n channels: v = z1 (+ z2) + bias, not below `floor` (NaN stays NaN), + skip; stored to `to`, and
// as stored (in U) added to `sum`. Rows that are absent are compiled out: this loop is where the time goes.
template <class U, bool kTwo, bool kSkip, bool kSum, class A, class T, class S, class D>
void finish_row(const T* z1, const T* z2, const A* bias, A floor, const S* skip, int64_t n, D* to, A* sum) {
#pragma omp simd
  for (int64_t o = 0; o < n; ++o) {
    A v = load(z1[o]);
    if constexpr (kTwo) v += load(z2[o]);
    v += bias[o];
    v = v < floor ? floor : v;
    if constexpr (kSkip) v += load(skip[o]);
    store(v, to + o);
    if constexpr (kSum) sum[o] += rounded<U>(v);
  }
}

template <class U, class A, class T, class S, class D>
void finish_row(const T* z1, const T* z2, const A* bias, A floor, const S* skip, int64_t n, D* to, A* sum) {
  const auto with_sum = [&](auto two, auto skipped) {
    constexpr bool kTwo = decltype(two)::value, kSkip = decltype(skipped)::value;
    sum ? finish_row<U, kTwo, kSkip, true>(z1, z2, bias, floor, skip, n, to, sum)
        : finish_row<U, kTwo, kSkip, false>(z1, z2, bias, floor, skip, n, to, sum);
  };
  const auto with_skip = [&](auto two) { skip ? with_sum(two, Flag<true>{}) : with_sum(two, Flag<false>{}); };
  z2 ? with_skip(Flag<true>{}) : with_skip(Flag<false>{});
}

// One sample's view of an Epilogue's arguments.
template <class A, class U>
struct Target {
  const A* bias;
  const U* skip;
  U* out;

  Target(const Epilogue& a, int64_t i) {
    const int64_t s = a.samples ? a.samples[i] : i;
    bias = a.bias ? static_cast<const A*>(a.bias) + s * a.bias_stride_b : nullptr;
    skip = a.skip ? static_cast<const U*>(a.skip) + s * a.skip_strides.b : nullptr;
    out = static_cast<U*>(a.out) + s * a.out_strides.b;
  }
};

// Where np positions lie in out and skip, whether as runs of consecutive elements, and their sum classes.
struct Positions {
  int64_t np;
  int64_t out_off[kTilePositions], skip_off[kTilePositions], cls[kTilePositions];
  bool out_run, skip_run;
};

// Channels are innermost on both sides: no tile is transposed.
inline bool finishes_rows(const Epilogue& a) {
  return a.out_strides.c == 1 && (!a.skip || a.skip_strides.c == 1);
}

// Channels [c0, c0 + nc) of a tile; nc <= kTileChannels unless finishes_rows, then <= kRowChannels. z(p) is
// the tile's row p from channel c0 on, and z2(p) one to add to it or null. sums: class sums [class][O], or
// null.
template <class A, class U, class Z, class Z2>
void finish_tile(const Epilogue& a, const Target<A, U>& t, const Positions& at, int64_t c0, int64_t nc,
                 A* sums, Z z, Z2 z2) {
  A buf[kTileElements];
  static const A no_bias[kRowChannels] = {};
  const A floor = a.relu ? A(0) : -A(__builtin_inf());
  const bool rows = finishes_rows(a);
  const U* skip = t.skip ? t.skip + c0 * a.skip_strides.c : nullptr;
  U* out = t.out + c0 * a.out_strides.c;
  const A* bias = t.bias ? t.bias + c0 : no_bias;
  if (skip && !rows)
    load_tile(skip, at.skip_off, at.skip_run, a.skip_strides.c, at.np, nc, buf, kTileChannels);
  for (int64_t p = 0; p < at.np; ++p) {
    A* sum = sums ? sums + at.cls[p] * a.O + c0 : nullptr;
    A* tile = buf + p * kTileChannels;
    if (rows)
      finish_row<U>(z(p), z2(p), bias, floor, skip ? skip + at.skip_off[p] : nullptr, nc, out + at.out_off[p],
                    sum);
    else
      finish_row<U>(z(p), z2(p), bias, floor, skip ? tile : nullptr, nc, tile, sum);
  }
  if (!rows) store_tile(buf, kTileChannels, at.out_off, at.out_run, a.out_strides.c, at.np, nc, out);
}

// The tap sums of every sample from its chunks' class sums, partial[sample][chunk][class][O].
template <class A>
void combine_sums(const Epilogue& a, const A* partial, int64_t chunks, int64_t elements) {
  const Grid g{a.T, a.H, a.W};
  const int64_t classes = class_count(a.taps), blocks = ceil_div(a.O, kTileChannels);
  parallel_for(a.nb * blocks, elements, a.threads, [&](int64_t task) {
    const int64_t i = task / blocks, c0 = task % blocks * kTileChannels, s = a.samples ? a.samples[i] : i;
    combine_chunks(partial + i * chunks * classes * a.O, chunks, a.O, a.taps, g, c0,
                   min64(kTileChannels, a.O - c0), static_cast<A*>(a.sums) + s * a.O * a.taps);
  });
}

}  // namespace
}  // namespace dsts::cpu::DSTS_ISA
