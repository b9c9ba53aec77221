// Who computes what: tiles dealt in whole waves, and the iterations of the rest shared out evenly (stream-K).
//
// Samples differ in how many K blocks their tiles have, since their neurons' lists differ. Each of `programs`
// persistent blocks takes one tile of every wave; what the waves leave over, fewer than two tiles a program,
// is cut into one contiguous range of iterations a program, the shorter the longer its waves were. Every
// block works it out alike, so nothing depends on timing. (Stream-K: Osama et al., PPoPP 2023; the weights
// are ours.)
#pragma once

#include "cuda/device.h"

namespace dsts::cuda {

// Inclusive sums of n ints in shared memory, by all threads; `room` holds one int a thread.
template <int THREADS>
__device__ inline void scan(int* values, int n, int* room) {
  const int each = ceil_div(n, THREADS), first = min(n, static_cast<int>(threadIdx.x) * each);
  const int last = min(n, first + each);
  int own = 0;
  __syncthreads();
  for (int i = first; i < last; ++i) own += values[i];
  room[threadIdx.x] = own;
  for (int step = 1; step < THREADS; step *= 2) {
    __syncthreads();
    const int before = static_cast<int>(threadIdx.x) >= step ? room[threadIdx.x - step] : 0;
    __syncthreads();
    room[threadIdx.x] += before;
  }
  int sum = room[threadIdx.x] - own;
  for (int i = first; i < last; ++i) values[i] = sum += values[i];
  __syncthreads();
}

struct Schedule {
  int programs, waves, per_sample, shared_tiles;
  int* starts;  // shared, [programs + 1]: where each program's range of shared iterations starts
  int* ends;    // shared, [2 * programs]: where each shared tile's iterations end

  static __host__ __device__ int ints(int programs, int threads) { return 3 * programs + 1 + threads; }

  // `length` gives the iterations of a sample's tiles. All threads; `memory` is shared.
  template <int THREADS, class Length>
  __device__ void build(const Length& length, int tiles, int* memory) {
    ends = memory, starts = ends + 2 * programs;
    int* room = starts + programs + 1;
    shared_tiles = tiles - waves * programs;
    for (int i = threadIdx.x; i < shared_tiles; i += THREADS)
      ends[i] = length((waves * programs + i) / per_sample);
    scan<THREADS>(ends, shared_tiles, room);
    const int shared = ends[shared_tiles - 1];
    int* weights = starts + 1;
    if (waves == 0) {  // a range that is too short costs more to add up than it saves
      const int most = min(max(shared / kLeast, 1), programs);
      for (int q = threadIdx.x; q < programs; q += THREADS) weights[q] = q < most;
    } else {
      for (int q = threadIdx.x; q < programs; q += THREADS) {
        int dealt = 0;
        for (int wave = 0; wave < waves; ++wave) dealt += length((wave * programs + q) / per_sample);
        weights[q] = dealt;
      }
      scan<THREADS>(weights, programs, room);
      const int mean = (weights[programs - 1] + shared) / programs + 1;
      int mine[kMost];
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        const int q = threadIdx.x + i * THREADS;
        mine[i] = q < programs ? max(mean - (weights[q] - (q ? weights[q - 1] : 0)), 0) : 0;
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kMost; ++i)
        if (threadIdx.x + i * THREADS < static_cast<unsigned>(programs))
          weights[threadIdx.x + i * THREADS] = mine[i];
    }
    scan<THREADS>(weights, programs, room);
    const int64 total = weights[programs - 1];
    __syncthreads();
    for (int q = threadIdx.x; q < programs; q += THREADS)
      weights[q] = static_cast<int>(static_cast<int64>(shared) * weights[q] / total);
    if (threadIdx.x == 0) starts[0] = 0;
    __syncthreads();
  }

  static constexpr int kMost = 8;  // programs a thread looks after at most

  __device__ int tile_start(int i) const { return i ? ends[i - 1] : 0; }

  // The shared tile that an iteration belongs to.
  __device__ int tile_of(int iteration) const {
    int low = 0, high = shared_tiles - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (ends[middle] > iteration)
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }

  // Whether program q has iterations of the shared tile that spans [from, to).
  __device__ bool has_part(int q, int from, int to) const {
    return starts[q] < starts[q + 1] && starts[q + 1] > from && starts[q] < to;
  }
};

}  // namespace dsts::cuda
