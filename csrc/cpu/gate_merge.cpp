// Epilogue of the data gradient, bound by memory. Tasks and tiles as in epilogue.cpp: a row of each panel is
// spread over the channels, dx takes the gated mix of the two, and the gate's gradient adds x times their
// difference to the chunk's partial sum.
#include "cpu/gate_merge.h"

#include "cpu/pick.h"
#include "cpu/tile.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

// A panel as one sample sees it: select() chooses channels [c0, c0 + nc), spread() gives their values at a
// position, 0 for a channel that the panel lacks.
template <class A, class T>
struct Panel {
  const T* data;  // (P, columns)
  const int32_t* pos;
  int64_t columns;
  int64_t first = 0, count = 0;
  Place<A, kRowChannels> place;

  Panel(const void* panel, const int32_t* pos, int64_t columns, int64_t offset)
      : data(static_cast<const T*>(panel) + offset * columns), pos(pos), columns(columns) {}

  void select(int64_t c0, int64_t nc) {
    first = c0;
    count = columns && !pos ? nc : 0;
    if (count == 0) place.prepare(columns ? pos + c0 : nullptr, nc, columns);
  }

  const A* spread(int64_t p, bool ahead) {
    const T* row = data + p * columns;
    if (ahead && count > 0) prefetch_row(row + kPrefetchRows * columns + first, count);
    if (ahead && place.groups > 0) {
      const int64_t begin = place.window[0], end = place.window[place.groups - 1];
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

// Element offsets of a chunk's positions in one tensor; runs are found tile by tile, so that a frame's end in
// the chunk spoils one tile only.
struct ChunkOffsets {
  int64_t off[kChunkPositions];
  bool run[kChunkPositions / kTilePositions];

  void fill(const Grid& g, const Strides& s, int64_t p0, int64_t np) {
    for (int64_t q = 0; q < np; q += kTilePositions)
      run[q / kTilePositions] = position_offsets(g, s, p0 + q, min64(kTilePositions, np - q), off + q);
  }
};

// Chunk [p0, p0 + np) of sample s, panel sample i. Channel tiles are the outer loop: a tile's lists are
// prepared once for the chunk. dgate: the chunk's partial sums (C), or null.
template <class T, class U>
void merge_chunk(const GateMerge& a, const Grid& g, int64_t i, int64_t s, int64_t p0, int64_t np, bool rows,
                 acc_t<U>* dgate) {
  using A = acc_t<U>;
  ChunkOffsets x_at, dx_at;
  if (dgate) x_at.fill(g, a.x_strides, p0, np);
  if (a.dx) dx_at.fill(g, a.dx_strides, p0, np);
  Panel<A, T> spatial(a.dxs, a.pos_s, a.ns, i * g.positions()),
      temporal(a.dxt, a.pos_t, a.nt, i * g.positions());
  A buf[kTileElements], gate[kRowChannels];
  const int64_t nc_max = rows ? kRowChannels : kTileChannels;
  for (int64_t c0 = 0; c0 < a.C; c0 += nc_max) {
    const int64_t nc = min64(nc_max, a.C - c0);
    const U* x = dgate ? static_cast<const U*>(a.x) + s * a.x_strides.b + c0 * a.x_strides.c : nullptr;
    U* dx = a.dx ? static_cast<U*>(a.dx) + s * a.dx_strides.b + c0 * a.dx_strides.c : nullptr;
    A* sum = dgate ? dgate + c0 : nullptr;
    for (int64_t c = 0; c < nc; ++c)
      gate[c] = load(static_cast<const U*>(a.gate)[s * a.gate_stride_b + c0 + c]);
    spatial.select(c0, nc), temporal.select(c0, nc);
    for (int64_t q = 0; q < np; q += kTilePositions) {
      const int64_t tp = min64(kTilePositions, np - q), tile = q / kTilePositions;
      if (x && !rows) load_tile(x, x_at.off + q, x_at.run[tile], a.x_strides.c, tp, nc, buf, kTileChannels);
      for (int64_t p = 0; p < tp; ++p) {
        const bool ahead = !rows && q + p + kPrefetchRows < np;
        const A *ds = spatial.spread(p0 + q + p, ahead), *dt = temporal.spread(p0 + q + p, ahead);
        A* row = buf + p * kTileChannels;
        if (rows)
          merge_row(ds, dt, gate, x ? x + x_at.off[q + p] : nullptr, nc, dx ? dx + dx_at.off[q + p] : nullptr,
                    sum);
        else
          merge_row(ds, dt, gate, row, nc, dx ? row : nullptr, sum);
      }
      if (dx && !rows)
        store_tile(buf, kTileChannels, dx_at.off + q, dx_at.run[tile], a.dx_strides.c, tp, nc, dx);
    }
  }
}

template <class T, class U>
Status run(const GateMerge& a) {
  using A = acc_t<U>;
  const Grid g{a.T, a.H, a.W};
  const int64_t P = g.positions(), chunks = ceil_div(P, kChunkPositions), elements = a.nb * a.C * P;
  const bool rows = (!a.dx || a.dx_strides.c == 1) && (!a.dgate || a.x_strides.c == 1);
  if (!a.dx && !a.dgate) return Status::ok;
  Scratch<A> partial(a.dgate ? a.nb * chunks * a.C : 0);
  if (!partial.ok()) return Status::no_memory;
  const auto sample = [&](int64_t i) { return a.samples ? a.samples[i] : i; };
  parallel_for(a.nb * chunks, elements, a.threads, [&](int64_t task) {
    const int64_t i = task / chunks, begin = task % chunks * kChunkPositions,
                  end = min64(P, begin + kChunkPositions);
    A* dgate = a.dgate ? partial.data + task * a.C : nullptr;
    if (dgate) memset(dgate, 0, size_t(a.C) * sizeof(A));
    merge_chunk<T, U>(a, g, i, sample(i), begin, end - begin, rows, dgate);
  });
  if (!a.dgate) return Status::ok;
  const int64_t blocks = ceil_div(a.C, kTileChannels);
  parallel_for(a.nb * blocks, elements, a.threads, [&](int64_t task) {
    const int64_t i = task / blocks, c0 = task % blocks * kTileChannels, nc = min64(kTileChannels, a.C - c0);
    A sum[kTileChannels] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t c = 0; c < nc; ++c) sum[c] += partial.data[(i * chunks + chunk) * a.C + c0 + c];
    U* out = static_cast<U*>(a.dgate) + sample(i) * a.C + c0;
    for (int64_t c = 0; c < nc; ++c) store(sum[c], out + c);
  });
  return Status::ok;
}

}  // namespace

Status gate_merge(const GateMerge& a) {
  return with_dtypes(a.dtype, a.panel_dtype, [&](auto own, auto panel) {
    return run<typename decltype(panel)::type, typename decltype(own)::type>(a);
  });
}

}  // namespace dsts::cpu::DSTS_ISA
