// A training step's panels: gated features gathered by the lists of samples or of slots, which list_channels
// made.
#include "cuda/gather.h"

namespace dsts::cuda {

__device__ __forceinline__ SampleLists lists_of(const GatherPanelParams& p, int b) {
  const int list = p.slots ? max(p.slots[b], 0) : b;
  const Plan& plan = plan_at(p.plans, list);
  const int64 neuron = p.neuron[b];
  return {p.order + static_cast<int64>(list) * p.gather.channels,
          plan.spatial_blocks,
          plan.temporal_blocks,
          plan.spatial_channels,
          plan.temporal_start,
          neuron >= 0 && neuron < p.neurons};
}

template <class T>
__global__ void __launch_bounds__(kGatherThreads, 2)
    gather_panel_kernel(const __grid_constant__ GatherPanelParams p) {
  DSTS_DYNAMIC_SMEM(smem);
  const int along = ceil_div(p.gather.extent.positions, kGatherPositions), b = blockIdx.x / along;
  gather_elements<T>(p.gather, lists_of(p, b), p.gate + static_cast<int64>(b) * p.gather.channels, b,
                     blockIdx.x % along * kGatherPositions, reinterpret_cast<T*>(smem));
}

template <class T>
__global__ void __launch_bounds__(kGatherThreads, 4)
    gather_panel_whole_kernel(const __grid_constant__ GatherPanelParams p) {
  DSTS_DYNAMIC_SMEM(smem);
  const WholeGather<T> whole(p.gather, smem);
  const int b = blockIdx.x;
  Vector<T> asked[kVectorsAsked];
  whole.load(p.gather, b, blockIdx.y * p.gather.whole_positions, asked);
  whole.template gather<true>(p.gather, lists_of(p, b), p.gate + static_cast<int64>(b) * p.gather.channels, b,
                              asked);
}

template <class T>
__global__ void __launch_bounds__(kGatherThreads, 2)
    gather_panel_turned_kernel(const __grid_constant__ GatherPanelParams p) {
  DSTS_DYNAMIC_SMEM(smem);
  const int along = ceil_div(p.gather.extent.positions, kGatherPositions), b = blockIdx.x / along;
  TurnedGather<T>(smem).gather(p.gather, lists_of(p, b), p.gate + static_cast<int64>(b) * p.gather.channels,
                               b, blockIdx.x % along * kGatherPositions);
}

#define INSTANTIATE(code, name, T)                                                                   \
  template __global__ void gather_panel_kernel<T>(const __grid_constant__ GatherPanelParams);        \
  template __global__ void gather_panel_turned_kernel<T>(const __grid_constant__ GatherPanelParams); \
  template __global__ void gather_panel_whole_kernel<T>(const __grid_constant__ GatherPanelParams);
DSTS_DTYPES(INSTANTIATE)
#undef INSTANTIATE

#ifndef __CUDACC_RTC__
void gather_panel(const GatherPanelParams& p, int dtype, void* stream) {
  for_element(dtype, [&](auto element) {
    using T = decltype(element);
    launch(p.gather.whole_positions ? gather_panel_whole_kernel<T>
           : p.gather.turned        ? gather_panel_turned_kernel<T>
                                    : gather_panel_kernel<T>,
           gather_grid(p.gather), kGatherThreads, gather_smem<T>(p.gather, true), stream, p);
  });
}
#endif

}  // namespace dsts::cuda
