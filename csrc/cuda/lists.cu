// Who chose which neuron, and which channels each gate lists: integers only, worked out on the device. A
// slot's list is what any of its samples reads.
#include "cuda/device.h"
#include "cuda/launch.h"

namespace dsts::cuda {

constexpr int kListThreads = 256;
constexpr int kListWarps = kListThreads / 32;

// Sums of three counts over a block, and of those before this thread's warp; `room` is 3 * kListWarps shared
// ints.
struct Counts {
  int n[3];
};

__device__ __forceinline__ void block_counts(const Counts& of_warp, int* room, Counts* before, Counts* all) {
  const int warp = threadIdx.x / 32;
  __syncthreads();
  if (threadIdx.x % 32 == 0)
    for (int i = 0; i < 3; ++i) room[i * kListWarps + warp] = of_warp.n[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    before->n[i] = all->n[i] = 0;
    for (int w = 0; w < kListWarps; ++w) {
      if (w < warp) before->n[i] += room[i * kListWarps + w];
      all->n[i] += room[i * kListWarps + w];
    }
  }
}

// A block a sample: the slot of its neuron, and its place among the samples sorted by neuron. Strays, whose
// neuron is out of range, get slot -1.
__global__ void __launch_bounds__(kListThreads) group_kernel(const __grid_constant__ GroupParams p) {
  DSTS_DYNAMIC_SHARED(shared);
  int* room = reinterpret_cast<int*>(shared);  // [3 * kListWarps]
  int* used = room + 3 * kListWarps;           // [neurons]: whether any sample chose it
  const int b = blockIdx.x;
  const int64 mine = p.neuron[b];
  for (int n = threadIdx.x; n < p.neurons; n += kListThreads) used[n] = 0;
  __syncthreads();
  Counts own = {{0, 0, 0}};  // samples of lower neurons, of this one, of this one before b
  for (int other = threadIdx.x; other < p.batch; other += kListThreads) {
    const int64 theirs = p.neuron[other];
    own.n[0] += theirs < mine;
    own.n[1] += theirs == mine;
    own.n[2] += theirs == mine && other < b;
    if (theirs >= 0 && theirs < p.neurons) atomicOr(used + theirs, 1);
  }
  for (int i = 0; i < 3; ++i)
    for (int lane = 16; lane; lane /= 2) own.n[i] += __shfl_xor_sync(0xffffffffu, own.n[i], lane);
  Counts before, all;
  block_counts(own, room, &before, &all);
  if (threadIdx.x != 0) return;
  p.members[all.n[0] + all.n[2]] = b;
  int slot = 0;
  for (int n = 0; n < p.neurons; ++n) {
    if (n == mine) {
      p.slots[b] = slot;
      if (all.n[2] == 0) p.groups[slot * 2] = all.n[0], p.groups[slot * 2 + 1] = all.n[1];
    }
    if (b == 0) p.slot_of[n] = used[n] ? slot : -1;
    if (b == 0 && used[n]) p.neuron_of[slot] = n;
    slot += used[n];
  }
  if (mine < 0 || mine >= p.neurons) p.slots[b] = -1;
  for (; b == 0 && slot < p.slot_count; ++slot) p.neuron_of[slot] = -1;
}

// 0: only the first operator reads the channel, 1: both do, 2: only the second does, 3: no such channel.
__device__ __forceinline__ int readers(const ListParams& p, int row, int c) {
  if (c >= p.channels) return 3;
  if (!p.by_slot) {
    const float gate = p.gate[static_cast<int64>(row) * p.channels + c];
    return gate == 1 ? 0 : gate == 0 ? 2 : 1;
  }
  bool first = true, second = true;
  const int start = p.groups[row * 2], count = p.groups[row * 2 + 1];
  for (int i = 0; i < count; ++i) {
    const float gate = p.gate[static_cast<int64>(p.members[start + i]) * p.channels + c];
    first &= gate == 1;
    second &= gate == 0;
  }
  return first ? 0 : second ? 2 : 1;
}

// A block a list row. The plan of a slot without a neuron is empty: a stray may still read it.
__global__ void __launch_bounds__(kListThreads) list_kernel(const __grid_constant__ ListParams p) {
  DSTS_DYNAMIC_SHARED(shared);
  int* room = reinterpret_cast<int*>(shared);  // [3 * kListWarps]
  const int row = blockIdx.x;
  int* plan = p.plans + row * kPlan;
  if (p.by_slot && p.neuron_of[row] < 0) {
    if (threadIdx.x < kPlan) plan[threadIdx.x] = 0;
    return;
  }
  Counts before, all, total = {{0, 0, 0}};
  for (int c0 = 0; c0 < p.channels; c0 += kListThreads) {
    const int kind = readers(p, row, c0 + threadIdx.x);
    Counts warp;
#pragma unroll
    for (int i = 0; i < 3; ++i) warp.n[i] = __popc(__ballot_sync(0xffffffffu, kind == i));
    block_counts(warp, room, &before, &all);
#pragma unroll
    for (int i = 0; i < 3; ++i) total.n[i] += all.n[i];
  }
  const int read_1 = total.n[0] + total.n[1];
  if (threadIdx.x == 0) {
    plan[0] = p.by_slot ? row : p.slots[row];
    plan[1] = ceil_div(read_1, p.block);
    plan[2] = ceil_div(p.channels - total.n[0], p.block);
    plan[3] = read_1;
    plan[4] = total.n[0];
    plan[5] = row;
  }
  int at[3] = {0, total.n[0], read_1};
  const unsigned lower = (1u << threadIdx.x % 32) - 1;
  for (int c0 = 0; c0 < p.channels; c0 += kListThreads) {
    const int c = c0 + threadIdx.x, kind = readers(p, row, c);
    Counts warp;
    int rank = 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const unsigned votes = __ballot_sync(0xffffffffu, kind == i);
      warp.n[i] = __popc(votes);
      if (kind == i) rank = __popc(votes & lower);
    }
    block_counts(warp, room, &before, &all);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (kind == i) p.order[static_cast<int64>(row) * p.channels + at[i] + before.n[i] + rank] = c;
      at[i] += all.n[i];
    }
    if (p.by_slot && kind < 3)
      p.listed[static_cast<int64>(row) * p.channels + c] = static_cast<signed char>(kind == 0   ? 1
                                                                                    : kind == 2 ? 2
                                                                                                : 3);
  }
}

#ifndef __CUDACC_RTC__
void group_samples(const GroupParams& p, void* stream) {
  const size_t shared = sizeof(int) * (3 * kListWarps + static_cast<size_t>(p.neurons));
  launch(group_kernel, dim3(static_cast<unsigned>(p.batch)), kListThreads, shared, stream, p);
}

void list_channels(const ListParams& p, void* stream) {
  launch(list_kernel, dim3(static_cast<unsigned>(p.rows)), kListThreads, sizeof(int) * 3 * kListWarps, stream,
         p);
}
#endif

}  // namespace dsts::cuda
