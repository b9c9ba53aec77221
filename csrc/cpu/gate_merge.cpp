// Epilogue of the data gradient, bound by memory. Tasks and tiles as in epilogue.cpp: a row of each panel is
// spread over the channels, dx takes the gated mix of the two, and the gate's gradient adds x times their
// difference to the part's sum.
#include "cpu/gate_merge.h"

#include "cpu/pick.h"
#include "cpu/tile.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

// A panel as one sample sees it: select() chooses channels [c0, c0 + nc), spread() gives their values at a
// position, 0 for a channel that the panel lacks.
template <class A, class T>
struct Panel {
  const T* data;             // [P, columns]
  const int32_t* column_of;  // [C], or null
  int64_t columns;
  int64_t first = 0, count = 0;
  Place<A, kRowChannels> place;

  Panel(const GradientPanel& panel, int64_t first_row)
      : data(static_cast<const T*>(panel.data) + first_row * panel.width),
        column_of(panel.columns),
        columns(panel.width) {}

  void select(int64_t c0, int64_t nc) {
    first = c0;
    count = columns && !column_of ? nc : 0;
    if (count == 0) place.prepare(columns ? column_of + c0 : nullptr, nc, columns);
  }

  const A* spread(int64_t p, bool ahead) {
    const T* row = data + p * columns;
    if (ahead && count > 0) prefetch_row(row + kPrefetchRows * columns + first, count);
    if (ahead && place.windows > 0) {
      const int64_t begin = place.start[0], end = place.start[place.windows - 1];
      prefetch_row(row + kPrefetchRows * columns + begin, end - begin + kLanes<A>);
    }
    if (count == 0) return place.run(row);
    if constexpr (same<A, T>) return row + first;
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) place.value[k] = load(row[first + k]);
    return place.value;
  }
};

// One row of n channels: dx from the two data gradients, dgate += x * their difference; either may be left
// out.
template <bool kDgate, bool kDx, class A, class X, class D>
void merge_row(const A* ds, const A* dt, const A* gate, const X* x, int64_t n, D* dx, A* dgate) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) {
    if constexpr (kDgate) dgate[c] += load(x[c]) * (ds[c] - dt[c]);
    if constexpr (kDx) {
      // Selected, not multiplied: a closed side's NaN or Inf stays out.
      const A mix = gate[c] * ds[c] + (1 - gate[c]) * dt[c];
      const A ajar = gate[c] == 0 ? dt[c] : mix;
      store(gate[c] == 1 ? ds[c] : ajar, dx + c);
    }
  }
}

template <class A, class X, class D>
void merge_row(const A* ds, const A* dt, const A* gate, const X* x, int64_t n, D* dx, A* dgate) {
  if (dx && dgate)
    merge_row<true, true>(ds, dt, gate, x, n, dx, dgate);
  else if (dx)
    merge_row<false, true>(ds, dt, gate, x, n, dx, dgate);
  else
    merge_row<true, false>(ds, dt, gate, x, n, dx, dgate);
}

// Element offsets of a part's positions in one tensor; runs are found tile by tile, so that a frame's end in
// the part spoils one tile only.
struct PartOffsets {
  int64_t off[kPartPositions];
  bool run[kPartPositions / kTilePositions];

  void fill(const Grid& g, const Strides& s, int64_t p0, int64_t np) {
    for (int64_t q = 0; q < np; q += kTilePositions)
      run[q / kTilePositions] = position_offsets(g, s, p0 + q, min64(kTilePositions, np - q), off + q);
  }
};

