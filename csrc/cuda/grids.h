// How many CTAs a convolution is launched with, and how many whole waves of tiles they take: persistent_grid
// of dsts_kernels/backends/gpu/grids.py, for programs without Python. A test holds one to the other.
#pragma once

#include "cuda/tiles.h"

namespace dsts::cuda {

constexpr int tiles_of(int n) { return (n + kTile - 1) / kTile; }

// CTAs of a convolution in tensor cores that a multiprocessor with so many KiB of shared memory holds.
constexpr int resident_ctas(int capability, int smem_kib) {
  return smem_kib >= 2 * product_smem_kib(capability) ? 2 : 1;
}

struct PersistentGrid {
  int num_ctas;
  int waves;             // whole waves: tiles that each CTA computes alone
  int arrival_counters;  // integers, zero at the start
};

// `k_blocks`: the most that a tile's reduction has, over all taps. `chip_ctas`: CTAs that the chip holds.
constexpr PersistentGrid persistent_grid(int batch, int positions, int outputs, int k_blocks, int chip_ctas) {
  const int across = tiles_of(outputs), tiles = batch * tiles_of(positions) * across;
  const int useful = (tiles * k_blocks + kMinKBlocks - 1) / kMinKBlocks;
  const int most = useful < chip_ctas ? useful : chip_ctas;
  const int num_ctas = most < 1 ? 1 : most > kMaxCtas ? kMaxCtas : most;
  const int waves = tiles / num_ctas - 1;
  return {num_ctas, waves > 0 ? waves : 0, num_ctas + batch * across};
}

}  // namespace dsts::cuda
