// Winograd's input stage: channels gathered from features in any layout, scaled, and transformed into V.
#pragma once

#include "cpu/pick.h"
#include "cpu/tile.h"
#include "cpu/winograd_blocking.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

// A patch is some channels and some output columns (or positions), as it suits the side that is contiguous.
struct Patch {
  int channels, columns;

  // Floats of its transforms' input and output: rows of a spatial tile with its edge, or frames of a temporal
  // one.
  constexpr int floats() const {
    const int row = (columns + SpatialTiles::edge()) * channels;
    const int spatial = SpatialTiles::most_inputs() * row;
    const int temporal = TemporalTiles::most_inputs() * columns * channels;
    return spatial > temporal ? spatial : temporal;
  }
};
constexpr Patch kChannelPatch{32, 16};   // of features with channels innermost
constexpr Patch kPositionPatch{16, 64};  // of others
static_assert(SpatialTiles::divide(kChannelPatch.columns) && SpatialTiles::divide(kPositionPatch.columns),
              "a patch is whole tiles");
constexpr int kPatchFloats = max_of(kChannelPatch.floats(), kPositionPatch.floats());
constexpr int kPatchColumns = max_of(kChannelPatch.columns, kPositionPatch.columns);
constexpr int kPatchChannels = max_of(kChannelPatch.channels, kPositionPatch.channels);

inline Patch patch_of(const Features& x) { return x.strides.c == 1 ? kChannelPatch : kPositionPatch; }

// Features that are transformed, of some samples.
struct Source {
  Features x;  // [.., C, T, H, W]
  Samples samples;
};

// A block of an operator's channels, for one sample.
template <class T>
struct Channels {
  int64_t count, padded, ld;  // ld: channels of the patch
  int64_t offset[kPatchChannels];
  int64_t last;
  float scale[kPatchChannels + kWide] = {};  // Pick reads past the end
  bool scaled, picks;
  Pick<float, kPatchChannels> pick;

  Channels(const Strides& strides, const Operator& op, int64_t sample, int64_t k0, int64_t end,
           int64_t patch_channels) {
    ld = patch_channels;
    count = min64(ld, end - k0), padded = ceil_div(count, kWide) * kWide;
    last = 0, scaled = op.scale != nullptr;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t channel = op.channels ? op.channels[k0 + j] : k0 + j;
      offset[j] = channel * strides.c;
      last = max64(last, offset[j]);
      if (!scaled) continue;
      const float s = load(static_cast<const T*>(op.scale)[sample * op.scale_stride_b + channel]);
      scale[j] = op.complement ? 1 - s : s;
    }
    picks = kHasPermute && strides.c == 1 && last + 1 >= kWide;
    if (picks) pick.prepare(offset, count, last);
  }
};

// to[p][ld] = the block's channels at n positions `off` of a sample; up to a vector past the end is
// overwritten.
template <class T, bool kScaled>
void load_positions(const T* x, const int64_t* off, int64_t n, const Channels<T>& c, float* to) {
  bool run = !c.picks;
  for (int64_t p = 1; p < n; ++p) run = run && off[p] == off[0] + p;
  if (c.picks) {
    // Rows of channels lie pages apart, further than hardware looks ahead: ask for what the next block reads.
    const int64_t span = c.last + 1 - c.offset[0];
    for (int64_t p = 0; p < n; ++p) {
      prefetch_row(x + off[p] + c.last + 1, span);
      c.pick.template run<false, kScaled, true>(x + off[p], x + off[p], c.scale, c.count, to + p * c.ld);
    }
  } else if (run && n > 1) {
    const T* from = x + off[0];
    const T* end = from + c.last + n;
    transpose<float, false>(
        c.count, n,
        [&](int64_t j, int64_t p, int64_t m) {
          const Vector v = load_lanes<float, false>(from + c.offset[j] + p, m, end);
          return kScaled ? v * c.scale[j] : v;
        },
        [&](int64_t p, int64_t j, int64_t m, Vector v) {
          store_lanes<float, false>(v, to + p * c.ld + j, m);
        });
  } else {
    for (int64_t p = 0; p < n; ++p)
      for (int64_t j = 0; j < c.count; ++j) {
        const float v = load(x[off[p] + c.offset[j]]);
        to[p * c.ld + j] = kScaled ? v * c.scale[j] : v;
      }
  }
}

template <class T>
void load_positions(const T* x, const int64_t* off, int64_t n, const Channels<T>& c, float* to) {
  c.scaled ? load_positions<T, true>(x, off, n, c, to) : load_positions<T, false>(x, off, n, c, to);
}

// f(k0, end) for the blocks of so many channels of every slice, which ends at `end`.
template <class F>
void for_blocks(const Blocking& m, int64_t channels, F f) {
  for (int64_t slice = 0; slice < m.slices; ++slice) {
    const int64_t end = slice * m.width + m.channels(slice);
    for (int64_t k0 = slice * m.width; k0 < end; k0 += channels) f(k0, end);
  }
}

// Inputs of a tile and where it starts: with kGradient what is transformed is the gradient of a tile's
// outputs, which has no edge around it.
template <bool kGradient>
int64_t span_of(int tile) {
  return kGradient ? tile : inputs_of(tile);
}
template <bool kGradient>
int64_t start_of(int tile) {
  return kGradient ? 0 : lead_of(tile);
}

