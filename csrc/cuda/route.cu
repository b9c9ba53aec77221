// Features gathered by channel lists into panels, and for a frozen layer the choice of the neuron whose lists
// they are.
//
// A block takes 64 positions of a sample and some K blocks of either list, through shared memory: it reads
// along whichever side of the features lies at stride 1, and writes whole rows of the panel.
#include "cuda/device.h"
#include "cuda/launch.h"

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

// Training: gated features by the list row of the sample, or of its slot.
template <class T>
__global__ void __launch_bounds__(kGatherThreads, 2) pack_kernel(const __grid_constant__ GatherParams p) {
  DSTS_DYNAMIC_SHARED(shared);
  const int along = ceil_div(p.extent.positions, kGather), b = blockIdx.x / along;
  const int row = p.slots ? max(p.slots[b], 0) : b;
  const int* plan = p.plans + row * kPlan;
  const int64 chosen = p.neuron[b];
  const Lists lists = {p.order + static_cast<int64>(row) * p.channels,
                       plan[1],
                       plan[2],
                       plan[3],
                       plan[4],
                       chosen >= 0 && chosen < p.neurons};
  gather<T>(p, lists, p.gate + static_cast<int64>(b) * p.channels, b, blockIdx.x % along * kGather,
            reinterpret_cast<T*>(shared));
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
// zero its counters. Every block works its sample's choice out for itself, alike; one writes it down.
template <class T>
__global__ void __launch_bounds__(kGatherThreads, 2)
    route_and_pack_kernel(const __grid_constant__ GatherParams p) {
  constexpr int kBlock = Panel<T>::kBlock;
  DSTS_DYNAMIC_SHARED(shared);
  T* tile = reinterpret_cast<T*>(shared);
  float* values = reinterpret_cast<float*>(shared + Panel<T>::kBytes);  // [kChunk]
  float* scores = values + kChunk;                                      // [neurons]
  const int along = ceil_div(p.extent.positions, kGather), b = blockIdx.x / along;
  const int chosen = choose_neuron(p, b, values, scores);
  const int split = static_cast<int>(p.starts[chosen + 1] - p.starts[chosen]);
  const Lists lists = {p.channels_of + static_cast<int64>(chosen) * p.channels,
                       ceil_div(split, kBlock),
                       ceil_div(p.channels - split, kBlock),
                       split,
                       split,
                       true};
  if (blockIdx.x % along == 0 && blockIdx.y == 0) {
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
  }
  gather<T>(p, lists, nullptr, b, blockIdx.x % along * kGather, tile);
}

#define INSTANTIATE(T)                                                           \
  template __global__ void pack_kernel<T>(const __grid_constant__ GatherParams); \
  template __global__ void route_and_pack_kernel<T>(const __grid_constant__ GatherParams);
DSTS_ELEMENTS(INSTANTIATE)
#undef INSTANTIATE

#ifndef __CUDACC_RTC__
namespace {

dim3 gather_grid(const GatherParams& p) {
  return dim3(static_cast<unsigned>(p.batch * ceil_div(p.extent.positions, kGather)),
              static_cast<unsigned>(p.shares));
}

}  // namespace

void pack_features(const GatherParams& p, int dtype, void* stream) {
  for_element(dtype, [&](auto element) {
    using T = decltype(element);
    launch(pack_kernel<T>, gather_grid(p), kGatherThreads, Panel<T>::kBytes, stream, p);
  });
}

void route_and_pack(const GatherParams& p, int dtype, void* stream) {
  for_element(dtype, [&](auto element) {
    using T = decltype(element);
    const size_t shared = Panel<T>::kBytes + sizeof(float) * (kChunk + static_cast<size_t>(p.neurons));
    launch(route_and_pack_kernel<T>, gather_grid(p), kGatherThreads, shared, stream, p);
  });
}
#endif

}  // namespace dsts::cuda
