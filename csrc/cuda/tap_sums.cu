// Tap sums: every channel summed over the positions that each tap of a scoring kernel reads, in float32. A
// CTA sums a range of positions of some channels, so that a small batch still fills the chip; what reads the
// ranges' sums adds them up, in order. Threads run along whichever side lies at stride 1, 16 bytes each where
// it is aligned.
#include "cuda/device.h"
#include "cuda/launch.h"

namespace dsts::cuda {

constexpr int kSumThreads = 256;

// Threads along the side that lies at stride 1, which read 128 bytes together; the rest go along the other
// side.
__host__ __device__ constexpr int inner_threads(int vector) { return vector == 1 ? 32 : 8; }

// Sums of one channel by tap: one tap is the total. Nine are the total less what lies on an edge.
template <int TAPS>
struct ChannelSums {
  float sum[TAPS] = {};

  __device__ __forceinline__ void add(float v, int h, int w, const Extent& e) {
    if (TAPS == 1) {
      sum[0] += v;
    } else {
#pragma unroll
      for (int tap = 0; tap < TAPS; ++tap) sum[tap] += tap_reads(tap, h, w, e) ? v : 0.0f;
    }
  }
};

// BY_CHANNEL: a thread has V channels and walks positions; else a thread has one channel and walks V
// positions at a time. Several positions at once are for one tap only.
template <class T, int TAPS, int V, bool BY_CHANNEL>
__global__ void __launch_bounds__(kSumThreads) tap_sums_kernel(const __grid_constant__ TapSumsParams p) {
  constexpr int INNER = inner_threads(V), OUTER = kSumThreads / INNER;
  constexpr int CHANNELS = BY_CHANNEL ? INNER * V : OUTER;
  constexpr int COUNT = BY_CHANNEL ? V : 1;  // channels of a thread
  const int inner = threadIdx.x % INNER, outer = threadIdx.x / INNER;
  const int b = blockIdx.x, part = blockIdx.y;
  const int c = blockIdx.z * CHANNELS + (BY_CHANNEL ? inner * V : outer);
  const int each = ceil_div(ceil_div(p.extent.positions, p.parts), V) * V;
  const int first = part * each, last = min(first + each, p.extent.positions);
  const T* x = static_cast<const T*>(p.x) + b * p.x_strides.b + static_cast<int64>(c) * p.x_strides.c;

  ChannelSums<TAPS> taps[COUNT];
  if (c < p.channels) {
    const int step = BY_CHANNEL ? OUTER : INNER * V;
    for (int at = first + (BY_CHANNEL ? outer : inner * V); at < last; at += step) {
      const Place place = place_of(p.extent, at);
      const T* from = x + offset_of(p.x_strides, place);
      const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
#pragma unroll
      for (int i = 0; i < V; ++i)
        taps[BY_CHANNEL ? i : 0].add(to_float(pack.v[i]), place.h, place.w, p.extent);
    }
  }

  // Threads that share a channel are added up in order.
  DSTS_DYNAMIC_SMEM(smem);
  float* cells = reinterpret_cast<float*>(smem);  // [threads][COUNT * TAPS]
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
#pragma unroll
    for (int tap = 0; tap < TAPS; ++tap)
      cells[threadIdx.x * COUNT * TAPS + i * TAPS + tap] = taps[i].sum[tap];
  __syncthreads();
  float* sums = p.sums + (static_cast<int64>(b) * p.parts + part) * p.channels * TAPS;
  for (int i = threadIdx.x; i < CHANNELS * TAPS; i += kSumThreads) {
    const int channel = i / TAPS, tap = i % TAPS, column = blockIdx.z * CHANNELS + channel;
    if (column >= p.channels) continue;
    float total = 0;
    if (BY_CHANNEL) {
      for (int o = 0; o < OUTER; ++o)
        total += cells[((o * INNER + channel / V) * COUNT + channel % V) * TAPS + tap];
    } else {
      for (int o = 0; o < INNER; ++o) total += cells[(channel * INNER + o) * TAPS + tap];
    }
    sums[static_cast<int64>(column) * TAPS + tap] = total;
  }
}

#define INSTANTIATE(code, name, T)                                                                 \
  template __global__ void tap_sums_kernel<T, 1, 1, true>(const __grid_constant__ TapSumsParams);  \
  template __global__ void tap_sums_kernel<T, 9, 1, true>(const __grid_constant__ TapSumsParams);  \
  template __global__ void tap_sums_kernel<T, 1, kVectorBytes / sizeof(T), true>(                  \
      const __grid_constant__ TapSumsParams);                                                      \
  template __global__ void tap_sums_kernel<T, 1, 1, false>(const __grid_constant__ TapSumsParams); \
  template __global__ void tap_sums_kernel<T, 9, 1, false>(const __grid_constant__ TapSumsParams); \
  template __global__ void tap_sums_kernel<T, 1, kVectorBytes / sizeof(T), false>(                 \
      const __grid_constant__ TapSumsParams);
DSTS_DTYPES(INSTANTIATE)
#undef INSTANTIATE

#ifndef __CUDACC_RTC__
namespace {

template <class T, int TAPS, int V>
void launch_sums(const TapSumsParams& p, void* stream) {
  constexpr int INNER = inner_threads(V);
  const bool by_channel = p.x_strides.c == 1;
  const int channels = by_channel ? INNER * V : kSumThreads / INNER;
  const size_t smem_bytes = sizeof(float) * kSumThreads * TAPS * (by_channel ? V : 1);
  const dim3 grid(static_cast<unsigned>(p.batch), static_cast<unsigned>(p.parts),
                  static_cast<unsigned>(ceil_div(p.channels, channels)));
  launch(by_channel ? tap_sums_kernel<T, TAPS, V, true> : tap_sums_kernel<T, TAPS, V, false>, grid,
         kSumThreads, smem_bytes, stream, p);
}

}  // namespace

void tap_sums(const TapSumsParams& p, int taps, int dtype, void* stream) {
  for_element(dtype, [&](auto element) {
    using T = decltype(element);
    if (taps == 9)
      launch_sums<T, 9, 1>(p, stream);
    else if (p.vector)
      launch_sums<T, 1, kVectorBytes / sizeof(T)>(p, stream);
    else
      launch_sums<T, 1, 1>(p, stream);
  });
}
#endif

}  // namespace dsts::cuda