// Part [p0, p0 + np) of sample s, panel sample i. Channel tiles are the outer loop: a tile's lists are
// prepared once for the part. dgate: the part's sums (C), or null.
template <class T, class U>
void merge_part(const GateMerge& a, const Grid& g, int64_t i, int64_t s, int64_t p0, int64_t np,
                bool innermost, acc_t<U>* dgate) {
  using A = acc_t<U>;
  PartOffsets x_at, dx_at;
  if (dgate) x_at.fill(g, a.x.strides, p0, np);
  if (a.dx.data) dx_at.fill(g, a.dx.strides, p0, np);
  Panel<A, T> spatial(a.spatial, i * g.positions()), temporal(a.temporal, i * g.positions());
  A buf[kTileElements], gate[kRowChannels];
  const int64_t nc_max = innermost ? kRowChannels : kTileChannels;
  for (int64_t c0 = 0; c0 < a.x.C; c0 += nc_max) {
    const int64_t nc = min64(nc_max, a.x.C - c0);
    const U* x = dgate ? static_cast<const U*>(a.x.data) + s * a.x.strides.b + c0 * a.x.strides.c : nullptr;
    U* dx = a.dx.data ? static_cast<U*>(a.dx.data) + s * a.dx.strides.b + c0 * a.dx.strides.c : nullptr;
    A* sum = dgate ? dgate + c0 : nullptr;
    for (int64_t c = 0; c < nc; ++c)
      gate[c] = load(static_cast<const U*>(a.gate)[s * a.gate_stride_b + c0 + c]);
    spatial.select(c0, nc), temporal.select(c0, nc);
    for (int64_t q = 0; q < np; q += kTilePositions) {
      const int64_t tp = min64(kTilePositions, np - q), tile = q / kTilePositions;
      if (x && !innermost)
        load_tile(x, x_at.off + q, x_at.run[tile], a.x.strides.c, tp, nc, buf, kTileChannels);
      for (int64_t p = 0; p < tp; ++p) {
        const bool ahead = !innermost && q + p + kPrefetchRows < np;
        const A *ds = spatial.spread(p0 + q + p, ahead), *dt = temporal.spread(p0 + q + p, ahead);
        A* row = buf + p * kTileChannels;
        if (innermost)
          merge_row(ds, dt, gate, x ? x + x_at.off[q + p] : nullptr, nc, dx ? dx + dx_at.off[q + p] : nullptr,
                    sum);
        else
          merge_row(ds, dt, gate, row, nc, dx ? row : nullptr, sum);
      }
      if (dx && !innermost)
        store_tile(buf, kTileChannels, dx_at.off + q, dx_at.run[tile], a.dx.strides.c, tp, nc, dx);
    }
  }
}

template <class T, class U>
Status run(const GateMerge& a) {
  using A = acc_t<U>;
  const Grid g{a.x.T, a.x.H, a.x.W};
  const int64_t P = g.positions(), parts = ceil_div(P, kPartPositions),
                elements = a.samples.count * a.x.C * P;
  const bool innermost = (!a.dx.data || a.dx.strides.c == 1) && (!a.dgate || a.x.strides.c == 1);
  if (!a.dx.data && !a.dgate) return Status::ok;
  Scratch<A> part_sums(a.dgate ? a.samples.count * parts * a.x.C : 0);
  if (!part_sums.ok()) return Status::no_memory;
  parallel_for(a.samples.count * parts, elements, a.threads, [&](int64_t task) {
    const int64_t i = task / parts, begin = task % parts * kPartPositions,
                  end = min64(P, begin + kPartPositions);
    A* dgate = a.dgate ? part_sums.data + task * a.x.C : nullptr;
    if (dgate) memset(dgate, 0, size_t(a.x.C) * sizeof(A));
    merge_part<T, U>(a, g, i, sample_at(a.samples, i), begin, end - begin, innermost, dgate);
  });
  if (!a.dgate) return Status::ok;
  const int64_t blocks = ceil_div(a.x.C, kTileChannels);
  parallel_for(a.samples.count * blocks, elements, a.threads, [&](int64_t task) {
    const int64_t i = task / blocks, c0 = task % blocks * kTileChannels,
                  nc = min64(kTileChannels, a.x.C - c0);
    A sum[kTileChannels] = {};
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t c = 0; c < nc; ++c) sum[c] += part_sums.data[(i * parts + part) * a.x.C + c0 + c];
    U* out = static_cast<U*>(a.dgate) + sample_at(a.samples, i) * a.x.C + c0;
    for (int64_t c = 0; c < nc; ++c) store(sum[c], out + c);
  });
  return Status::ok;
}

}  // namespace

Status gate_merge(const GateMerge& a) {
  return with_dtypes(a.x.dtype, a.panel_dtype, [&](auto x, auto panel) {
    return run<typename decltype(panel)::type, typename decltype(x)::type>(a);
  });
}

}  // namespace dsts::cpu::DSTS_ISA
