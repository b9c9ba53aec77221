// Epilogue of the gated convolution, bound by memory. A task is one chunk of one sample's positions; it goes
// over its channels in tiles, each finished in cache.
#include "cpu/epilogue.h"

#include "cpu/finish.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

// Positions [p0, p0 + np) of sample i; sums: this chunk's class sums [class][O], or null.
template <class A, class T, class U>
void epilogue_tile(const Epilogue& a, const Grid& g, const Target<A, U>& target, int64_t i, int64_t p0,
                   int64_t np, A* sums) {
  Positions at;
  at.np = np;
  at.out_run = position_offsets(g, a.out_strides, p0, np, at.out_off);
  at.skip_run = target.skip && position_offsets(g, a.skip_strides, p0, np, at.skip_off);
  if (sums) position_classes(g, a.taps, p0, np, at.cls);
  const T no_row[kRowChannels] = {};
  const int64_t begin = (i * g.positions() + p0) * a.O;
  const T* zs = a.zs ? static_cast<const T*>(a.zs) + begin : nullptr;
  const T* zt = a.zt ? static_cast<const T*>(a.zt) + begin : nullptr;
  const T* first = zs ? zs : zt;
  const T* second = zs ? zt : nullptr;
  const bool rows = finishes_rows(a);
  const int64_t nc_max = rows ? kRowChannels : kTileChannels;
  for (int64_t c0 = 0; c0 < a.O; c0 += nc_max) {
    const int64_t nc = min64(nc_max, a.O - c0);
    finish_tile(
        a, target, at, c0, nc, sums,
        [&](int64_t p) {
          if (!first) return no_row;
          const T* row = first + p * a.O + c0;
          if (!rows && p + kPrefetchRows < np) {
            prefetch_row(row + kPrefetchRows * a.O, nc);
            if (second) prefetch_row(second + (p + kPrefetchRows) * a.O + c0, nc);
          }
          return row;
        },
        [&](int64_t p) { return second ? second + p * a.O + c0 : nullptr; });
  }
}

template <class T, class U>
Status run(const Epilogue& a) {
  using A = acc_t<U>;
  const Grid g{a.T, a.H, a.W};
  const int64_t P = g.positions(), chunks = ceil_div(P, kChunkPositions), classes = class_count(a.taps);
  const int64_t elements = a.nb * a.O * P;
  Scratch<A> partial(a.sums ? a.nb * chunks * classes * a.O : 0);
  if (!partial.ok()) return Status::no_memory;
  parallel_for(a.nb * chunks, elements, a.threads, [&](int64_t task) {
    const int64_t i = task / chunks;
    const Target<A, U> target(a, i);
    const int64_t begin = task % chunks * kChunkPositions, end = min64(P, begin + kChunkPositions);
    A* sums = a.sums ? partial.data + task * classes * a.O : nullptr;
    if (sums) memset(sums, 0, size_t(classes * a.O) * sizeof(A));
    for (int64_t p = begin; p < end; p += kTilePositions)
      epilogue_tile<A, T, U>(a, g, target, i, p, min64(kTilePositions, end - p), sums);
  });
  if (a.sums) combine_sums(a, partial.data, chunks, elements);
  return Status::ok;
}

}  // namespace

Status epilogue(const Epilogue& a) {
  return with_dtypes(a.out_dtype, a.in_dtype, [&](auto out, auto in) {
    return run<typename decltype(in)::type, typename decltype(out)::type>(a);
  });
}

}  // namespace dsts::cpu::DSTS_ISA
