// Filters between the layout that parameters have, (N, O, C, taps), and those that kernels read, by slot and
// tap: of the neurons that the batch chose. On the way back, gradients of all others, and of channels that no
// list holds, are written as zeros in the same pass. A block turns a tile round in shared memory, so both
// ways are whole lines.
#include "cuda/device.h"
#include "cuda/launch.h"

namespace dsts::cuda {

constexpr int kFilterThreads = 256;
constexpr int kFilterTile = 64;  // outputs, and elements of channels and taps
constexpr int kFilterPitch = kFilterTile + 1;

// Where element (output o, element f of channels and taps) lies in filters laid out by slot and tap.
__device__ __forceinline__ int64 place_by_tap(const FilterParams& p, int slot, int o, int f) {
  const int c = f / p.taps, tap = f - c * p.taps;
  const int64 matrix = static_cast<int64>(slot) * p.all_taps + p.first_tap + tap;
  return p.by_channel ? (matrix * p.channels + c) * p.pitch + o : (matrix * p.outputs + o) * p.pitch + c;
}

// Outputs and elements of a laid-out filter, with the padding of its rows.
__host__ __device__ __forceinline__ int padded_outputs(const FilterParams& p) {
  return p.by_channel ? p.pitch : p.outputs;
}
__host__ __device__ __forceinline__ int padded_elements(const FilterParams& p) {
  return (p.by_channel ? p.channels : p.pitch) * p.taps;
}

// Threads along outputs where those are neighbours, else along elements.
__device__ __forceinline__ void cell_of(const FilterParams& p, bool by_tap, int i, int* o, int* f) {
  const bool outputs_first = by_tap && p.by_channel;
  *o = outputs_first ? i % kFilterTile : i / kFilterTile;
  *f = outputs_first ? i / kFilterTile : i % kFilterTile;
}

template <class From, class To>
__global__ void __launch_bounds__(kFilterThreads)
    pack_filters_kernel(const __grid_constant__ FilterParams p) {
  DSTS_DYNAMIC_SHARED(shared);
  To* tile = reinterpret_cast<To*>(shared);
  const int slot = blockIdx.y, n = p.index[slot];
  if (n < 0) return;
  const int size = p.channels * p.taps, tiles = ceil_div(padded_elements(p), kFilterTile);
  const int o0 = blockIdx.x / tiles * kFilterTile, f0 = blockIdx.x % tiles * kFilterTile;
  const From* from = static_cast<const From*>(p.from) + static_cast<int64>(n) * p.outputs * size;
  int o, f;
  for (int i = threadIdx.x; i < kFilterTile * kFilterTile; i += kFilterThreads) {
    cell_of(p, false, i, &o, &f);
    if (o0 + o < p.outputs && f0 + f < size)
      tile[o * kFilterPitch + f] = from_float<To>(to_float(from[static_cast<int64>(o0 + o) * size + f0 + f]));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kFilterTile * kFilterTile; i += kFilterThreads) {
    cell_of(p, true, i, &o, &f);
    if (o0 + o >= padded_outputs(p) || f0 + f >= padded_elements(p)) continue;
    const bool exists = o0 + o < p.outputs && f0 + f < size;
    static_cast<To*>(p.to)[place_by_tap(p, slot, o0 + o, f0 + f)] =
        exists ? tile[o * kFilterPitch + f] : from_float<To>(0.0f);
  }
}

template <class T>
__global__ void __launch_bounds__(kFilterThreads)
    unpack_filters_kernel(const __grid_constant__ FilterParams p) {
  DSTS_DYNAMIC_SHARED(shared);
  T* tile = reinterpret_cast<T*>(shared);
  const int n = blockIdx.y, slot = p.index[n];
  const int size = p.channels * p.taps, tiles = ceil_div(padded_elements(p), kFilterTile);
  const int o0 = blockIdx.x / tiles * kFilterTile, f0 = blockIdx.x % tiles * kFilterTile;
  int o, f;
  for (int i = threadIdx.x; i < kFilterTile * kFilterTile; i += kFilterThreads) {
    cell_of(p, true, i, &o, &f);
    if (o0 + o >= p.outputs || f0 + f >= size) continue;
    bool read = slot >= 0;
    if (read && p.listed) read = p.listed[static_cast<int64>(slot) * p.channels + (f0 + f) / p.taps] & p.bit;
    tile[o * kFilterPitch + f] =
        read ? static_cast<const T*>(p.from)[place_by_tap(p, slot, o0 + o, f0 + f)] : from_float<T>(0.0f);
  }
  __syncthreads();
  T* to = static_cast<T*>(p.to) + static_cast<int64>(n) * p.outputs * size;
  for (int i = threadIdx.x; i < kFilterTile * kFilterTile; i += kFilterThreads) {
    cell_of(p, false, i, &o, &f);
    if (o0 + o < p.outputs && f0 + f < size)
      to[static_cast<int64>(o0 + o) * size + f0 + f] = tile[o * kFilterPitch + f];
  }
}

#define INSTANTIATE(T)                                                                      \
  template __global__ void pack_filters_kernel<T, T>(const __grid_constant__ FilterParams); \
  template __global__ void unpack_filters_kernel<T>(const __grid_constant__ FilterParams);
DSTS_ELEMENTS(INSTANTIATE)
#undef INSTANTIATE
template __global__ void pack_filters_kernel<float, __half>(const __grid_constant__ FilterParams);
template __global__ void pack_filters_kernel<float, __nv_bfloat16>(const __grid_constant__ FilterParams);

#ifndef __CUDACC_RTC__
namespace {

dim3 filter_grid(const FilterParams& p, int rows) {
  const int across = ceil_div(padded_outputs(p), kFilterTile),
            along = ceil_div(padded_elements(p), kFilterTile);
  return dim3(static_cast<unsigned>(across * along), static_cast<unsigned>(rows));
}

template <class T>
constexpr size_t kFilterShared = sizeof(T) * kFilterTile * kFilterPitch;

}  // namespace

void pack_filters(const FilterParams& p, int slots, int from_dtype, int to_dtype, void* stream) {
  for_element(to_dtype, [&](auto element) {
    using T = decltype(element);
    launch(from_dtype == to_dtype ? pack_filters_kernel<T, T> : pack_filters_kernel<float, T>,
           filter_grid(p, slots), kFilterThreads, kFilterShared<T>, stream, p);
  });
}

void unpack_filters(const FilterParams& p, int neurons, int dtype, void* stream) {
  for_element(dtype, [&](auto element) {
    using T = decltype(element);
    launch(unpack_filters_kernel<T>, filter_grid(p, neurons), kFilterThreads, kFilterShared<T>, stream, p);
  });
}
#endif

}  // namespace dsts::cuda
