// Data gradient of the gated convolution, both operators in one kernel, with the gates' gradient as its
// epilogue.
//
// dx = gate*dxs + (1 - gate)*dxt and dgate = <x, dxs - dxt>, where dxs and dxt are the operators' own data
// gradients. A block has one tile of positions and channels and goes over it once for each operator, so one
// set of accumulators serves both: what the first leaves in dx, the second adds to. Where gates train, both
// are needed of every channel; where they are frozen (`listed`) a tile's columns come in the order of the
// sample's lists, and most tiles need one operator only.
#include "cuda/implicit.h"
#include "cuda/launch.h"

namespace dsts::cuda {

struct GradientShared {
  int64 shifts[kTaps];
  Reduction sum;
  int list[kTile];     // channels of the tile's columns
  float gate[kTile];   // NaN where the sample's neuron is out of range
  float found[kTile];  // <x, dxs> so far
  float sums[kSumGroups][kChunkColumns];
};

// One operator's part of a tile, in the chunk: adds to dx, and to the gates' gradient.
template <class T, int THREADS>
__device__ __forceinline__ void finish_operator(const DataGradientParams& p, bool second, int b, int p0,
                                                int width, int part, float* chunk, GradientShared& shared) {
  constexpr int kCells = kTile * kChunkColumns, kAtOnce = 4;  // cells whose loads are on their way together
  const bool along_rows = p.x_strides.c != 1;
  const T* x = static_cast<const T*>(p.x) + b * p.x_strides.b;
  T* dx = p.dx ? static_cast<T*>(p.dx) + b * p.x_strides.b : nullptr;
  for (int first = threadIdx.x; first < kCells; first += THREADS * kAtOnce) {
    // Loaded without a condition, and kept as they are until all are on their way; `x` stands in where there
    // is none.
    T seen[kAtOnce], before[kAtOnce];
    const auto place = [&](int j, int* column, float** cell) -> int64 {  // -1 outside
      const int i = first + j * THREADS;
      const int r = along_rows ? i % kTile : i / kChunkColumns,
                c = along_rows ? i / kTile : i % kChunkColumns;
      const int position = p0 + r;
      *column = part * kChunkColumns + c, *cell = chunk + r * kChunkPitch + c;
      if (position >= p.extent.positions || *column >= width) return -1;
      return shared.list[*column] * p.x_strides.c + offset_of(p.x_strides, place_of(p.extent, position));
    };
    int column;
    float* cell;
    if (p.dgate) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int64 at = place(j, &column, &cell);
        seen[j] = x[at >= 0 ? at : 0];
      }
    }
    if (second && dx) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int64 at = place(j, &column, &cell);
        before[j] = *(at >= 0 ? dx + at : x);
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64 at = place(j, &column, &cell);
      const float v = *cell, gate = at >= 0 ? shared.gate[column] : 0;
      if (p.dgate) *cell = at >= 0 ? v * to_float(seen[j]) : 0;
      if (at < 0 || !dx || gate == (second ? 1.0f : 0.0f)) continue;
      const float sum = (second ? 1 - gate : gate) * v;
      dx[at] = from_float<T>(second && gate != 0 ? sum + to_float(before[j]) : sum);
    }
  }
  if (!p.dgate) return;
  __syncthreads();
  const int c = threadIdx.x % kChunkColumns, group = threadIdx.x / kChunkColumns;
  if (group < kSumGroups) {  // groups of rows a column, added up in order
    float sum = 0;
    for (int r = group * kSumRows; r < (group + 1) * kSumRows; ++r) sum += chunk[r * kChunkPitch + c];
    shared.sums[group][c] = sum;
  }
  __syncthreads();
  if (group == 0) {
    float sum = shared.sums[0][c];
#pragma unroll
    for (int other = 1; other < kSumGroups; ++other) sum += shared.sums[other][c];
    float& found = shared.found[part * kChunkColumns + c];
    found = second ? found - sum : sum;
  }
}

