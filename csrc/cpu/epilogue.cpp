// Epilogue of the gated convolution, bound by memory. A task is one chunk of one sample's positions; it goes
// over its channels in tiles: a row of the panels is joined, activated, given the skip connection, rounded,
// counted into the chunk's class sums and stored, all in cache. Where skip or out are not channels-last they
// pass through a transposing buffer.
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

// One sample's view of the arguments.
template <class A, class T, class U>
struct Sample {
  const T *zs, *zt;  // (P, O)
  const A* bias;
  const U* skip;
  U* out;
};

template <class A, class T, class U>
Sample<A, T, U> sample_of(const Epilogue& a, int64_t i, int64_t P) {
  const int64_t s = a.samples ? a.samples[i] : i;
  const auto at = [](auto* p, int64_t offset) { return p ? p + offset : p; };
  return {at(static_cast<const T*>(a.zs), i * P * a.O), at(static_cast<const T*>(a.zt), i * P * a.O),
          at(static_cast<const A*>(a.bias), s * a.bias_stride_b),
          at(static_cast<const U*>(a.skip), s * a.skip_strides.b),
          static_cast<U*>(a.out) + s * a.out_strides.b};
}

// Positions [p0, p0 + np) of one sample; cls: this chunk's class sums [class][O], or null.
template <class A, class T, class U>
void epilogue_tile(const Epilogue& a, const Grid& g, const Sample<A, T, U>& s, int64_t p0, int64_t np,
                   bool rows, A* cls) {
  int64_t out_off[kTilePositions], skip_off[kTilePositions], k[kTilePositions];
  const bool out_run = position_offsets(g, a.out_strides, p0, np, out_off);
  const bool skip_run = s.skip && position_offsets(g, a.skip_strides, p0, np, skip_off);
  if (cls) position_classes(g, a.taps, p0, np, k);
  A buf[kTileElements];
  const T no_row[kRowChannels] = {};
  const A no_bias[kRowChannels] = {}, floor = a.relu ? A(0) : -A(__builtin_inf());
  const int64_t nc_max = rows ? kRowChannels : kTileChannels;
  for (int64_t c0 = 0; c0 < a.O; c0 += nc_max) {
    const int64_t nc = min64(nc_max, a.O - c0);
    const U* skip = s.skip ? s.skip + c0 * a.skip_strides.c : nullptr;
    U* out = s.out + c0 * a.out_strides.c;
    const A* bias = s.bias ? s.bias + c0 : no_bias;
    if (skip && !rows) load_tile(skip, skip_off, skip_run, a.skip_strides.c, np, nc, buf, kTileChannels);
    for (int64_t p = 0; p < np; ++p) {
      const int64_t z = (p0 + p) * a.O + c0;
      const T* z1 = s.zs ? s.zs + z : s.zt ? s.zt + z : no_row;
      const T* z2 = s.zs && s.zt ? s.zt + z : nullptr;
      if (!rows && p + kPrefetchRows < np && z1 != no_row) {
        prefetch_row(z1 + kPrefetchRows * a.O, nc);
        if (z2) prefetch_row(z2 + kPrefetchRows * a.O, nc);
      }
      A* sum = cls ? cls + k[p] * a.O + c0 : nullptr;
      A* tile = buf + p * kTileChannels;
      if (rows)
        finish_row<U>(z1, z2, bias, floor, skip ? skip + skip_off[p] : nullptr, nc, out + out_off[p], sum);
      else
        finish_row<U>(z1, z2, bias, floor, skip ? tile : nullptr, nc, tile, sum);
    }
    if (!rows) store_tile(buf, kTileChannels, out_off, out_run, a.out_strides.c, np, nc, out);
  }
}

template <class T, class U>
Status run(const Epilogue& a) {
  using A = acc_t<U>;
  const Grid g{a.T, a.H, a.W};
  const int64_t P = g.positions(), chunks = ceil_div(P, kChunkPositions), classes = class_count(a.taps);
  const int64_t elements = a.nb * a.O * P;
  const bool rows = a.out_strides.c == 1 && (!a.skip || a.skip_strides.c == 1);
  Scratch<A> partial(a.sums ? a.nb * chunks * classes * a.O : 0);
  if (!partial.ok()) return Status::no_memory;
  parallel_for(a.nb * chunks, elements, a.threads, [&](int64_t task) {
    const Sample<A, T, U> s = sample_of<A, T, U>(a, task / chunks, P);
    const int64_t begin = task % chunks * kChunkPositions, end = min64(P, begin + kChunkPositions);
    A* cls = a.sums ? partial.data + task * classes * a.O : nullptr;
    if (cls) memset(cls, 0, size_t(classes * a.O) * sizeof(A));
    for (int64_t p = begin; p < end; p += kTilePositions)
      epilogue_tile(a, g, s, p, min64(kTilePositions, end - p), rows, cls);
  });
  if (!a.sums) return Status::ok;
  const int64_t blocks = ceil_div(a.O, kTileChannels);
  parallel_for(a.nb * blocks, elements, a.threads, [&](int64_t task) {
    const int64_t i = task / blocks, c0 = task % blocks * kTileChannels, s = a.samples ? a.samples[i] : i;
    combine_chunks(partial.data + i * chunks * classes * a.O, chunks, a.O, a.taps, g, c0,
                   min64(kTileChannels, a.O - c0), static_cast<A*>(a.sums) + s * a.O * a.taps);
  });
  return Status::ok;
}

}  // namespace

Status epilogue(const Epilogue& a) {
  return with_dtypes(a.out_dtype, a.in_dtype, [&](auto out, auto in) {
    return run<typename decltype(in)::type, typename decltype(out)::type>(a);
  });
}

}  // namespace dsts::cpu::DSTS_ISA
