// Data gradient of the gated convolution, both operators in one kernel, with the gates' gradient as its
// epilogue.
//
// dx = gate*dxs + (1 - gate)*dxt and dgate = <x, dxs - dxt>, where dxs and dxt are the data gradients of the
// spatial and the temporal operator. A CTA has one tile of positions and channels and goes over it once for
// each operator, so one set of accumulators serves both: what the spatial one leaves in dx, the temporal one
// adds to. Where gates train, both are needed of every channel; where they are frozen (`listed`) a tile's
// columns come in the order of the sample's lists, and most tiles need one operator only.
#include "cuda/implicit.h"
#include "cuda/launch.h"

namespace dsts::cuda {

// Shared memory behind the operands.
struct GradientSmem {
  int64 shifts[kMaxTaps];
  Reduction reduction;
  int list[kTile];     // channels of the tile's columns
  float gate[kTile];   // NaN where the sample's neuron is out of range
  float dgate[kTile];  // <x, dxs> so far
  float sums[kSumGroups][kEpilogueColumns];
};

// One operator's part of a tile, which is staged: adds to dx, and to the gates' gradient.
template <class T, int THREADS>
__device__ __forceinline__ void epilogue(const DataGradientParams& p, bool temporal, int b, int p0, int width,
                                         int part, float* staging, GradientSmem& storage) {
  constexpr int kCells = kTile * kEpilogueColumns,
                kAtOnce = 4;  // cells whose loads are on their way together
  const bool along_rows = p.x_strides.c != 1;
  const T* x = static_cast<const T*>(p.x) + b * p.x_strides.b;
  T* dx = p.dx ? static_cast<T*>(p.dx) + b * p.x_strides.b : nullptr;
  for (int first = threadIdx.x; first < kCells; first += THREADS * kAtOnce) {
    // Loaded without a condition, and kept as they are until all are on their way; `x` stands in where there
    // is none.
    T values[kAtOnce], before[kAtOnce];
    const auto place = [&](int j, int* column, float** cell) -> int64 {  // -1 outside
      const int i = first + j * THREADS;
      const int r = along_rows ? i % kTile : i / kEpilogueColumns,
                c = along_rows ? i / kTile : i % kEpilogueColumns;
      const int position = p0 + r;
      *column = part * kEpilogueColumns + c, *cell = staging + r * kEpiloguePitch + c;
      if (position >= p.extent.positions || *column >= width) return -1;
      return storage.list[*column] * p.x_strides.c + offset_of(p.x_strides, place_of(p.extent, position));
    };
    int column;
    float* cell;
    if (p.dgate) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int64 at = place(j, &column, &cell);
        values[j] = x[at >= 0 ? at : 0];
      }
    }
    if (temporal && dx) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int64 at = place(j, &column, &cell);
        before[j] = *(at >= 0 ? dx + at : x);
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64 at = place(j, &column, &cell);
      const float v = *cell, gate = at >= 0 ? storage.gate[column] : 0;
      if (p.dgate) *cell = at >= 0 ? v * to_float(values[j]) : 0;
      if (at < 0 || !dx || gate == (temporal ? 1.0f : 0.0f)) continue;
      const float sum = (temporal ? 1 - gate : gate) * v;
      dx[at] = from_float<T>(temporal && gate != 0 ? sum + to_float(before[j]) : sum);
    }
  }
  if (!p.dgate) return;
  __syncthreads();
  const int c = threadIdx.x % kEpilogueColumns, group = threadIdx.x / kEpilogueColumns;
  if (group < kSumGroups) {  // groups of rows a column, added up in order
    float sum = 0;
    for (int r = group * kSumRows; r < (group + 1) * kSumRows; ++r) sum += staging[r * kEpiloguePitch + c];
    storage.sums[group][c] = sum;
  }
  __syncthreads();
  if (group == 0) {
    float sum = storage.sums[0][c];
#pragma unroll
    for (int other = 1; other < kSumGroups; ++other) sum += storage.sums[other][c];
    float& dgate = storage.dgate[part * kEpilogueColumns + c];
    dgate = temporal ? dgate - sum : sum;
  }
}

