// How Winograd's work is cut up. Units are taken in chunks, whose transformed inputs lie in memory together;
// a task is some units of a chunk and some outputs.
#pragma once

#include <time.h>

#include "cpu/product.h"
#include "cpu/winograd.h"
#include "cpu/winograd_transform.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

constexpr int64_t kSliceChannels = 128;  // of a filter that is transformed and used at a time
constexpr int64_t kTaskOutputs = 64;
constexpr int64_t kChunkFloats = 5 << 20;  // transformed inputs of a chunk, at most
constexpr int64_t kCachedFloats =
    1 << 20;  // and no more than these, unless the chunk has fewer positions than
constexpr int64_t kEnoughPositions = 2048;  // these: filters are transformed again for every chunk
constexpr int64_t kTaskFloats = 1 << 19;    // products of a task
constexpr int64_t kPadding = 16;  // between points: a power of two apart they would share cache sets

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

// Everything but float64, which is not computed in float32.
template <class F>
void with_float(int dtype, F f) {
  dtype == kBFloat16 ? f(Tag<bf16>{}) : dtype == kFloat16 ? f(Tag<f16>{}) : f(Tag<float>{});
}

// One tile of frames of one sample, over one row of tiles of its plane.
struct Unit {
  int64_t number, i, t0, frames, y0, rows;
  int64_t spatial_row, temporal_row;  // its first rows of the chunk's matrices
};

struct Geometry {
  int64_t T, H, W;
  int tile_t, tile_h, tile_w;
  int64_t tiles_t, tiles_y, tiles_x;

  explicit Geometry(const Winograd& a)
      : T(a.out.T),
        H(a.out.H),
        W(a.out.W),
        tile_t(a.tile_t),
        tile_h(a.tile_h),
        tile_w(a.tile_w),
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

// One operator's matrices: V[slice][point][row][ld] of a chunk, U[point][block][channel][kBlock] of a
// slice and M[point][row][blocks * kBlock] of a task. A spatial row is a tile of one frame, a temporal row a
// position of the plane over a tile of frames.
struct Operand {
  const WinogradOperator& op;
  int64_t points, K;
  int64_t slices, width;  // K channels in slices of at most `width`
  int64_t ld;             // of V: not a multiple of 512 bytes, whose rows would share cache sets
  int64_t unit_rows;      // of a unit that the sample's edge does not cut
  int64_t v_point = 0, u_point = 0, m_point = 0;
  float* V = nullptr;

  Operand(const WinogradOperator& o, int64_t point_count, int64_t rows)
      : op(o), points(o.count ? point_count : 0), K(o.count), unit_rows(rows) {
    slices = ceil_div(K, kSliceChannels);
    width = slices ? ceil_div(ceil_div(K, slices), kBlock) * kBlock : 0;
    slices = width ? ceil_div(K, width) : 0;
    ld = width % 64 ? width : width + kBlock;
  }
  int64_t channels(int64_t slice) const { return min64(width, K - slice * width); }

  // For chunks and tasks of so many units, and outputs.
  void resize(int64_t chunk, int64_t task, int64_t blocks) {
    v_point = chunk * unit_rows * ld + kPadding;
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
