// Tap sums, bound by reading x once. Two ways in. Planes: where a channel's frame is contiguous, frames are
// added on top of each other in a buffer (vectorised over positions) and the one frame left is split into
// edge and inner rows and columns. Tiles: everything else, channels-last above all; positions are added to
// the class sums of their row and column, vectorised over channels.
#include "cpu/tap_sums.h"

#include "cpu/tile.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

// Elements of a frame (or of a band of its rows) that are summed over t at once.
constexpr int64_t kPlane = 4096;
// Elements of a contiguous run that one running sum covers.
constexpr int64_t kRun = 2048;
static_assert(kPlane > 0 && kRun > 0);

// Four streams, so that the adder's latency does not set the pace.
template <class A, class T>
A sum_run(const T* x, int64_t n) {
  A total = 0;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const T* p = x + begin;
    const int64_t m = min64(kRun, n - begin), q = m / 4;
    A s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < q; ++i) {
      s0 += load(p[i]);
      s1 += load(p[i + q]);
      s2 += load(p[i + 2 * q]);
      s3 += load(p[i + 3 * q]);
    }
    for (int64_t i = 4 * q; i < m; ++i) s0 += load(p[i]);
    total += (s0 + s1) + (s2 + s3);
  }
  return total;
}

// First, inner and last columns of one row of sums, added to cls[0..2].
template <class A>
void add_columns(const A* row, int64_t W, A* cls) {
  for (int64_t w = 0; w < W; ++w) cls[edge_class(w, W)] += row[w];
}

// Class sums of rows [h0, h0 + nh) of one channel, whose frames are contiguous and `stride_t` apart.
template <class A, class T>
void plane_band(const T* x, int64_t stride_t, const Grid& g, int64_t h0, int64_t nh, A* cls) {
  A frame[kPlane];  // [nh][W]
  A inner[kPlane];  // [W]
  const int64_t n = nh * g.W;
  for (int64_t i = 0; i < n; ++i) frame[i] = 0;
  for (int64_t t = 0; t < g.T; ++t) {
    const T* from = x + t * stride_t + h0 * g.W;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) frame[i] += load(from[i]);
  }
  for (int64_t w = 0; w < g.W; ++w) inner[w] = 0;
  for (int64_t h = h0; h < h0 + nh; ++h) {
    const A* row = frame + (h - h0) * g.W;
    const int64_t k = edge_class(h, g.H);
    if (k != 1) {
      add_columns(row, g.W, cls + 3 * k);
      continue;
    }
#pragma omp simd
    for (int64_t w = 0; w < g.W; ++w) inner[w] += row[w];
  }
  add_columns(inner, g.W, cls + 3);
}

template <class T>
Status plane_sums(const TapSums& a, const Grid& g) {
  using A = acc_t<T>;
  const int64_t B = a.x.B, C = a.x.C;
  const Strides s = a.x.strides;
  const int64_t frame = g.H * g.W;
  const bool frames_follow = g.T == 1 || s.t == frame;
  parallel_for(B * C, B * C * g.positions(), a.threads, [&](int64_t task) {
    const T* x = static_cast<const T*>(a.x.data) + task / C * s.b + task % C * s.c;
    A* out = static_cast<A*>(a.out) + task * a.taps;
    if (a.taps == 1) {
      A sum = 0;
      if (frames_follow)
        sum = sum_run<A>(x, g.positions());
      else
        for (int64_t t = 0; t < g.T; ++t) sum += sum_run<A>(x + t * s.t, frame);
      out[0] = sum;
      return;
    }
    A cls[9] = {};
    const int64_t band = kPlane / g.W;
    for (int64_t h = 0; h < g.H; h += band) plane_band<A>(x, s.t, g, h, min64(band, g.H - h), cls);
    taps_of_classes(cls, 1, g, out);
  });
  return Status::ok;
}

