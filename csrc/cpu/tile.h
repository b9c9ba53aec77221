// Tiles: the kernels work on np positions x nc channels at a time, in a buffer [position][channel] that stays
// in the first-level cache, so that one compute loop (vectorised over channels) serves every memory layout.
// Positions are numbered over (t, h, w) row-major; a table of element offsets stands in for the strides.
// Also here: the class sums from which tap sums are made, for the kernels that reduce over positions.
#pragma once

#include "cpu/scalar.h"
#include "cpu/transpose.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

constexpr int64_t kTileElements = 8192;
constexpr int64_t kTilePositions = 64;  // where channels are not innermost: planes are read in runs this long
constexpr int64_t kTileChannels = 128;
constexpr int64_t kRowChannels = 512;  // where they are: few rows at a time, long pieces of each

// Work is cut into parts of this many positions whatever the number of threads, so sums are reproducible.
constexpr int64_t kPartPositions = 256;

static_assert(kTilePositions > 0 && kTileChannels > 0 && kTilePositions * kTileChannels <= kTileElements,
              "a tile lies in a buffer of kTileElements");
static_assert(kPartPositions > 0 && kPartPositions % kTilePositions == 0, "a part is whole tiles");
static_assert(kRowChannels >= kTileChannels && kRowChannels % 16 == 0 && kTileChannels % 16 == 0,
              "pieces of rows are whole vectors, and no shorter than a tile's");

// Pieces of rows a page apart are more than the hardware prefetcher follows: ask for a row this many ahead.
constexpr int64_t kPrefetchRows = 8;

template <class T>
DSTS_INLINE void prefetch_row(const T* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i);
}

struct Grid {
  int64_t T, H, W;
  int64_t positions() const { return T * H * W; }
};

// Element offsets of positions p0 .. p0 + np - 1; true when they are consecutive in memory.
inline bool position_offsets(const Grid& g, const Strides& s, int64_t p0, int64_t np, int64_t* off) {
  int64_t w = p0 % g.W, h = p0 / g.W % g.H, t = p0 / g.W / g.H;
  int64_t row = t * s.t + h * s.h;
  bool run = true;
  for (int64_t p = 0; p < np; ++p) {
    off[p] = row + w * s.w;
    run = run && off[p] == off[0] + p;
    if (++w == g.W) {
      w = 0;
      if (++h == g.H) h = 0, ++t;
      row = t * s.t + h * s.h;
    }
  }
  return run;
}

// buf[p * ld + c] = src[off[p] + c * stride_c]
template <class A, class T>
void load_tile(const T* src, const int64_t* off, bool run, int64_t stride_c, int64_t np, int64_t nc, A* buf,
               int64_t ld) {
  if (stride_c == 1) {
    for (int64_t p = 0; p < np; ++p) {
      const T* from = src + off[p];
      A* to = buf + p * ld;
#pragma omp simd
      for (int64_t c = 0; c < nc; ++c) to[c] = load(from[c]);
    }
  } else if (run) {
    const T* from = src + off[0];
    const T* end = from + (nc - 1) * stride_c + np;
    transpose<A, false>(
        nc, np,
        [&](int64_t c, int64_t p, int64_t n) {
          return load_lanes<A, false>(from + c * stride_c + p, n, end);
        },
        [&](int64_t p, int64_t c, int64_t n, lanes_t<A> v) {
          store_lanes<A, false>(v, buf + p * ld + c, n);
        });
  } else {
    for (int64_t p = 0; p < np; ++p)
      for (int64_t c = 0; c < nc; ++c) buf[p * ld + c] = load(src[off[p] + c * stride_c]);
  }
}

// out[off[p] + c * stride_c] = buf[p * ld + c]; kRaw: the lanes hold bits, not values.
template <bool kRaw = false, class A, class T>
void store_tile(const A* buf, int64_t ld, const int64_t* off, bool run, int64_t stride_c, int64_t np,
                int64_t nc, T* out) {
  if (stride_c == 1) {
    for (int64_t p = 0; p < np; ++p) {
      const A* from = buf + p * ld;
      T* to = out + off[p];
#pragma omp simd
      for (int64_t c = 0; c < nc; ++c) put_lane<kRaw>(from[c], to + c);
    }
  } else if (run) {
    const A* end = buf + (np - 1) * ld + nc;
    T* to = out + off[0];
    transpose<A, true>(
        np, nc,
        [&](int64_t p, int64_t c, int64_t n) { return load_lanes<A, false>(buf + p * ld + c, n, end); },
        [&](int64_t c, int64_t p, int64_t n, lanes_t<A> v) {
          store_lanes<A, kRaw>(v, to + c * stride_c + p, n);
        });
  } else {
    for (int64_t p = 0; p < np; ++p)
      for (int64_t c = 0; c < nc; ++c) put_lane<kRaw>(buf[p * ld + c], out + off[p] + c * stride_c);
  }
}

// Class sums. A position belongs to one of 3 x 3 classes: first, inner or last row, times first, inner or
// last column (a lone row or column counts as inner). A tap sum adds the classes that the tap sees: only
// additions, so nothing cancels. Sums of parts lie [sample][part][class][channel] and are added up in part
// order.
inline int64_t edge_class(int64_t i, int64_t n) {
  return n == 1 || (i > 0 && i < n - 1) ? 1 : (i == 0 ? 0 : 2);
}

inline int64_t class_count(int taps) { return taps == 9 ? 9 : 1; }

inline void position_classes(const Grid& g, int taps, int64_t p0, int64_t np, int64_t* cls) {
  for (int64_t p = 0; p < np; ++p)
    cls[p] = taps == 9 ? 3 * edge_class((p0 + p) / g.W % g.H, g.H) + edge_class((p0 + p) % g.W, g.W) : 0;
}

// Does tap index i (0: all but the last, 1: all, 2: all but the first) see class k of a dimension of n?
inline bool tap_sees(int64_t i, int64_t k, int64_t n) {
  return i == 1 || (n > 1 && (i == 0 ? k < 2 : k > 0));
}

// out[3 * i + j] from one channel's class sums, `stride` apart.
template <class A>
void taps_of_classes(const A* cls, int64_t stride, const Grid& g, A* out) {
  for (int64_t i = 0; i < 3; ++i)
    for (int64_t j = 0; j < 3; ++j) {
      A sum = 0;
      for (int64_t k = 0; k < 3; ++k)
        for (int64_t l = 0; l < 3; ++l)
          if (tap_sees(i, k, g.H) && tap_sees(j, l, g.W)) sum += cls[(3 * k + l) * stride];
      out[3 * i + j] = sum;
    }
}

// Adds up the parts of one sample for channels [c0, c0 + nc), nc <= kTileChannels; out: (C, taps).
template <class A>
void combine_parts(const A* part_sums, int64_t parts, int64_t C, int taps, const Grid& g, int64_t c0,
                   int64_t nc, A* out) {
  A sum[9][kTileChannels] = {};
  const int64_t classes = class_count(taps);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t k = 0; k < classes; ++k) {
      const A* from = part_sums + (part * classes + k) * C + c0;
      for (int64_t c = 0; c < nc; ++c) sum[k][c] += from[c];
    }
  for (int64_t c = 0; c < nc; ++c) {
    if (taps == 9)
      taps_of_classes(&sum[0][c], kTileChannels, g, out + (c0 + c) * 9);
    else
      out[c0 + c] = sum[0][c];
  }
}

}  // namespace
}  // namespace dsts::cpu::DSTS_ISA
