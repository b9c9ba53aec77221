// Which CTA computes what: tiles dealt in whole waves, the iterations of the rest split evenly (stream-K).
//
// Samples differ in how many K blocks their tiles have, since their neurons' lists differ. Each of `num_ctas`
// persistent CTAs takes one tile of every wave. Where they then end nearly together nothing is shared
// (dealt_waves). Else the last whole wave is not dealt: what is left, fewer than two tiles a CTA, is cut into
// one contiguous range of iterations a CTA, the shorter the longer its waves were. Every CTA works it out
// alike, so nothing depends on timing. (Stream-K: Osama et al., PPoPP 2023; the weights are ours.)
// iteration_ranges of dsts_kernels/backends/gpu/grids.py is the same; tests hold one to the other.
#pragma once

#include "cuda/device.h"

namespace dsts::cuda {

// Inclusive sums of n ints in shared memory, by all threads; `scratch` holds one int a thread.
template <int THREADS>
__device__ inline void scan(int* values, int n, int* scratch) {
  const int each = ceil_div(n, THREADS), first = min(n, static_cast<int>(threadIdx.x) * each);
  const int last = min(n, first + each);
  int total = 0;
  __syncthreads();
  for (int i = first; i < last; ++i) total += values[i];
  scratch[threadIdx.x] = total;
  for (int step = 1; step < THREADS; step *= 2) {
    __syncthreads();
    const int before = static_cast<int>(threadIdx.x) >= step ? scratch[threadIdx.x - step] : 0;
    __syncthreads();
    scratch[threadIdx.x] += before;
  }
  int sum = scratch[threadIdx.x] - total;
  for (int i = first; i < last; ++i) values[i] = sum += values[i];
  __syncthreads();
}

// From sm_90 on the loop of a convolution spilled registers with the choice in front of it. Launchers say so too.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kChoosesWaves = false;
#else
constexpr bool kChoosesWaves = true;
#endif

struct Schedule {
  int num_ctas, waves, per_sample, split_tiles;
  int* starts;  // [num_ctas + 1], shared: where each CTA's range of the split tiles' iterations starts
  int* ends;    // [2 * num_ctas], shared: where each split tile's iterations end

  // All waves where CTAs then end nearly together, the busiest at most `idle_percent` of a mean tile above
  // the mean; else `waves`, and always where `idle_percent` is negative or the chip has no choice.
  template <int THREADS, class Length>
  __device__ int dealt_waves(const Length& length, int tiles, int idle_percent, int* scratch) const {
    if (!kChoosesWaves || idle_percent < 0) return waves;
    for (int q = threadIdx.x; q < num_ctas; q += THREADS) {
      int dealt = 0;
      for (int tile = q; tile < tiles; tile += num_ctas) dealt += length(tile / per_sample);
      ends[q] = dealt;
    }
    scan<THREADS>(ends, num_ctas, scratch);
    const int64 total = ends[num_ctas - 1];
    int* above = starts;
    for (int q = threadIdx.x; q < num_ctas; q += THREADS) {
      const int64 dealt = ends[q] - (q ? ends[q - 1] : 0);
      above[q] = (dealt * num_ctas - total) * 100 * tiles > total * num_ctas * idle_percent;
    }
    scan<THREADS>(above, num_ctas, scratch);
    const int dealt = above[num_ctas - 1] ? waves : ceil_div(tiles, num_ctas);
    __syncthreads();
    return dealt;
  }

  // `length` gives the iterations of a sample's tiles. All threads; `memory`: schedule_bytes, shared. Returns
  // the waves that are dealt: kept here, they would take a register from the loop.
  template <int THREADS, class Length>
  __device__ int build(const Length& length, int tiles, int idle_percent, int* memory) {
    static_assert(kMaxCtas <= kCtasPerThread * THREADS, "threads look after all CTAs");
    ends = memory, starts = ends + 2 * num_ctas;
    int* scratch = starts + num_ctas + 1;
    const int waves = dealt_waves<THREADS>(length, tiles, idle_percent, scratch);
    split_tiles = tiles - waves * num_ctas;
    if (split_tiles <= 0) {
      for (int q = threadIdx.x; q <= num_ctas; q += THREADS) starts[q] = 0;
      __syncthreads();
      return waves;
    }
    for (int i = threadIdx.x; i < split_tiles; i += THREADS)
      ends[i] = length((waves * num_ctas + i) / per_sample);
    scan<THREADS>(ends, split_tiles, scratch);
    const int iterations = ends[split_tiles - 1];
    int* weights = starts + 1;
    if (waves == 0) {  // a range that is too short costs more to add up than it saves
      const int busy = min(max(iterations / kMinKBlocks, 1), num_ctas);
      for (int q = threadIdx.x; q < num_ctas; q += THREADS) weights[q] = q < busy;
    } else {
      for (int q = threadIdx.x; q < num_ctas; q += THREADS) {
        int dealt = 0;
        for (int wave = 0; wave < waves; ++wave) dealt += length((wave * num_ctas + q) / per_sample);
        weights[q] = dealt;
      }
      scan<THREADS>(weights, num_ctas, scratch);
      const int mean = (weights[num_ctas - 1] + iterations) / num_ctas + 1;
      int rest[kCtasPerThread];
#pragma unroll
      for (int i = 0; i < kCtasPerThread; ++i) {
        const int q = threadIdx.x + i * THREADS;
        rest[i] = q < num_ctas ? max(mean - (weights[q] - (q ? weights[q - 1] : 0)), 0) : 0;
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kCtasPerThread; ++i)
        if (threadIdx.x + i * THREADS < static_cast<unsigned>(num_ctas))
          weights[threadIdx.x + i * THREADS] = rest[i];
    }
    scan<THREADS>(weights, num_ctas, scratch);
    const int64 total = weights[num_ctas - 1];
    __syncthreads();
    for (int q = threadIdx.x; q < num_ctas; q += THREADS)
      weights[q] = static_cast<int>(static_cast<int64>(iterations) * weights[q] / total);
    if (threadIdx.x == 0) starts[0] = 0;
    __syncthreads();
    return waves;
  }

  static constexpr int kCtasPerThread = 8;  // that a thread looks after at most

  __device__ int tile_start(int i) const { return i ? ends[i - 1] : 0; }

  // The split tile that an iteration belongs to.
  __device__ int tile_of(int iteration) const {
    int low = 0, high = split_tiles - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (ends[middle] > iteration)
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }

  // Whether CTA q has iterations of the split tile that spans [from, to).
  __device__ bool has_part(int q, int from, int to) const {
    return starts[q] < starts[q + 1] && starts[q + 1] > from && starts[q] < to;
  }
};

}  // namespace dsts::cuda