// The spatial tiles of one frame of a unit.
template <class T, bool kGradient>
void spatial_input(const Source& source, const Geometry& g, const Unit& u, int64_t frame, const Blocking& m) {
  constexpr Matrix kMatrix = kGradient ? Matrix::gradient : Matrix::input;
  const int64_t sample = sample_at(source.samples, u.i);
  const Strides& s = source.x.strides;
  const T* x = static_cast<const T*>(source.x.data) + sample * s.b + (u.t0 + frame) * s.t;
  const Patch cut = patch_of(source.x);
  const int64_t span_h = span_of<kGradient>(g.tile_h), span_w = span_of<kGradient>(g.tile_w);
  const int64_t nh = inputs_of(g.tile_h), nw = inputs_of(g.tile_w), tiles = cut.columns / g.tile_w;
  const int64_t L = min64(cut.channels, m.width), first_row = u.spatial_row + frame * g.tiles_x;
  alignas(64) float patch[kPatchFloats + kWide], half[kPatchFloats];
  if (m.K % kWide) memset(patch, 0, sizeof patch);
  int64_t off[kPatchColumns + SpatialTiles::edge()];
  for_blocks(m, L, [&](int64_t k0, int64_t end) {
    const Channels<T> channels(s, m.op, sample, k0, end, L);
    for (int64_t tx = 0; tx < g.tiles_x; tx += tiles) {
      const int64_t count = min64(tiles, g.tiles_x - tx), columns = count * g.tile_w + span_w - g.tile_w;
      const int64_t x0 = tx * g.tile_w - start_of<kGradient>(g.tile_w),
                    y0 = u.y0 - start_of<kGradient>(g.tile_h);
      const int64_t lo = max64(0, -x0), hi = min64(columns, g.W - x0), row = columns * L;
      for (int64_t r = 0; r < span_h; ++r) {
        float* to = patch + r * row;
        const int64_t y = y0 + r;
        const bool inside = y >= 0 && y < g.H;
        memset(to, 0, size_t((inside ? lo : columns) * L) * sizeof(float));
        if (!inside) continue;
        for (int64_t c = lo; c < hi; ++c) off[c] = y * s.h + (x0 + c) * s.w;
        load_positions(x, off + lo, hi - lo, channels, to + lo * L);
        memset(to + hi * L, 0, size_t((columns - hi) * L) * sizeof(float));
      }
      pass_of<SpatialTiles, kMatrix>(g.tile_h, patch, half, {1, row, row, 0, row, 0});
      for (int64_t i = 0; i < nh; ++i)
        pass_of<SpatialTiles, kMatrix>(g.tile_w, half + i * row,
                                       m.v_at(k0, first_row + tx) + i * nw * m.v_point,
                                       {count, channels.padded, L, g.tile_w * L, m.v_point, m.ld});
    }
  });
}

// The temporal tiles of up to a patch's positions of a unit.
template <class T, bool kGradient>
void temporal_input(const Source& source, const Geometry& g, const Unit& u, int64_t p0, const Blocking& m) {
  const int64_t sample = sample_at(source.samples, u.i);
  const Strides& s = source.x.strides;
  const T* x = static_cast<const T*>(source.x.data) + sample * s.b;
  const Patch cut = patch_of(source.x);
  const int64_t span = span_of<kGradient>(g.tile_t), np = min64(cut.columns, u.rows * g.W - p0);
  const int64_t L = min64(cut.channels, m.width), row = np * L;
  alignas(64) float patch[kPatchFloats + kWide];
  if (m.K % kWide) memset(patch, 0, sizeof patch);
  int64_t off[kPatchColumns];
  for_blocks(m, L, [&](int64_t k0, int64_t end) {
    const Channels<T> channels(s, m.op, sample, k0, end, L);
    for (int64_t r = 0; r < span; ++r) {
      const int64_t t = u.t0 - start_of<kGradient>(g.tile_t) + r;
      if (t < 0 || t >= g.T) {
        memset(patch + r * row, 0, size_t(row) * sizeof(float));
        continue;
      }
      for (int64_t p = 0; p < np; ++p)
        off[p] = t * s.t + (u.y0 + (p0 + p) / g.W) * s.h + (p0 + p) % g.W * s.w;
      load_positions(x, off, np, channels, patch + r * row);
    }
    pass_of<TemporalTiles, kGradient ? Matrix::gradient : Matrix::input>(
        g.tile_t, patch, m.v_at(k0, u.temporal_row + p0), {np, channels.padded, row, L, m.v_point, m.ld});
  });
}

template <class T>
void input_stage(const Source& source, const Geometry& g, const Unit* units, int64_t n,
                 const Blocking& spatial, const Blocking& temporal, int threads) {
  const int64_t columns = patch_of(source.x).columns, runs = ceil_div(g.tile_h * g.W, columns);
  const int64_t positions = n * g.tile_t * g.tile_h * g.W;
  if (spatial.K)
    parallel_for(n * g.tile_t, positions * spatial.K, threads, [&](int64_t task) {
      const Unit& u = units[task / g.tile_t];
      if (task % g.tile_t < u.frames) spatial_input<T, false>(source, g, u, task % g.tile_t, spatial);
    });
  if (temporal.K)
    parallel_for(n * runs, positions * temporal.K, threads, [&](int64_t task) {
      const Unit& u = units[task / runs];
      const int64_t p0 = task % runs * columns;
      if (p0 < u.rows * g.W) temporal_input<T, false>(source, g, u, p0, temporal);
    });
}

}  // namespace
}  // namespace dsts::cpu::DSTS_ISA
