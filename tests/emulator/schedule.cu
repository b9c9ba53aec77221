// Runs the stream-K schedule of csrc/cuda/schedule.h and writes down where each CTA's range starts, for a
// test that compares it with dsts_kernels/backends/gpu/grids.py.
#include "cuda/schedule.h"
#include "schedule.h"

namespace schedule {
namespace {

struct Params {
  const int* lengths;  // [samples]
  int* starts;         // [num_ctas + 1]
  int* dealt;          // [1]: waves
  int samples, per_sample, num_ctas, waves, idle_percent;
};

template <int THREADS>
__global__ void __launch_bounds__(THREADS) schedule_kernel(const __grid_constant__ Params p) {
  DSTS_DYNAMIC_SMEM(smem);
  dsts::cuda::Schedule schedule = {p.num_ctas, p.waves, p.per_sample, 0, nullptr, nullptr};
  const int dealt = schedule.build<THREADS>([&](int b) { return p.lengths[b]; }, p.samples * p.per_sample,
                                            p.idle_percent, reinterpret_cast<int*>(smem));
  if (threadIdx.x == 0) *p.dealt = dealt;
  for (int q = threadIdx.x; q <= p.num_ctas; q += THREADS) p.starts[q] = schedule.starts[q];
}

}  // namespace

int starts(const int* lengths, int* starts, int* dealt, int samples, int per_sample, int num_ctas, int waves,
           int idle_percent, int threads) {
  Params params = {lengths, starts, dealt, samples, per_sample, num_ctas, waves, idle_percent};
  void* arguments[] = {&params};
  auto* kernel = threads == 128 ? schedule_kernel<128> : schedule_kernel<256>;
  return cudaLaunchKernel(kernel, dim3(1), dim3(threads), arguments,
                          dsts::cuda::schedule_bytes(num_ctas, threads), nullptr);
}

}  // namespace schedule
