// A frozen layer's first launch: the choice of each sample's neuron, fused with the gather of its panel by
// that neuron's lists. It also makes the plan of the convolution that follows, and zeroes its counters.
#include "cuda/gather.h"

namespace dsts::cuda {

constexpr int kGatherWarps = kGatherThreads / 32;
constexpr int kScoreTile = kGatherThreads;  // of channels and taps, while scores are added up

// argmax of the relevance scores of sample b, as torch breaks ties and orders NaN. `values` is kScoreTile
// shared floats, `scores` one a neuron.
__device__ int choose_neuron(const RouteParams& p, int b, float* values, float* scores) {
  const int size = p.gather.channels * p.taps, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int n = threadIdx.x; n < p.neurons; n += kGatherThreads) scores[n] = 0;
  for (int c0 = 0; c0 < size; c0 += kScoreTile) {
    __syncthreads();
    const int c = c0 + static_cast<int>(threadIdx.x);
    float v = 0;
    for (int part = 0; part < p.parts && c < size; ++part)
      v += p.sums[(static_cast<int64>(b) * p.parts + part) * size + c];
    values[threadIdx.x] = v;
    __syncthreads();
    for (int n = warp; n < p.neurons; n += kGatherWarps) {
      float dot = 0;
      for (int i = lane; i < min(kScoreTile, size - c0); i += 32)
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

// The lists of the neuron of sample b. Every CTA works its sample's choice out for itself, alike; one, which
// `writes`, writes down what later launches need. `scratch` is kScoreTile + neurons shared floats.
template <class T>
__device__ SampleLists route(const RouteParams& p, int b, float* scratch, bool writes) {
  constexpr int kBlock = PanelTile<T>::kBlock;
  const GatherParams& gather = p.gather;
  float* scores = scratch + kScoreTile;
  const int neuron = choose_neuron(p, b, scratch, scores);
  const int split = static_cast<int>(p.starts[neuron + 1] - p.starts[neuron]);
  const SampleLists lists = {p.channels_of + static_cast<int64>(neuron) * gather.channels,
                             ceil_div(split, kBlock),
                             ceil_div(gather.channels - split, kBlock),
                             split,
                             split,
                             true};
  if (!writes) return lists;
  if (threadIdx.x == 0) {
    int filters = 0;  // K blocks of the neurons before
    for (int n = 0; n < neuron; ++n) {
      const int spatial = static_cast<int>(p.starts[n + 1] - p.starts[n]);
      filters += kSpatialTaps * ceil_div(spatial, kBlock) +
                 kTemporalTaps * ceil_div(gather.channels - spatial, kBlock);
    }
    p.plan[b] = {filters, lists.spatial_blocks, lists.temporal_blocks, split, split, neuron};
    p.neuron[b] = neuron;
  }
  for (int n = threadIdx.x; n < p.neurons; n += kGatherThreads)
    p.scores[static_cast<int64>(b) * p.neurons + n] = scores[n];
  for (int i = b * kGatherThreads + threadIdx.x; i < p.num_arrival_counters;
       i += p.gather.batch * kGatherThreads)
    p.arrival_counters[i] = 0;
  return lists;
}

template <class T>
__global__ void __launch_bounds__(kGatherThreads, 2)
    route_and_gather_kernel(const __grid_constant__ RouteParams p) {
  DSTS_DYNAMIC_SMEM(smem);
  const int along = ceil_div(p.gather.extent.positions, kGatherPositions), b = blockIdx.x / along;
  const SampleLists lists = route<T>(p, b, reinterpret_cast<float*>(smem + PanelTile<T>::kBytes),
                                     blockIdx.x % along == 0 && blockIdx.y == 0);
  gather_elements<T>(p.gather, lists, nullptr, b, blockIdx.x % along * kGatherPositions,
                     reinterpret_cast<T*>(smem));
}

template <class T>
__global__ void __launch_bounds__(kGatherThreads, 4)
    route_and_gather_whole_kernel(const __grid_constant__ RouteParams p) {
  DSTS_DYNAMIC_SMEM(smem);
  const WholeGather<T> whole(p.gather, smem);
  const int b = blockIdx.x;
  Vector<T> asked[kVectorsAsked];
  whole.load(p.gather, b, blockIdx.y * p.gather.whole_positions, asked);
  const SampleLists lists = route<T>(
      p, b, reinterpret_cast<float*>(smem + WholeGather<T>::bytes(p.gather, false)), blockIdx.y == 0);
  whole.template gather<false>(p.gather, lists, nullptr, b, asked);
}

template <class T>
__global__ void __launch_bounds__(kGatherThreads, 3)
    route_and_gather_turned_kernel(const __grid_constant__ RouteParams p) {
  DSTS_DYNAMIC_SMEM(smem);
  const int along = ceil_div(p.gather.extent.positions, kGatherPositions), b = blockIdx.x / along;
  const SampleLists lists = route<T>(p, b, reinterpret_cast<float*>(smem + TurnedGather<T>::kBytes),
                                     blockIdx.x % along == 0 && blockIdx.y == 0);
  TurnedGather<T>(smem).gather(p.gather, lists, nullptr, b, blockIdx.x % along * kGatherPositions);
}

#define INSTANTIATE(code, name, T)                                                                 \
  template __global__ void route_and_gather_kernel<T>(const __grid_constant__ RouteParams);        \
  template __global__ void route_and_gather_turned_kernel<T>(const __grid_constant__ RouteParams); \
  template __global__ void route_and_gather_whole_kernel<T>(const __grid_constant__ RouteParams);
DSTS_DTYPES(INSTANTIATE)
#undef INSTANTIATE

#ifndef __CUDACC_RTC__
void route_and_gather(const RouteParams& p, int dtype, void* stream) {
  for_element(dtype, [&](auto element) {
    using T = decltype(element);
    const size_t scores = sizeof(float) * (kScoreTile + static_cast<size_t>(p.neurons));
    launch(p.gather.whole_positions ? route_and_gather_whole_kernel<T>
           : p.gather.turned        ? route_and_gather_turned_kernel<T>
                                    : route_and_gather_kernel<T>,
           gather_grid(p.gather), kGatherThreads, gather_smem<T>(p.gather, false) + scores, stream, p);
  });
}
#endif

}  // namespace dsts::cuda
