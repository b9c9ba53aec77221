// The tile sizes of fast convolution, once: buffers, switches, checks and Python's choice follow from these
// two lists. To add a size, add it to a list, and its points to csrc/winograd.h; what does not fit fails to
// compile.
#pragma once

#include <cstdint>

#include "../winograd.h"

namespace dsts::cpu {

// Whether the points of F(M, 3) are 0 and then pairs of p and -p, which the transforms build on.
template <int M>
constexpr bool has_paired_points() {
  if constexpr (M > 1) {
    if (WinogradPoints<M>::at[0] != 0) return false;
    for (int i = 1; i < M; i += 2)
      if (WinogradPoints<M>::at[i] != -WinogradPoints<M>::at[i + 1]) return false;
  }
  return true;
}

// A list of tile sizes: outputs of a tile along one dimension. A size of 1 is for a dimension of size 1.
template <int... kSizes>
struct TileList {
  static constexpr int kCount = sizeof...(kSizes);
  static constexpr int sizes[kCount] = {kSizes...};
  static constexpr int inputs[kCount] = {dsts::Winograd<kSizes>::kInputs...};

  static constexpr bool has(int64_t size) { return ((size == kSizes) || ...); }
  static constexpr bool divide(int n) { return ((n % kSizes == 0) && ...); }
  static constexpr int largest() { return sizes[kCount - 1]; }
  static constexpr int most_inputs() { return inputs[kCount - 1]; }
  static constexpr int edge() { return most_inputs() - largest(); }  // inputs of a tile beyond its outputs

  // Elements that an input transform makes of n outputs' worth of tiles, for the size that makes most.
  static constexpr int most_points(int n) {
    int most = 0;
    for (int i = 0; i < kCount; ++i)
      if (n / sizes[i] * inputs[i] > most) most = n / sizes[i] * inputs[i];
    return most;
  }
  // Ascending from 1, and even from there on.
  static constexpr bool valid() {
    for (int i = 1; i < kCount; ++i)
      if (sizes[i] <= sizes[i - 1] || sizes[i] % 2 || inputs[i] != sizes[i] + 2) return false;
    return sizes[0] == 1 && inputs[0] == 1 && (has_paired_points<kSizes>() && ...);
  }
};

using SpatialTiles = TileList<1, 2, 4>;  // along the height and along the width
using TemporalTiles = TileList<1, 2, 4, 8>;

static_assert(SpatialTiles::valid() && TemporalTiles::valid(),
              "tiles: 1, then even sizes, ascending; points: 0, then pairs of p and -p");

}  // namespace dsts::cpu