// Positions [p0, p0 + np) and channels [c0, c0 + nc) of one sample into cls, [class][C].
template <class A, class T>
void add_tile(const TapSums& a, const Grid& g, const T* x, int64_t p0, int64_t np, int64_t c0, int64_t nc,
              A* cls) {
  int64_t off[kPartPositions], k[kPartPositions];
  const bool run = position_offsets(g, a.x.strides, p0, np, off);
  position_classes(g, a.taps, p0, np, k);
  const int64_t stride_c = a.x.strides.c;
  if (stride_c == 1) {
    for (int64_t p = 0; p < np; ++p) {
      const T* from = x + off[p] + c0;
      A* to = cls + k[p] * a.x.C + c0;
#pragma omp simd
      for (int64_t c = 0; c < nc; ++c) to[c] += load(from[c]);
    }
    return;
  }
  A buf[kTileElements];
  for (int64_t q = 0; q < np; q += kTilePositions)
    for (int64_t c = c0; c < c0 + nc; c += kTileChannels) {
      const int64_t tp = min64(kTilePositions, np - q), tc = min64(kTileChannels, c0 + nc - c);
      load_tile(x + c * stride_c, off + q, run, stride_c, tp, tc, buf, kTileChannels);
      for (int64_t p = 0; p < tp; ++p) {
        A* to = cls + k[q + p] * a.x.C + c;
#pragma omp simd
        for (int64_t i = 0; i < tc; ++i) to[i] += buf[p * kTileChannels + i];
      }
    }
}

template <class T>
Status tile_sums(const TapSums& a, const Grid& g) {
  using A = acc_t<T>;
  const int64_t B = a.x.B, C = a.x.C, P = g.positions();
  const int64_t parts = ceil_div(P, kPartPositions), classes = class_count(a.taps);
  const int64_t channel_blocks = ceil_div(C, kRowChannels), elements = B * C * P;
  Scratch<A> part_sums(B * parts * classes * C);
  if (!part_sums.ok()) return Status::no_memory;
  parallel_for(B * parts * channel_blocks, elements, a.threads, [&](int64_t task) {
    const int64_t c0 = task % channel_blocks * kRowChannels, nc = min64(kRowChannels, C - c0);
    const int64_t part = task / channel_blocks % parts, b = task / channel_blocks / parts,
                  p0 = part * kPartPositions;
    A* cls = part_sums.data + (b * parts + part) * classes * C;
    for (int64_t k = 0; k < classes; ++k) memset(cls + k * C + c0, 0, size_t(nc) * sizeof(A));
    const T* x = static_cast<const T*>(a.x.data) + b * a.x.strides.b;
    add_tile<A>(a, g, x, p0, min64(kPartPositions, P - p0), c0, nc, cls);
  });
  const int64_t blocks = ceil_div(C, kTileChannels);
  parallel_for(B * blocks, elements, a.threads, [&](int64_t task) {
    const int64_t b = task / blocks, c0 = task % blocks * kTileChannels;
    combine_parts(part_sums.data + b * parts * classes * C, parts, C, a.taps, g, c0,
                  min64(kTileChannels, C - c0), static_cast<A*>(a.out) + b * C * a.taps);
  });
  return Status::ok;
}

}  // namespace

Status tap_sums(const TapSums& a) {
  const Grid g{a.x.T, a.x.H, a.x.W};
  const Strides& s = a.x.strides;
  const bool contiguous = (g.W == 1 || s.w == 1) && (g.H == 1 || s.h == g.W);
  const bool channels_last = s.c == 1 && a.x.C > 1;  // a 1 x 1 frame is contiguous too, but not worth a plane
  const bool planes = contiguous && !channels_last && g.W <= kPlane && g.positions() > 0;
  return with_dtype(a.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return planes ? plane_sums<T>(a, g) : tile_sums<T>(a, g);
  });
}

}  // namespace dsts::cpu::DSTS_ISA
