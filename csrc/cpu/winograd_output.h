// Winograd's output stage: products transformed back, both operators summed, and the epilogue.
#pragma once

#include "cpu/epilogue_tile.h"
#include "cpu/winograd_blocking.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

// Outputs and columns of the plane that go through the epilogue at a time, as it suits the side that is
// contiguous.
struct Piece {
  int lanes, columns;
  // Floats of a unit's products after one of two passes, and of its outputs.
  constexpr int half_floats() const {
    return SpatialTiles::largest() * SpatialTiles::most_points(columns) * lanes;
  }
  constexpr int floats() const {
    return TemporalTiles::largest() * SpatialTiles::largest() * columns * lanes;
  }
};
constexpr Piece kChannelPiece{32, 16};   // where channels are innermost
constexpr Piece kPositionPiece{16, 64};  // where they are not
static_assert(SpatialTiles::divide(kChannelPiece.columns) && SpatialTiles::divide(kPositionPiece.columns),
              "a piece is whole tiles");
static_assert(kChannelPiece.lanes <= kTileChannels && kPositionPiece.lanes <= kTileChannels,
              "a piece is one tile of the epilogue");

inline Piece piece_of(const Epilogue& e) { return channels_innermost(e) ? kChannelPiece : kPositionPiece; }

// A task's products of one operator.
struct Products {
  const float* M;
  int64_t point, ld, first_row;  // the round's row that M starts at
  const float* at(int64_t row, int64_t lane) const { return M + (row - first_row) * ld + lane; }
};

// Positions p0 and on of a frame's band of `columns` columns, which ends at `end`.
inline Positions positions_at(const Epilogue& e, const Geometry& g, int64_t t, int64_t y0, int64_t x0,
                              int64_t columns, int64_t p0, int64_t end) {
  const Strides &o = e.out.strides, &s = e.skip.strides;
  Positions at;
  at.np = min64(kTilePositions, end - p0), at.out_run = at.skip_run = true;
  for (int64_t p = 0; p < at.np; ++p) {
    const int64_t h = y0 + (p0 + p) / columns, w = x0 + (p0 + p) % columns;
    at.out_off[p] = t * o.t + h * o.h + w * o.w;
    at.skip_off[p] = t * s.t + h * s.h + w * s.w;
    at.out_run = at.out_run && at.out_off[p] == at.out_off[0] + p;
    at.skip_run = at.skip_run && at.skip_off[p] == at.skip_off[0] + p;
    at.cls[p] = e.taps == 9 ? 3 * edge_class(h, g.H) + edge_class(w, g.W) : 0;
  }
  return at;
}

// One unit's outputs [o0 + lane, o0 + lane + nc).
template <class U>
void output_rows(const Epilogue& e, const Geometry& g, const Unit& u, const Products* spatial,
                 const Products* temporal, int64_t o0, int64_t lane, int64_t nc, float* sums) {
  const Target<float, U> target(e, u.i);
  const Piece piece = piece_of(e);
  const int64_t y0 = u.y0, rows = u.rows, L = piece.lanes;
  const int64_t nw = inputs_of(g.tile_w), tiles = piece.columns / g.tile_w;
  const int64_t length = ceil_div(nc, kWide) * kWide;
  // [y][point of w][tile][lane] and [frame][y][x][lane]
  alignas(64) float half[max_of(kChannelPiece.half_floats(), kPositionPiece.half_floats())];
  alignas(64) float z[max_of(kChannelPiece.floats(), kPositionPiece.floats())];
  const int64_t z_row = piece.columns * L, z_frame = g.tile_h * z_row;
  for (int64_t tx = 0; tx < g.tiles_x; tx += tiles) {
    const int64_t count = min64(tiles, g.tiles_x - tx), x0 = tx * g.tile_w;
    const int64_t columns = min64(count * g.tile_w, g.W - x0);
    if (spatial)
      for (int64_t f = 0; f < u.frames; ++f) {
        const int64_t first = u.spatial_row + f * g.tiles_x + tx;
        const float* M = spatial->at(first, lane);
        const int64_t half_y = nw * count * L;
        for (int64_t j = 0; j < nw; ++j)
          pass_of<SpatialTiles, Matrix::output>(g.tile_h, M + j * spatial->point, half + j * count * L,
                                                {count, length, nw * spatial->point, spatial->ld, half_y, L});
        for (int64_t y = 0; y < rows; ++y)
          pass_of<SpatialTiles, Matrix::output>(g.tile_w, half + y * half_y, z + f * z_frame + y * z_row,
                                                {count, length, count * L, L, L, g.tile_w * L});
      }
    if (temporal)
      for (int64_t y = 0; y < rows; ++y) {
        const float* M = temporal->at(u.temporal_row + y * g.W + x0, lane);
        const Lines lines{columns, length, temporal->point, temporal->ld, z_frame, L};
        spatial ? pass_of<TemporalTiles, Matrix::output, true>(g.tile_t, M, z + y * z_row, lines)
                : pass_of<TemporalTiles, Matrix::output, false>(g.tile_t, M, z + y * z_row, lines);
      }
    for (int64_t f = 0; f < u.frames; ++f)
      for (int64_t p0 = 0; p0 < rows * columns; p0 += kTilePositions) {
        const float* from = z + f * z_frame;
        epilogue_tile(
            e, target, positions_at(e, g, u.t0 + f, y0, x0, columns, p0, rows * columns), o0 + lane, nc, sums,
            [&](int64_t p) { return from + (p0 + p) / columns * z_row + (p0 + p) % columns * L; },
            [](int64_t) -> const float* { return nullptr; });
      }
  }
}

}  // namespace
}  // namespace dsts::cpu::DSTS_ISA
