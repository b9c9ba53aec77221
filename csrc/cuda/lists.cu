// Which sample chose which neuron, and which channels each gate lists: integers only, worked out on the
// device. A slot's list is what any of its samples reads.
#include "cuda/device.h"
#include "cuda/launch.h"

namespace dsts::cuda {

constexpr int kListThreads = 256;
constexpr int kListWarps = kListThreads / 32;

// Sums of three counts over a CTA, and of those before this thread's warp; `scratch` is 3 * kListWarps
// shared ints.
struct Counts {
  int n[3];
};

__device__ __forceinline__ void block_counts(const Counts& of_warp, int* scratch, Counts* before,
                                             Counts* all) {
  const int warp = threadIdx.x / 32;
  __syncthreads();
  if (threadIdx.x % 32 == 0)
    for (int i = 0; i < 3; ++i) scratch[i * kListWarps + warp] = of_warp.n[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    before->n[i] = all->n[i] = 0;
    for (int w = 0; w < kListWarps; ++w) {
      if (w < warp) before->n[i] += scratch[i * kListWarps + w];
      all->n[i] += scratch[i * kListWarps + w];
    }
  }
}

// A CTA a sample: the slot of its neuron, and its place among the samples sorted by neuron. Strays, whose
// neuron is out of range, get slot -1.
__global__ void __launch_bounds__(kListThreads) group_samples_kernel(const __grid_constant__ GroupParams p) {
  DSTS_DYNAMIC_SMEM(smem);
  int* scratch = reinterpret_cast<int*>(smem);  // [3 * kListWarps]
  int* used = scratch + 3 * kListWarps;         // [neurons]: whether any sample chose it
  const int b = blockIdx.x;
  const int64 neuron = p.neuron[b];
  for (int n = threadIdx.x; n < p.neurons; n += kListThreads) used[n] = 0;
  __syncthreads();
  Counts counts = {{0, 0, 0}};  // samples of lower neurons, of this one, of this one before b
  for (int other = threadIdx.x; other < p.batch; other += kListThreads) {
    const int64 theirs = p.neuron[other];
    counts.n[0] += theirs < neuron;
    counts.n[1] += theirs == neuron;
    counts.n[2] += theirs == neuron && other < b;
    if (theirs >= 0 && theirs < p.neurons) atomicOr(used + theirs, 1);
  }
  for (int i = 0; i < 3; ++i)
    for (int lane = 16; lane; lane /= 2) counts.n[i] += __shfl_xor_sync(0xffffffffu, counts.n[i], lane);
  Counts before, all;
  block_counts(counts, scratch, &before, &all);
  if (threadIdx.x != 0) return;
  p.members[all.n[0] + all.n[2]] = b;
  int slot = 0;
  for (int n = 0; n < p.neurons; ++n) {
    if (n == neuron) {
      p.slots[b] = slot;
      if (all.n[2] == 0) p.groups[slot * 2] = all.n[0], p.groups[slot * 2 + 1] = all.n[1];
    }
    if (b == 0) p.slot_of[n] = used[n] ? slot : -1;
    if (b == 0 && used[n]) p.neuron_of[slot] = n;
    slot += used[n];
  }
  if (neuron < 0 || neuron >= p.neurons) p.slots[b] = -1;
  for (; b == 0 && slot < p.num_slots; ++slot) p.neuron_of[slot] = -1;
}

// Which operators read channel c of a list, in the order of the list.
enum Readers { kSpatialOnly, kBoth, kTemporalOnly, kNoChannel };

__device__ __forceinline__ int readers(const ListParams& p, int list, int c) {
  if (c >= p.channels) return kNoChannel;
  if (!p.by_slot) {
    const float gate = p.gate[static_cast<int64>(list) * p.channels + c];
    return gate == 1 ? kSpatialOnly : gate == 0 ? kTemporalOnly : kBoth;
  }
  bool all_spatial = true, all_temporal = true;
  const int start = p.groups[list * 2], count = p.groups[list * 2 + 1];
  for (int i = 0; i < count; ++i) {
    const float gate = p.gate[static_cast<int64>(p.members[start + i]) * p.channels + c];
    all_spatial &= gate == 1;
    all_temporal &= gate == 0;
  }
  return all_spatial ? kSpatialOnly : all_temporal ? kTemporalOnly : kBoth;
}

// A CTA a list. The plan of a slot without a neuron is empty: a stray may still read it.
__global__ void __launch_bounds__(kListThreads) list_channels_kernel(const __grid_constant__ ListParams p) {
  DSTS_DYNAMIC_SMEM(smem);
  int* scratch = reinterpret_cast<int*>(smem);  // [3 * kListWarps]
  const int list = blockIdx.x;
  if (p.by_slot && p.neuron_of[list] < 0) {
    if (threadIdx.x == 0) p.plans[list] = Plan{};
    return;
  }
  Counts before, all, total = {{0, 0, 0}};
  for (int c0 = 0; c0 < p.channels; c0 += kListThreads) {
    const int kind = readers(p, list, c0 + threadIdx.x);
    Counts warp;
#pragma unroll
    for (int i = 0; i < 3; ++i) warp.n[i] = __popc(__ballot_sync(0xffffffffu, kind == i));
    block_counts(warp, scratch, &before, &all);
#pragma unroll
    for (int i = 0; i < 3; ++i) total.n[i] += all.n[i];
  }
  const int spatial_channels = total.n[kSpatialOnly] + total.n[kBoth], temporal_start = total.n[kSpatialOnly];
  if (threadIdx.x == 0)
    p.plans[list] = {p.by_slot ? list : p.slots[list],
                     ceil_div(spatial_channels, p.k_block),
                     ceil_div(p.channels - temporal_start, p.k_block),
                     spatial_channels,
                     temporal_start,
                     list};
  int at[3] = {0, temporal_start, spatial_channels};
  const unsigned lower = (1u << threadIdx.x % 32) - 1;
  for (int c0 = 0; c0 < p.channels; c0 += kListThreads) {
    const int c = c0 + threadIdx.x, kind = readers(p, list, c);
    Counts warp;
    int rank = 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const unsigned votes = __ballot_sync(0xffffffffu, kind == i);
      warp.n[i] = __popc(votes);
      if (kind == i) rank = __popc(votes & lower);
    }
    block_counts(warp, scratch, &before, &all);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (kind == i) p.order[static_cast<int64>(list) * p.channels + at[i] + before.n[i] + rank] = c;
      at[i] += all.n[i];
    }
    if (p.by_slot && kind != kNoChannel)
      p.listed[static_cast<int64>(list) * p.channels + c] =
          static_cast<signed char>(kind == kSpatialOnly    ? kReadBySpatial
                                   : kind == kTemporalOnly ? kReadByTemporal
                                                           : kReadBySpatial + kReadByTemporal);
  }
}

#ifndef __CUDACC_RTC__
void group_samples(const GroupParams& p, void* stream) {
  const size_t smem_bytes = sizeof(int) * (3 * kListWarps + static_cast<size_t>(p.neurons));
  launch(group_samples_kernel, dim3(static_cast<unsigned>(p.batch)), kListThreads, smem_bytes, stream, p);
}

void list_channels(const ListParams& p, void* stream) {
  launch(list_channels_kernel, dim3(static_cast<unsigned>(p.num_lists)), kListThreads,
         sizeof(int) * 3 * kListWarps, stream, p);
}
#endif

}  // namespace dsts::cuda