template <class E>
__device__ void data_gradient_body(const DataGradientParams& p) {
  using Tiles = Engine<E, true, true>;
  using T = typename Tiles::T;
  using Operands = ImplicitOperands<Tiles, true, true>;
  constexpr int kThreads = Tiles::kThreads, kBlock = kBlockBytes / static_cast<int>(sizeof(T));
  DSTS_DYNAMIC_SHARED(memory);
  GradientShared& shared =
      *reinterpret_cast<GradientShared*>(memory + product_bytes<E, true, true>(kCapability));
  float* chunk = reinterpret_cast<float*>(memory);

  const int tiles = ceil_div(p.extent.positions, kTile), columns = ceil_div(p.channels, kTile);
  const int b = blockIdx.x / (tiles * columns), tile = blockIdx.x / columns % tiles;
  const int p0 = tile * kTile, c0 = blockIdx.x % columns * kTile, width = min(kTile, p.channels - c0);
  const int* plan = p.plans + b * kPlan;
  const bool known = plan[0] >= 0;
  const Implicit<T> in = {static_cast<const T*>(p.grad),
                          static_cast<const T*>(p.filters),
                          &p.extent,
                          {1, 3, 3, 9, 3, -1},
                          p.outputs,
                          p.pitch,
                          width,
                          p.outputs,
                          p.pitch,
                          static_cast<int64>(p.channels) * p.pitch,
                          false,
                          shared.shifts};
  const int blocks = ceil_div(p.outputs, kBlock);
  in.fill(shared.shifts);
  for (int i = threadIdx.x; i < width; i += kThreads) {
    const int c = p.listed ? p.order[static_cast<int64>(b) * p.channels + c0 + i] : c0 + i;
    shared.list[i] = c;
    shared.gate[i] = known ? p.gate[static_cast<int64>(b) * p.channels + c] : not_a_number();
  }
  if (threadIdx.x == 0) shared.sum = {blocks, 0, max(plan[0], 0) * kTaps, 0, 0, nullptr};
  __syncthreads();

  Tiles engine;
  for (int second = 0; second < 2; ++second) {
    if (p.listed && (second ? c0 + width <= plan[4] : c0 >= plan[3])) continue;
    Operands operands(in, shared.sum, b, p0, 0, shared.list);
    operands.start(second ? blocks * 9 : 0);
    engine.clear();
    accumulate(engine, operands, blocks * (second ? 3 : 9) * Operands::kStepsOfBlock, memory);
    for (int part = 0; part < kParts && part * kChunkColumns < width; ++part) {
      __syncthreads();
      engine.store(chunk, part);
      __syncthreads();
      finish_operator<T, kThreads>(p, second != 0, b, p0, width, part, chunk, shared);
    }
  }
  if (!p.dgate) return;
  __syncthreads();
  for (int i = threadIdx.x; i < width; i += kThreads)
    p.dgate[(static_cast<int64>(b) * tiles + tile) * p.channels + shared.list[i]] =
        known ? shared.found[i] : not_a_number();
}

template <class E>
__global__ void __launch_bounds__(Multiplier<E>::kThreads, Multiplier<E>::kResident)
    data_gradient_kernel(const __grid_constant__ DataGradientParams p) {
  if constexpr (Multiplier<E>::kSupported) data_gradient_body<E>(p);
}

#define INSTANTIATE(E) \
  template __global__ void data_gradient_kernel<E>(const __grid_constant__ DataGradientParams);
DSTS_ENGINES(INSTANTIATE)
#undef INSTANTIATE

#ifndef __CUDACC_RTC__
void data_gradient(const DataGradientParams& p, int dtype, bool tf32, int capability, void* stream) {
  const int tiles = ceil_div(p.extent.positions, kTile) * ceil_div(p.channels, kTile);
  for_engine(dtype, tf32, [&](auto tag) {
    using E = typename decltype(tag)::Type;
    const size_t shared = product_bytes<E, true, true>(capability) + sizeof(GradientShared);
    launch(data_gradient_kernel<E>, dim3(static_cast<unsigned>(p.batch * tiles)), Multiplier<E>::kThreads,
           shared, stream, p);
  });
}
#endif

}  // namespace dsts::cuda