template <class E>
__device__ void data_gradient_body(const DataGradientParams& p) {
  using Mma = TileMma<E, true, true>;
  using T = typename Mma::T;
  using Operands = ImplicitOperands<Mma, true, true>;
  constexpr int kThreads = Mma::kThreads, kBlock = kKBlockBytes / static_cast<int>(sizeof(T));
  DSTS_DYNAMIC_SMEM(smem);
  GradientSmem& storage =
      *reinterpret_cast<GradientSmem*>(smem + product_smem_of<E, true, true>(kCapability));
  float* staging = reinterpret_cast<float*>(smem);

  const int tiles = ceil_div(p.extent.positions, kTile), across = ceil_div(p.channels, kTile);
  const int b = blockIdx.x / (tiles * across), tile = blockIdx.x / across % tiles;
  const int p0 = tile * kTile, c0 = blockIdx.x % across * kTile, width = min(kTile, p.channels - c0);
  const Plan& plan = plan_at(p.plans, b);
  const bool has_neuron = plan.filters >= 0;
  const Implicit<T> in = {static_cast<const T*>(p.grad),
                          static_cast<const T*>(p.filters),
                          &p.extent,
                          {1, 3, 3, kSpatialTaps, kTemporalTaps, -1},
                          p.outputs,
                          p.pitch,
                          width,
                          p.outputs,
                          p.pitch,
                          static_cast<int64>(p.channels) * p.pitch,
                          false,
                          storage.shifts};
  const int blocks = ceil_div(p.outputs, kBlock);
  in.fill(storage.shifts);
  for (int i = threadIdx.x; i < width; i += kThreads) {
    const int c = p.listed ? p.order[static_cast<int64>(b) * p.channels + c0 + i] : c0 + i;
    storage.list[i] = c;
    storage.gate[i] = has_neuron ? p.gate[static_cast<int64>(b) * p.channels + c] : not_a_number();
  }
  if (threadIdx.x == 0) storage.reduction = {blocks, 0, max(plan.filters, 0) * kMaxTaps, 0, 0, nullptr};
  __syncthreads();

  Mma mma;
  for (int temporal = 0; temporal < 2; ++temporal) {
    if (p.listed && (temporal ? c0 + width <= plan.temporal_start : c0 >= plan.spatial_channels)) continue;
    Operands operands(in, storage.reduction, b, p0, 0, storage.list);
    operands.start(temporal ? blocks * kSpatialTaps : 0);
    mma.clear();
    accumulate(mma, operands, blocks * (temporal ? kTemporalTaps : kSpatialTaps) * Operands::kStepsOfBlock,
               smem);
    for (int part = 0; part < kEpilogueParts && part * kEpilogueColumns < width; ++part) {
      __syncthreads();
      mma.store(staging, part);
      __syncthreads();
      epilogue<T, kThreads>(p, temporal != 0, b, p0, width, part, staging, storage);
    }
  }
  if (!p.dgate) return;
  __syncthreads();
  for (int i = threadIdx.x; i < width; i += kThreads)
    p.dgate[(static_cast<int64>(b) * tiles + tile) * p.channels + storage.list[i]] =
        has_neuron ? storage.dgate[i] : not_a_number();
}

template <class E>
__global__ void __launch_bounds__(MmaTraits<E>::kThreads, MmaTraits<E>::kResident)
    data_gradient_kernel(const __grid_constant__ DataGradientParams p) {
  if constexpr (MmaTraits<E>::kSupported) data_gradient_body<E>(p);
}

#define INSTANTIATE(code, name, E) \
  template __global__ void data_gradient_kernel<E>(const __grid_constant__ DataGradientParams);
DSTS_MMA_DTYPES(INSTANTIATE)
#undef INSTANTIATE

#ifndef __CUDACC_RTC__
void data_gradient(const DataGradientParams& p, int dtype, bool tf32, int capability, void* stream) {
  const int tiles = ceil_div(p.extent.positions, kTile) * ceil_div(p.channels, kTile);
  for_mma(dtype, tf32, [&](auto tag) {
    using E = typename decltype(tag)::Type;
    const size_t smem_bytes = product_smem_of<E, true, true>(capability) + sizeof(GradientSmem);
    launch(data_gradient_kernel<E>, dim3(static_cast<unsigned>(p.batch * tiles)), MmaTraits<E>::kThreads,
           smem_bytes, stream, p);
  });
}
#endif

}  // namespace dsts::cuda
