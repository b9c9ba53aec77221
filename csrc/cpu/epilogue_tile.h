// The epilogue, shared by the kernels that end in one: sum of operators, bias, ReLU, skip connection,
// rounding, tap sums and the store, a tile of positions x channels at a time, in any layout. What a kernel
// supplies is where the rows of its result lie.
#pragma once

#include "cpu/epilogue.h"
#include "cpu/tile.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

// One row of n channels: v = z (+ z_added) + bias, not below `floor` (NaN stays NaN), + skip; stored to `to`,
// and as stored (in U) added to `sum`. Rows that are absent are compiled out: this loop is where the time
// goes.
template <class U, bool kAdded, bool kSkip, bool kSum, class A, class T, class S, class D>
void epilogue_row(const T* z, const T* z_added, const A* bias, A floor, const S* skip, int64_t n, D* to,
                  A* sum) {
#pragma omp simd
  for (int64_t o = 0; o < n; ++o) {
    A v = load(z[o]);
    if constexpr (kAdded) v += load(z_added[o]);
    v += bias[o];
    v = v < floor ? floor : v;
    if constexpr (kSkip) v += load(skip[o]);
    store(v, to + o);
    if constexpr (kSum) sum[o] += rounded<U>(v);
  }
}

template <class U, class A, class T, class S, class D>
void epilogue_row(const T* z, const T* z_added, const A* bias, A floor, const S* skip, int64_t n, D* to,
                  A* sum) {
  const auto with_sum = [&](auto added, auto skipped) {
    constexpr bool kAdded = decltype(added)::value, kSkip = decltype(skipped)::value;
    sum ? epilogue_row<U, kAdded, kSkip, true>(z, z_added, bias, floor, skip, n, to, sum)
        : epilogue_row<U, kAdded, kSkip, false>(z, z_added, bias, floor, skip, n, to, sum);
  };
  const auto with_skip = [&](auto added) {
    skip ? with_sum(added, Flag<true>{}) : with_sum(added, Flag<false>{});
  };
  z_added ? with_skip(Flag<true>{}) : with_skip(Flag<false>{});
}

// One sample's view of an Epilogue's arguments.
template <class A, class U>
struct Target {
  const A* bias;
  const U* skip;
  U* out;

  Target(const Epilogue& e, int64_t i) {
    const int64_t s = sample_at(e.samples, i);
    bias = e.bias ? static_cast<const A*>(e.bias) : nullptr;
    skip = e.skip.data ? static_cast<const U*>(e.skip.data) + s * e.skip.strides.b : nullptr;
    out = static_cast<U*>(e.out.data) + s * e.out.strides.b;
  }
};

// Where np positions lie in out and skip, whether as runs of consecutive elements, and their sum classes.
struct Positions {
  int64_t np;
  int64_t out_off[kTilePositions], skip_off[kTilePositions], cls[kTilePositions];
  bool out_run, skip_run;
};

// Channels are innermost on both sides: no tile is transposed.
inline bool channels_innermost(const Epilogue& e) {
  return e.out.strides.c == 1 && (!e.skip.data || e.skip.strides.c == 1);
}

// Channels [c0, c0 + nc) of a tile; nc <= kTileChannels unless channels_innermost, then <= kRowChannels. z(p)
// is the tile's row p from channel c0 on, and z_added(p) one to add to it or null. sums: class sums
// [class][O], or null.
template <class A, class U, class Z, class ZAdded>
void epilogue_tile(const Epilogue& e, const Target<A, U>& t, const Positions& at, int64_t c0, int64_t nc,
                   A* sums, Z z, ZAdded z_added) {
  A buf[kTileElements];
  static const A no_bias[kRowChannels] = {};
  const A floor = e.relu ? A(0) : -A(__builtin_inf());
  const bool innermost = channels_innermost(e);
  const U* skip = t.skip ? t.skip + c0 * e.skip.strides.c : nullptr;
  U* out = t.out + c0 * e.out.strides.c;
  const A* bias = t.bias ? t.bias + c0 : no_bias;
  if (skip && !innermost)
    load_tile(skip, at.skip_off, at.skip_run, e.skip.strides.c, at.np, nc, buf, kTileChannels);
  for (int64_t p = 0; p < at.np; ++p) {
    A* sum = sums ? sums + at.cls[p] * e.out.C + c0 : nullptr;
    A* tile = buf + p * kTileChannels;
    if (innermost)
      epilogue_row<U>(z(p), z_added(p), bias, floor, skip ? skip + at.skip_off[p] : nullptr, nc,
                      out + at.out_off[p], sum);
    else
      epilogue_row<U>(z(p), z_added(p), bias, floor, skip ? tile : nullptr, nc, tile, sum);
  }
  if (!innermost) store_tile(buf, kTileChannels, at.out_off, at.out_run, e.out.strides.c, at.np, nc, out);
}

// The tap sums of every sample from its parts' class sums, part_sums[sample][part][class][O].
template <class A>
void combine_sums(const Epilogue& e, const A* part_sums, int64_t parts, int64_t elements, int threads) {
  const Grid g{e.out.T, e.out.H, e.out.W};
  const int64_t O = e.out.C, classes = class_count(e.taps), blocks = ceil_div(O, kTileChannels);
  parallel_for(e.samples.count * blocks, elements, threads, [&](int64_t task) {
    const int64_t i = task / blocks, c0 = task % blocks * kTileChannels;
    A* sums = static_cast<A*>(e.sums) + sample_at(e.samples, i) * e.sums_stride_b;
    combine_parts(part_sums + i * parts * classes * O, parts, O, e.taps, g, c0, min64(kTileChannels, O - c0),
                  sums);
  });
}

}  // namespace
}  // namespace dsts::cpu::DSTS_ISA
