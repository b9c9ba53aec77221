// Epilogue of the gated convolution, bound by memory. A task is one part of one sample's positions; it goes
// over its channels in tiles, each of which stays in cache.
#include "cpu/epilogue.h"

#include "cpu/epilogue_tile.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

// Positions [p0, p0 + np) of sample i; sums: this part's class sums [class][O], or null.
template <class A, class T, class U>
void panel_tile(const PanelEpilogue& a, const Grid& g, const Target<A, U>& target, int64_t i, int64_t p0,
                int64_t np, A* sums) {
  const Epilogue& e = a.epilogue;
  Positions at;
  at.np = np;
  at.out_run = position_offsets(g, e.out.strides, p0, np, at.out_off);
  at.skip_run = target.skip && position_offsets(g, e.skip.strides, p0, np, at.skip_off);
  if (sums) position_classes(g, e.taps, p0, np, at.cls);
  const T no_row[kRowChannels] = {};
  const int64_t O = e.out.C, begin = (i * g.positions() + p0) * O;
  const T* spatial = a.spatial ? static_cast<const T*>(a.spatial) + begin : nullptr;
  const T* temporal = a.temporal ? static_cast<const T*>(a.temporal) + begin : nullptr;
  const T* z = spatial ? spatial : temporal;
  const T* added = spatial ? temporal : nullptr;
  const bool innermost = channels_innermost(e);
  const int64_t nc_max = innermost ? kRowChannels : kTileChannels;
  for (int64_t c0 = 0; c0 < O; c0 += nc_max) {
    const int64_t nc = min64(nc_max, O - c0);
    epilogue_tile(
        e, target, at, c0, nc, sums,
        [&](int64_t p) {
          if (!z) return no_row;
          const T* row = z + p * O + c0;
          if (!innermost && p + kPrefetchRows < np) {
            prefetch_row(row + kPrefetchRows * O, nc);
            if (added) prefetch_row(added + (p + kPrefetchRows) * O + c0, nc);
          }
          return row;
        },
        [&](int64_t p) { return added ? added + p * O + c0 : nullptr; });
  }
}

template <class T, class U>
Status run(const PanelEpilogue& a) {
  using A = acc_t<U>;
  const Epilogue& e = a.epilogue;
  const Grid g{e.out.T, e.out.H, e.out.W};
  const int64_t nb = e.samples.count, O = e.out.C, P = g.positions();
  const int64_t parts = ceil_div(P, kPartPositions), classes = class_count(e.taps), elements = nb * O * P;
  Scratch<A> part_sums(e.sums ? nb * parts * classes * O : 0);
  if (!part_sums.ok()) return Status::no_memory;
  parallel_for(nb * parts, elements, a.threads, [&](int64_t task) {
    const int64_t i = task / parts;
    const Target<A, U> target(e, i);
    const int64_t begin = task % parts * kPartPositions, end = min64(P, begin + kPartPositions);
    A* sums = e.sums ? part_sums.data + task * classes * O : nullptr;
    if (sums) memset(sums, 0, size_t(classes * O) * sizeof(A));
    for (int64_t p = begin; p < end; p += kTilePositions)
      panel_tile<A, T, U>(a, g, target, i, p, min64(kTilePositions, end - p), sums);
  });
  if (e.sums) combine_sums(e, part_sums.data, parts, elements, a.threads);
  return Status::ok;
}

}  // namespace

Status epilogue(const PanelEpilogue& a) {
  return with_dtypes(a.epilogue.out.dtype, a.panel_dtype, [&](auto out, auto panel) {
    return run<typename decltype(panel)::type, typename decltype(out)::type>(a);
  });
}

}  // namespace dsts::cpu::DSTS_ISA
