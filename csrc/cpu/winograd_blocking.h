// How Winograd's work is cut into blocks: of channels (slices), of outputs, and of tiles. A unit is one tile
// of frames over one row of tiles of the plane. Units are taken in rounds, whose transformed inputs lie in
// memory together; a task is some units of a round and some outputs.
#pragma once

#include <time.h>

#include "cpu/product.h"
#include "cpu/winograd.h"
#include "cpu/winograd_transform.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

constexpr int64_t kSliceChannels = 128;  // of a filter that is transformed and used at a time
constexpr int64_t kTaskOutputs = 64;
// Transformed inputs of a round: at most kRoundFloats, and no more than kCachedFloats unless the round would
// have fewer than kEnoughPositions, as filters are transformed again for every round.
constexpr int64_t kRoundFloats = 5 << 20;
constexpr int64_t kCachedFloats = 1 << 20;
constexpr int64_t kEnoughPositions = 2048;
constexpr int64_t kTaskFloats = 1 << 19;  // products of a task
constexpr int64_t kPadding = 16;          // between points: a power of two apart they would share cache sets

constexpr int64_t kMacsAnElement = 32;  // of a product, for parallel_for's count of elements

inline double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// Adds the time since the last lap to a stage, where anyone asked for it.
struct Stopwatch {
  double* seconds;
  double last = seconds ? now() : 0;
  void lap(int stage) {
    if (!seconds) return;
    const double time = now();
    seconds[stage] += time - last;
    last = time;
  }
};

// One tile of frames of one sample, over one row of tiles of its plane.
struct Unit {
  int64_t number, i, t0, frames, y0, rows;
  int64_t spatial_row, temporal_row;  // its first rows of the round's matrices
};

struct Geometry {
  int64_t T, H, W;
  int tile_t, tile_h, tile_w;
  int64_t tiles_t, tiles_y, tiles_x;

  Geometry(const Features& out, const TileSizes& tiles)
      : T(out.T),
        H(out.H),
        W(out.W),
        tile_t(tiles.t),
        tile_h(tiles.h),
        tile_w(tiles.w),
        tiles_t(ceil_div(T, tile_t)),
        tiles_y(ceil_div(H, tile_h)),
        tiles_x(ceil_div(W, tile_w)) {}

  int64_t units_a_sample() const { return tiles_t * tiles_y; }

  Unit unit(int64_t index) const {
    const int64_t t0 = index / tiles_y % tiles_t * tile_t, y0 = index % tiles_y * tile_h;
    return {index, index / units_a_sample(), t0, min64(tile_t, T - t0), y0, min64(tile_h, H - y0), 0, 0};
  }

  // list[0 .. n]: units from `begin` on with their rows; the last is the end.
  void number_rows(Unit* list, int64_t begin, int64_t n) const {
    int64_t spatial_row = 0, temporal_row = 0;
    for (int64_t j = 0; j <= n; ++j) {
      Unit& u = list[j] = unit(begin + j);
      u.spatial_row = spatial_row, u.temporal_row = temporal_row;
      spatial_row += u.frames * tiles_x, temporal_row += u.rows * W;
    }
  }
};

// How one operator's matrices are blocked: V[slice][point][row][ld] of a round,
// U[point][block][channel][kBlock] of a slice and M[point][row][blocks * kBlock] of a task. A spatial row is
// a tile of one frame, a temporal row a position of the plane over a tile of frames.
struct Blocking {
  const Operator& op;
  int64_t points, K;
  int64_t slices, width;  // K channels in slices of at most `width`
  int64_t ld;             // of V: not a multiple of 512 bytes, whose rows would share cache sets
  int64_t unit_rows;      // of a unit that the sample's edge does not cut
  int64_t v_point = 0, u_point = 0, m_point = 0;
  float* V = nullptr;

  Blocking(const Operator& o, int64_t point_count, int64_t rows)
      : op(o), points(o.k_channels ? point_count : 0), K(o.k_channels), unit_rows(rows) {
    slices = ceil_div(K, kSliceChannels);
    width = slices ? ceil_div(ceil_div(K, slices), kBlock) * kBlock : 0;
    slices = width ? ceil_div(K, width) : 0;
    ld = width % 64 ? width : width + kBlock;
  }
  int64_t channels(int64_t slice) const { return min64(width, K - slice * width); }

  // For rounds and tasks of so many units, and outputs.
  void resize(int64_t round_units, int64_t task, int64_t blocks) {
    v_point = round_units * unit_rows * ld + kPadding;
    u_point = blocks * width * kBlock + kPadding;
    m_point = task * unit_rows * blocks * kBlock + kPadding;
  }
  int64_t v_floats() const { return slices * points * v_point; }
  int64_t u_floats() const { return points * u_point; }
  int64_t m_floats() const { return points * m_point; }
  float* v_at(int64_t channel, int64_t row) const {
    return V + channel / width * points * v_point + row * ld + channel % width;
  }
};

}  // namespace
}  // namespace dsts::cpu::DSTS_ISA
