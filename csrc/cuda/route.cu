// Features gathered by channel lists into panels, and for a frozen layer the choice of the neuron whose lists
// they are.
//
// Features whose channels lie side by side come as whole rows, 16 bytes a lane, into shared memory; the lists
// are taken there, and panels leave 16 bytes a lane. Rows do not depend on the choice, so a frozen layer's
// are on their way while it is worked out, and the next ones while panels are written.
//
// Else a block takes 64 positions of a sample and some K blocks of either list: it reads along whichever side
// of the features lies at stride 1, element by element, and writes whole rows of the panel.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/lines.h"

namespace dsts::cuda {

constexpr int kGatherThreads = 256;
constexpr int kGatherWarps = kGatherThreads / 32;
constexpr int kChunk = 256;  // of channels and taps, while scores are added up

template <class T>
struct Panel {
  static constexpr int kBlock = kBlockBytes / sizeof(T);  // channels of a K block
  static constexpr int kPitch = kBlock + 16 / sizeof(T);  // of a row in shared memory
  static constexpr int kBytes = kGather * kPitch * sizeof(T);
};

struct Lists {
  const int* order;  // of this sample
  int blocks_1, blocks_2, count, second;
  bool known;  // else the sample becomes NaN
};

// One K block: columns `first` and on of the order, `listed` of them, scaled by the gate or its complement.
template <class T>
__device__ void gather_block(const GatherParams& p, const Lists& lists, const float* gate, bool complement,
                             int b, int p0, int first, int listed, int column, T* tile) {
  using Q = Panel<T>;
  const T* x = static_cast<const T*>(p.x) + b * p.x_strides.b;
  const bool along_channels = p.x_strides.c == 1;
  __syncthreads();            // before the tile is written again
  constexpr int kAtOnce = 8;  // elements of a thread on their way together
  for (int first_i = threadIdx.x; first_i < kGather * Q::kBlock; first_i += kGatherThreads * kAtOnce) {
    T own[kAtOnce];
    float scale[kAtOnce];
    int cell[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = first_i + j * kGatherThreads;
      const int k = along_channels ? i % Q::kBlock : i / kGather,
                r = along_channels ? i / Q::kBlock : i % kGather;
      const int position = p0 + r;
      cell[j] = r * Q::kPitch + k;
      own[j] = from_float<T>(lists.known ? 0.0f : not_a_number());
      scale[j] = 1;
      if (!lists.known || k >= listed || position >= p.extent.positions) continue;
      const int c = lists.order[first + k];
      own[j] = x[c * p.x_strides.c + offset_of(p.x_strides, place_of(p.extent, position))];
      if (gate) scale[j] = complement ? 1 - gate[c] : gate[c];
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      tile[cell[j]] = gate ? from_float<T>(to_float(own[j]) * scale[j]) : own[j];
  }
  __syncthreads();
  constexpr int kRowVectors = kBlockBytes / 16;
  T* panel = static_cast<T*>(p.panel) + (static_cast<int64>(b) * p.extent.positions + p0) * p.pitch + column;
  for (int i = threadIdx.x; i < kGather * kRowVectors; i += kGatherThreads) {
    const int r = i / kRowVectors, k = i % kRowVectors * (16 / static_cast<int>(sizeof(T)));
    if (p0 + r < p.extent.positions)
      *reinterpret_cast<uint4*>(panel + static_cast<int64>(r) * p.pitch + k) =
          *reinterpret_cast<const uint4*>(tile + r * Q::kPitch + k);
  }
}

template <class T>
__device__ void gather(const GatherParams& p, const Lists& lists, const float* gate, int b, int p0, T* tile) {
  constexpr int kBlock = Panel<T>::kBlock;
  // The same block of either list in turn: both are sorted, so they read the same lines.
  for (int block = blockIdx.y; block < max(lists.blocks_1, lists.blocks_2); block += p.shares) {
    const int at = block * kBlock;
    if (block < lists.blocks_1) gather_block<T>(p, lists, gate, false, b, p0, at, lists.count - at, at, tile);
    if (block < lists.blocks_2)
      gather_block<T>(p, lists, gate, true, b, p0, lists.second + at, p.channels - lists.second - at,
                      (lists.blocks_1 + block) * kBlock, tile);
  }
}

// Whole rows: how many vectors of them a thread has on their way, and where a block keeps what it needs.
constexpr int kAsked = kRowsBytes / 16 / kGatherThreads;

template <class T>
struct Rows {
  static constexpr int kVector = Side<T>::kVector;

  T* tile;                 // [rows][channels and a vector behind them]
  unsigned short* places;  // [pitch] the channel of every column of the panel
  float* scales;           // [pitch] and its gate, in training
  int pitch, vectors;

  __host__ __device__ static int tile_bytes(const GatherParams& p) {
    return p.rows * (p.channels * static_cast<int>(sizeof(T)) + 16);
  }
  __host__ __device__ static int bytes(const GatherParams& p, bool gated) {
    return tile_bytes(p) + p.pitch * (gated ? 2 + 4 : 2);
  }

  __device__ __forceinline__ Rows(const GatherParams& p, unsigned char* shared) {
    tile = reinterpret_cast<T*>(shared);
    places = reinterpret_cast<unsigned short*>(shared + tile_bytes(p));
    scales = reinterpret_cast<float*>(places + p.pitch);
    pitch = p.channels + kVector, vectors = p.channels / kVector;
  }

  // This thread's vectors of the rows from position `p0` on; positions lie `x_strides.w` apart.
  __device__ __forceinline__ void ask(const GatherParams& p, int b, int p0,
                                      Vector<T> (&found)[kAsked]) const {
    const T* x = static_cast<const T*>(p.x) + b * p.x_strides.b;
#pragma unroll
    for (int k = 0; k < kAsked; ++k) {
      const int i = threadIdx.x + k * kGatherThreads, row = quotient(p.by_vectors, i);
      found[k] = zeros<T>();
      if (row < p.rows && p0 + row < p.extent.positions)
        found[k] = *reinterpret_cast<const Vector<T>*>(x + (p0 + row) * p.x_strides.w +
                                                       (i - row * vectors) * kVector);
    }
  }

  __device__ __forceinline__ void keep(const GatherParams& p, const Vector<T> (&found)[kAsked]) const {
#pragma unroll
    for (int k = 0; k < kAsked; ++k) {
      const int i = threadIdx.x + k * kGatherThreads, row = quotient(p.by_vectors, i);
      if (row < p.rows)
        *reinterpret_cast<Vector<T>*>(tile + row * pitch + (i - row * vectors) * kVector) = found[k];
    }
  }

  // Columns beyond a list read what stands behind a row's channels: zero, or NaN for a sample without a
  // neuron.
  __device__ __forceinline__ void place(const GatherParams& p, const Lists& lists, const float* gate) const {
    const int first = lists.blocks_1 * Panel<T>::kBlock, width = first + lists.blocks_2 * Panel<T>::kBlock;
    for (int column = threadIdx.x; column < width; column += kGatherThreads) {
      const bool complement = column >= first;
      const int k = complement ? column - first + lists.second : column;
      const bool listed = lists.known && k < (complement ? p.channels : lists.count);
      const int c = listed ? lists.order[k] : p.channels;
      places[column] = static_cast<unsigned short>(c);
      if (gate) scales[column] = !listed ? 1 : complement ? 1 - gate[c] : gate[c];
    }
    for (int i = threadIdx.x; i < p.rows * kVector; i += kGatherThreads)
      tile[i / kVector * pitch + p.channels + i % kVector] =
          from_float<T>(lists.known ? 0.0f : not_a_number());
  }

  // Panels of the rows in the tile, `width` vectors each.
  template <bool kGated>
  __device__ __forceinline__ void write(const GatherParams& p, int b, int p0, int width) const {
    T* panel = static_cast<T*>(p.panel) + (static_cast<int64>(b) * p.extent.positions + p0) * p.pitch;
    const int rows = min(p.rows, p.extent.positions - p0);
    const int step = kGatherThreads / width, more = kGatherThreads - step * width;
    int row = static_cast<int>(threadIdx.x) / width, v = static_cast<int>(threadIdx.x) - row * width;
    while (row < rows) {
      const Pack<unsigned short, kVector> c =
          *reinterpret_cast<const Pack<unsigned short, kVector>*>(places + v * kVector);
      Vector<T> found;
#pragma unroll
      for (int e = 0; e < kVector; ++e) found.v[e] = tile[row * pitch + c.v[e]];
      if (kGated) {
#pragma unroll
        for (int e = 0; e < kVector; e += 4) {
          const Pack<float, 4> scale = *reinterpret_cast<const Pack<float, 4>*>(scales + v * kVector + e);
#pragma unroll
          for (int i = 0; i < 4; ++i) found.v[e + i] = from_float<T>(to_float(found.v[e + i]) * scale.v[i]);
        }
      }
      *reinterpret_cast<Vector<T>*>(panel + static_cast<int64>(row) * p.pitch + v * kVector) = found;
      row += step, v += more;
      if (v >= width) v -= width, ++row;
    }
  }

  // All rows of this block, of which `asked` has the first.
  template <bool kGated>
  __device__ __forceinline__ void gather(const GatherParams& p, const Lists& lists, const float* gate, int b,
                                         Vector<T> (&asked)[kAsked]) const {
    const int width = (lists.blocks_1 + lists.blocks_2) * (Panel<T>::kBlock / kVector);
    if (width == 0) return;
    place(p, lists, gate);
    for (int p0 = blockIdx.y * p.rows; p0 < p.extent.positions; p0 += p.shares * p.rows) {
      keep(p, asked);
      __syncthreads();
      ask(p, b, p0 + p.shares * p.rows, asked);
      write<kGated>(p, b, p0, width);
      __syncthreads();  // before the tile is written again
    }
  }
};

__device__ __forceinline__ Lists lists_of(const GatherParams& p, int b) {
  const int row = p.slots ? max(p.slots[b], 0) : b;
  const int* plan = p.plans + row * kPlan;
  const int64 chosen = p.neuron[b];
  return {p.order + static_cast<int64>(row) * p.channels,
          plan[1],
          plan[2],
          plan[3],
          plan[4],
          chosen >= 0 && chosen < p.neurons};
}

// Training: gated features by the list row of the sample, or of its slot.
template <class T>
__global__ void __launch_bounds__(kGatherThreads, 2) pack_kernel(const __grid_constant__ GatherParams p) {
  DSTS_DYNAMIC_SHARED(shared);
  const int along = ceil_div(p.extent.positions, kGather), b = blockIdx.x / along;
  gather<T>(p, lists_of(p, b), p.gate + static_cast<int64>(b) * p.channels, b, blockIdx.x % along * kGather,
            reinterpret_cast<T*>(shared));
}

template <class T>
__global__ void __launch_bounds__(kGatherThreads, 4)
    gather_rows_kernel(const __grid_constant__ GatherParams p) {
  DSTS_DYNAMIC_SHARED(shared);
  const Rows<T> own(p, shared);
  const int b = blockIdx.x;
  Vector<T> asked[kAsked];
  own.ask(p, b, blockIdx.y * p.rows, asked);
  own.template gather<true>(p, lists_of(p, b), p.gate + static_cast<int64>(b) * p.channels, b, asked);
}

// argmax of the relevance scores of sample b, as torch breaks ties and orders NaN. `values` is kChunk shared
// floats, `scores` one a neuron.
__device__ int choose_neuron(const GatherParams& p, int b, float* values, float* scores) {
  const int size = p.channels * p.taps, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int n = threadIdx.x; n < p.neurons; n += kGatherThreads) scores[n] = 0;
  for (int c0 = 0; c0 < size; c0 += kChunk) {
    __syncthreads();
    const int c = c0 + static_cast<int>(threadIdx.x);
    float v = 0;
    for (int part = 0; part < p.parts && c < size; ++part)
      v += p.sums[(static_cast<int64>(b) * p.parts + part) * size + c];
    values[threadIdx.x] = v;
    __syncthreads();
    for (int n = warp; n < p.neurons; n += kGatherWarps) {
      float dot = 0;
      for (int i = lane; i < min(kChunk, size - c0); i += 32)
        dot += p.scoring[static_cast<int64>(n) * size + c0 + i] * values[i];
      dot = warp_sum(dot);
      if (lane == 0) scores[n] += dot;
    }
  }
  __syncthreads();
  for (int n = threadIdx.x; n < p.neurons; n += kGatherThreads) scores[n] /= p.divisor;
  __syncthreads();
  int best = 0;
  for (int n = 1; n < p.neurons; ++n) {
    const float top = scores[best];
    if (top != top) break;
    if (scores[n] > top || scores[n] != scores[n]) best = n;
  }
  return best;
}

// A frozen layer's first launch: choose each sample's neuron, gather its channels, plan the convolution and
// zero its counters. Every block works its sample's choice out for itself, alike; one, which `writes`, writes
// it down. `room` is kChunk + neurons shared floats.
template <class T>
__device__ Lists route(const GatherParams& p, int b, float* room, bool writes) {
  constexpr int kBlock = Panel<T>::kBlock;
  float* scores = room + kChunk;
  const int chosen = choose_neuron(p, b, room, scores);
  const int split = static_cast<int>(p.starts[chosen + 1] - p.starts[chosen]);
  const Lists lists = {p.channels_of + static_cast<int64>(chosen) * p.channels,
                       ceil_div(split, kBlock),
                       ceil_div(p.channels - split, kBlock),
                       split,
                       split,
                       true};
  if (!writes) return lists;
  if (threadIdx.x == 0) {
    int first = 0;
    for (int n = 0; n < chosen; ++n) {
      const int own = static_cast<int>(p.starts[n + 1] - p.starts[n]);
      first += 9 * ceil_div(own, kBlock) + 3 * ceil_div(p.channels - own, kBlock);
    }
    int* plan = p.plan + b * kPlan;
    plan[0] = first;
    plan[1] = lists.blocks_1;
    plan[2] = lists.blocks_2;
    plan[3] = plan[4] = split;
    plan[5] = chosen;
    p.chosen[b] = chosen;
  }
  for (int n = threadIdx.x; n < p.neurons; n += kGatherThreads)
    p.scores[static_cast<int64>(b) * p.neurons + n] = scores[n];
  for (int i = b * kGatherThreads + threadIdx.x; i < p.flag_count; i += p.batch * kGatherThreads)
    p.flags[i] = 0;
  return lists;
}

template <class T>
__global__ void __launch_bounds__(kGatherThreads, 2)
    route_and_gather_kernel(const __grid_constant__ GatherParams p) {
  DSTS_DYNAMIC_SHARED(shared);
  const int along = ceil_div(p.extent.positions, kGather), b = blockIdx.x / along;
  const Lists lists = route<T>(p, b, reinterpret_cast<float*>(shared + Panel<T>::kBytes),
                               blockIdx.x % along == 0 && blockIdx.y == 0);
  gather<T>(p, lists, nullptr, b, blockIdx.x % along * kGather, reinterpret_cast<T*>(shared));
}

template <class T>
__global__ void __launch_bounds__(kGatherThreads, 4)
    route_and_gather_rows_kernel(const __grid_constant__ GatherParams p) {
  DSTS_DYNAMIC_SHARED(shared);
  const Rows<T> own(p, shared);
  const int b = blockIdx.x;
  Vector<T> asked[kAsked];
  own.ask(p, b, blockIdx.y * p.rows, asked);
  const Lists lists =
      route<T>(p, b, reinterpret_cast<float*>(shared + Rows<T>::bytes(p, false)), blockIdx.y == 0);
  own.template gather<false>(p, lists, nullptr, b, asked);
}

#define INSTANTIATE(T)                                                                       \
  template __global__ void pack_kernel<T>(const __grid_constant__ GatherParams);             \
  template __global__ void gather_rows_kernel<T>(const __grid_constant__ GatherParams);      \
  template __global__ void route_and_gather_kernel<T>(const __grid_constant__ GatherParams); \
  template __global__ void route_and_gather_rows_kernel<T>(const __grid_constant__ GatherParams);
DSTS_ELEMENTS(INSTANTIATE)
#undef INSTANTIATE

#ifndef __CUDACC_RTC__
namespace {

dim3 gather_grid(const GatherParams& p) {
  const int blocks = p.rows ? p.batch : p.batch * ceil_div(p.extent.positions, kGather);
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(p.shares));
}

}  // namespace

void gather_panel(const GatherParams& p, int dtype, void* stream) {
  for_element(dtype, [&](auto element) {
    using T = decltype(element);
    const size_t shared = p.rows ? Rows<T>::bytes(p, true) : Panel<T>::kBytes;
    launch(p.rows ? gather_rows_kernel<T> : pack_kernel<T>, gather_grid(p), kGatherThreads, shared, stream,
           p);
  });
}

void route_and_gather(const GatherParams& p, int dtype, void* stream) {
  for_element(dtype, [&](auto element) {
    using T = decltype(element);
    const size_t tile = p.rows ? Rows<T>::bytes(p, false) : Panel<T>::kBytes;
    const size_t shared = tile + sizeof(float) * (kChunk + static_cast<size_t>(p.neurons));
    launch(p.rows ? route_and_gather_rows_kernel<T> : route_and_gather_kernel<T>, gather_grid(p),
           kGatherThreads, shared, stream, p);
  });
}
#endif

}  // namespace dsts::cuda
