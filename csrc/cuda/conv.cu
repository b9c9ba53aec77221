// Grouped implicit convolution: every sample of a panel with its own filters, in one launch.
//
// A tile is 128 positions by 128 outputs; its reduction runs over K blocks and taps (implicit.h) in one
// pipelined loop (product.h). schedule.h deals the tiles out and splits what is left; a tile that several
// CTAs compute is added up from the workspace by the last of them, in order (fixup). The epilogue adds bias,
// ReLU and skip, and takes the tap sums that the next layer routes by.
//
// Filters come in four forms, each read as it lies:
//   packed      [K blocks, O, K block]: K blocks of one neuron behind one another, made by freezing
//   stored      [S * taps, O, C]: a mixing kernel as it is stored
//   listed      [S * taps, C, O]: rows picked by a channel list, for gated training
//   transposed  the same with the rows in order: a mixing kernel's data gradient
// The first two lie by K, the others by output. Rows of panels and filters are padded to 16 bytes, with zeros
// along K.
#include "cuda/implicit.h"
#include "cuda/launch.h"
#include "cuda/schedule.h"

namespace dsts::cuda {

// A tile, or a CTA's part of one. It lies in shared memory, so that it takes no registers from the loop.
struct WorkTile {
  int count;                   // of work tiles that the CTA has had
  int range_start, range_end;  // what is left of its range of the split tiles' iterations
  int b, index, tiles;         // sample, and which of its `tiles` along positions
  int p0, o0;                  // first position and output
  int from, to, length;        // iterations of this part, and of the whole tile
  int start;                   // of the tile among the iterations of all split tiles
  int bias_row;
  int has_neuron;  // else its outputs are NaN
  Reduction reduction;

  __device__ __forceinline__ bool is_whole() const { return to - from == length; }
};

// Shared memory behind the operands.
struct ConvSmem {
  int64 shifts[kMaxTaps];
  WorkTile tile;
  int answer;  // that one thread gives all others
  int waves;   // of the CTA's own tiles
};
static_assert(sizeof(ConvSmem) == kConvSmemBytes);

// Units of an epilogue whose skips are on their way together; from sm_100 on registers are full without.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kSkipsAtOnce = 1;
#else
constexpr int kSkipsAtOnce = 4;
#endif

// Bias, ReLU, skip and the store of one part of a tile's columns; leaves what was stored in `staging`, zero
// outside.
template <class T, int V, int THREADS>
__device__ __forceinline__ void store_outputs(const ConvParams& p, const WorkTile& tile, int column0,
                                              float* staging) {
  constexpr int kUnits = kTile * kEpilogueColumns / V, kAtOnce = kSkipsAtOnce;
  static_assert(kUnits % (THREADS * kAtOnce) == 0);
  const bool along_rows = V == 1 && p.out_strides.c != 1;
  T* out = static_cast<T*>(p.out) + tile.b * p.out_strides.b;
  const T* skip = p.skip ? static_cast<const T*>(p.skip) + tile.b * p.out_strides.b : nullptr;
  const float* bias = p.bias ? p.bias + static_cast<int64>(tile.bias_row) * p.outputs : nullptr;
#pragma unroll 1
  for (int first = threadIdx.x; first < kUnits; first += THREADS * kAtOnce) {
    Pack<T, V> skips[kAtOnce];
    int64 at[kAtOnce];  // -1 outside
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int u = first + j * THREADS;
      const int r = along_rows ? u % kTile : u / (kEpilogueColumns / V);
      const int c = along_rows ? u / kTile : u % (kEpilogueColumns / V) * V;
      const int position = tile.p0 + r, o = column0 + c;
      const bool within = position < p.extent.positions && o < p.outputs;
      at[j] = within ? o * p.out_strides.c + offset_of(p.out_strides, place_of(p.extent, position)) : -1;
      if (skip && within) skips[j] = *reinterpret_cast<const Pack<T, V>*>(skip + at[j]);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int u = first + j * THREADS;
      const int r = along_rows ? u % kTile : u / (kEpilogueColumns / V);
      const int c = along_rows ? u / kTile : u % (kEpilogueColumns / V) * V;
      float* cell = staging + r * kEpiloguePitch + c;
      if (at[j] < 0) {
        for (int i = 0; i < V; ++i) cell[i] = 0;
        continue;
      }
      Pack<T, V> y;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        float v = tile.has_neuron ? cell[i] : not_a_number();
        if (bias) v += bias[column0 + c + i];
        if (p.relu && v < 0) v = 0;  // keeps NaN, as torch does
        if (skip) v += to_float(skips[j].v[i]);
        y.v[i] = from_float<T>(v);
        cell[i] = to_float(y.v[i]);
      }
      *reinterpret_cast<Pack<T, V>*>(out + at[j]) = y;
    }
  }
}

// Tap sums of what is staged, into the tile's place in memory: some groups of rows a column, added up in
// order. `scratch` is kTapSumBytes of shared memory.
__device__ __forceinline__ void sum_tile(const ConvParams& p, const WorkTile& tile, int column0,
                                         const float* staging, float* scratch) {
  const int c = threadIdx.x % kEpilogueColumns, group = threadIdx.x / kEpilogueColumns, taps = p.sum_taps;
  if (group < kSumGroups) {
    float sum[kMaxSumTaps] = {};
    for (int r = group * kSumRows; r < (group + 1) * kSumRows; ++r) {
      const float v = staging[r * kEpiloguePitch + c];
      if (taps == 1) {
        sum[0] += v;
      } else if (tile.p0 + r < p.extent.positions) {
        const Place at = place_of(p.extent, tile.p0 + r);
#pragma unroll
        for (int tap = 0; tap < kMaxSumTaps; ++tap)
          sum[tap] += tap_reads(tap, at.h, at.w, p.extent) ? v : 0.0f;
      }
    }
#pragma unroll
    for (int tap = 0; tap < kMaxSumTaps; ++tap)
      if (tap < taps) scratch[(group * kEpilogueColumns + c) * kMaxSumTaps + tap] = sum[tap];
  }
  __syncthreads();
  if (group == 0 && column0 + c < p.outputs) {
    float* to = p.tile_sums +
                ((static_cast<int64>(tile.b) * tile.tiles + tile.index) * p.outputs + column0 + c) * taps;
    for (int tap = 0; tap < taps; ++tap) {
      float sum = scratch[c * kMaxSumTaps + tap];
#pragma unroll
      for (int other = 1; other < kSumGroups; ++other)
        sum += scratch[(other * kEpilogueColumns + c) * kMaxSumTaps + tap];
      to[tap] = sum;
    }
  }
}

// The last of a sample's tiles to arrive adds up the tap sums of all of them, in order.
template <int THREADS>
__device__ __forceinline__ void sum_sample(const ConvParams& p, const WorkTile& tile, int* answer) {
  const int tiles = tile.tiles, across = ceil_div(p.outputs, kTile);
  int* counter = p.arrival_counters + p.num_ctas + tile.b * across + tile.o0 / kTile;
  if (!last_to_arrive(counter, tiles, answer)) return;
  const int width = min(kTile, p.outputs - tile.o0) * p.sum_taps;
  const int64 size = static_cast<int64>(p.outputs) * p.sum_taps,
              first = static_cast<int64>(tile.o0) * p.sum_taps;
  for (int i = threadIdx.x; i < width; i += THREADS) {
    float sum = 0;
    for (int t = 0; t < tiles; ++t)
      sum += __ldcg(p.tile_sums + (static_cast<int64>(tile.b) * tiles + t) * size + first + i);
    p.sums[tile.b * size + first + i] = sum;
  }
}

// Ends a tile, whose columns `fill` stages part by part.
template <class T, int THREADS, class Fill>
__device__ __forceinline__ void epilogue(const ConvParams& p, const WorkTile& tile, unsigned char* smem,
                                         int* answer, const Fill& fill) {
  float* staging = reinterpret_cast<float*>(smem);
  for (int part = 0; part < kEpilogueParts; ++part) {
    const int column0 = tile.o0 + part * kEpilogueColumns;
    if (column0 >= p.outputs) break;
    __syncthreads();
    fill(staging, part);
    __syncthreads();
    if (p.vector_out)
      store_outputs<T, kVectorBytes / sizeof(T), THREADS>(p, tile, column0, staging);
    else
      store_outputs<T, 1, THREADS>(p, tile, column0, staging);
    if (p.sum_taps) {
      __syncthreads();
      sum_tile(p, tile, column0, staging, reinterpret_cast<float*>(smem + kEpilogueBytes));
    }
  }
  if (p.sum_taps) sum_sample<THREADS>(p, tile, answer);
}

// Puts this CTA's part of a tile into the workspace; the last CTA to bring one adds all up. Nobody waits.
template <class Mma>
__device__ __forceinline__ void fixup(const ConvParams& p, const Schedule& schedule, const WorkTile& tile,
                                      const Mma& mma, unsigned char* smem, int* answer) {
  constexpr int kThreads = Mma::kThreads, kCells = kTile * kEpilogueColumns;
  float* staging = reinterpret_cast<float*>(smem);
  float* part_of_tile = p.workspace + static_cast<int64>(2 * blockIdx.x + (tile.from > 0)) * kTile * kTile;
  for (int part = 0; part < kEpilogueParts; ++part) {
    __syncthreads();
    mma.store(staging, part);
    __syncthreads();
#pragma unroll 1  // addresses worked out ahead would take registers from the loop
    for (int i = threadIdx.x; i < kCells; i += kThreads)
      part_of_tile[part * kCells + i] = staging[i / kEpilogueColumns * kEpiloguePitch + i % kEpilogueColumns];
  }
  const int start = tile.start, end = start + tile.length, cta = blockIdx.x;
  int first = cta, last = cta, parts = 1;  // CTAs that have a part are neighbours, but for idle ones
  for (int q = cta - 1; q >= 0 && schedule.starts[q + 1] > start; --q)
    if (schedule.has_part(q, start, end)) first = q, ++parts;
  for (int q = cta + 1; q < p.num_ctas && schedule.starts[q] < end; ++q)
    if (schedule.has_part(q, start, end)) last = q, ++parts;
  if (!last_to_arrive(p.arrival_counters + last, parts, answer)) return;
  epilogue<typename Mma::T, kThreads>(p, tile, smem, answer, [&](float* to, int part) {
    constexpr int kAtOnce = 8;  // cells whose parts are on their way together
    static_assert(kCells % (kThreads * kAtOnce) == 0);
    for (int i = threadIdx.x; i < kCells; i += kThreads * kAtOnce) {
      float sum[kAtOnce] = {};
      for (int q = first; q <= last; ++q) {
        if (!schedule.has_part(q, start, end)) continue;
        const int64 number = 2 * q + (schedule.starts[q] > start);
        const float* from = p.workspace + number * kTile * kTile + part * kCells + i;
        float cells[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) cells[j] = __ldcg(from + j * kThreads);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) sum[j] += cells[j];
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int cell = i + j * kThreads;
        to[cell / kEpilogueColumns * kEpiloguePitch + cell % kEpilogueColumns] = sum[j];
      }
    }
  });
}

// What the plan, or the index of a mixing kernel, says of a sample; returns its iterations a tile.
template <int BLOCK>
__device__ __forceinline__ int read_plan(const ConvParams& p, int b, WorkTile* tile) {
  Reduction& reduction = tile->reduction;
  int base, temporal_blocks = 0;
  if (p.plan) {
    const Plan& plan = plan_at(p.plan, b);
    temporal_blocks = plan.temporal_blocks, base = max(plan.filters, 0);  // without a slot the panel is NaN
    tile->has_neuron = true, tile->bias_row = plan.row;
    reduction.spatial_blocks = plan.spatial_blocks, reduction.spatial_channels = plan.spatial_channels;
    reduction.temporal_start = plan.temporal_start;
    reduction.order = p.order ? p.order + static_cast<int64>(plan.row) * p.k_channels : nullptr;
  } else {
    const int64 index =
        p.index_64 ? static_cast<const int64*>(p.index)[b] : static_cast<const int*>(p.index)[b];
    tile->has_neuron = index >= 0 && index < p.slots;
    tile->bias_row = base = tile->has_neuron ? static_cast<int>(index) : 0;
    reduction.spatial_blocks = ceil_div(p.width, BLOCK);
    reduction.order = nullptr;
  }
  reduction.temporal_column = reduction.spatial_blocks * BLOCK;
  reduction.base = p.packed ? base : base * (p.spatial_taps + p.temporal_taps);
  return reduction.spatial_blocks * p.spatial_taps + temporal_blocks * p.temporal_taps;
}

// This CTA's next tile: one of each of `waves`, then those that its range of iterations reaches into. False
// after the last.
template <int BLOCK>
__device__ __forceinline__ bool next_work_tile(const ConvParams& p, const Schedule& schedule, int waves,
                                               WorkTile* tile) {
  const int count = tile->count++, across = ceil_div(p.outputs, kTile);
  int number = blockIdx.x + count * p.num_ctas, start = 0;
  if (count >= waves) {
    if (tile->range_start >= tile->range_end) return false;
    const int i = schedule.tile_of(tile->range_start);
    number = waves * p.num_ctas + i, start = schedule.tile_start(i);
  }
  const int b = number / schedule.per_sample, in_sample = number - b * schedule.per_sample;
  tile->b = b, tile->index = in_sample / across, tile->tiles = schedule.per_sample / across,
  tile->start = start;
  tile->p0 = tile->index * kTile, tile->o0 = (in_sample - tile->index * across) * kTile;
  tile->length = read_plan<BLOCK>(p, b, tile);
  if (count < waves) {
    tile->from = 0, tile->to = tile->length;
  } else {
    tile->from = tile->range_start - start, tile->to = min(tile->range_end - start, tile->length);
    tile->range_start = start + tile->length;
  }
  return true;
}

template <class E, bool BY_K>
__device__ void conv_body(const ConvParams& p) {
  using Mma = TileMma<E, true, BY_K>;
  using T = typename Mma::T;
  using Operands = ImplicitOperands<Mma, BY_K, false>;
  constexpr int kBlock = kKBlockBytes / static_cast<int>(sizeof(T));
  DSTS_DYNAMIC_SMEM(smem);
  ConvSmem& storage = *reinterpret_cast<ConvSmem*>(smem + product_smem_of<E, true, BY_K>(kCapability));
  WorkTile& tile = storage.tile;

  const Implicit<T> in = {static_cast<const T*>(p.panel),
                          static_cast<const T*>(p.filters),
                          &p.extent,
                          {p.kt, p.kh, p.kw, p.spatial_taps, p.temporal_taps, p.sign},
                          p.width,
                          p.pitch,
                          p.outputs,
                          p.k_channels,
                          p.filter_pitch,
                          static_cast<int64>(BY_K ? p.outputs : p.k_channels) * p.filter_pitch,
                          p.packed != 0,
                          storage.shifts};
  in.fill(storage.shifts);
  const int per_sample = ceil_div(p.extent.positions, kTile) * ceil_div(p.outputs, kTile);
  Schedule schedule = {p.num_ctas, p.waves, per_sample, 0, nullptr, nullptr};
  const int waves = schedule.build<Mma::kThreads>(
      [&](int b) {
        return p.plan ? plan_at(p.plan, b).spatial_blocks * p.spatial_taps +
                            plan_at(p.plan, b).temporal_blocks * p.temporal_taps
                      : ceil_div(p.width, kBlock) * p.spatial_taps;
      },
      p.batch * per_sample, p.idle_percent, reinterpret_cast<int*>(&storage + 1));

  if (threadIdx.x == 0) {
    tile.count = 0;  // a last wave that is not full ends before some CTAs; then nothing is shared
    storage.waves = min(waves, ceil_div(p.batch * per_sample - static_cast<int>(blockIdx.x), p.num_ctas));
    tile.range_start = schedule.starts[blockIdx.x], tile.range_end = schedule.starts[blockIdx.x + 1];
  }

  Mma mma;
  while (true) {
    __syncthreads();  // all are done with the tile before
    if (threadIdx.x == 0) storage.answer = next_work_tile<kBlock>(p, schedule, storage.waves, &tile);
    __syncthreads();
    if (!storage.answer) return;
    Operands operands(in, tile.reduction, tile.b, tile.p0, tile.o0, nullptr);
    operands.start(tile.from);
    mma.clear();
    accumulate(mma, operands, (tile.to - tile.from) * Operands::kStepsOfBlock, smem);
    if (tile.is_whole())
      epilogue<T, Mma::kThreads>(p, tile, smem, &storage.answer,
                                 [&](float* staging, int part) { mma.store(staging, part); });
    else
      fixup(p, schedule, tile, mma, smem, &storage.answer);
  }
}

template <class E, bool BY_K>
__global__ void __launch_bounds__(MmaTraits<E>::kThreads, MmaTraits<E>::kResident)
    conv_kernel(const __grid_constant__ ConvParams p) {
  if constexpr (MmaTraits<E>::kSupported) conv_body<E, BY_K>(p);
}

#define INSTANTIATE(code, name, E)                                                   \
  template __global__ void conv_kernel<E, true>(const __grid_constant__ ConvParams); \
  template __global__ void conv_kernel<E, false>(const __grid_constant__ ConvParams);
DSTS_MMA_DTYPES(INSTANTIATE)
#undef INSTANTIATE

template <class E>
DSTS_BOTH_SIDES constexpr int conv_smem(int capability, bool by_output, int num_ctas) {
  const int operands =
      by_output ? product_smem_of<E, true, false>(capability) : product_smem_of<E, true, true>(capability);
  return operands + kConvSmemBytes + schedule_bytes(num_ctas, MmaTraits<E>::kThreads);
}

// With two CTAs on every multiprocessor of the largest chips. From sm_80 on the system takes 1 KiB of each.
template <class E>
DSTS_BOTH_SIDES constexpr bool fits(int capability) {
  const int most = product_smem_kib(capability) * 1024 - (capability < 80 ? 0 : 1024);
  const int num_ctas = 2 * (capability < 80 ? 84 : 160);
  return conv_smem<E>(capability, false, num_ctas) <= most &&
         conv_smem<E>(capability, true, num_ctas) <= most;
}
static_assert(fits<__half>(70) && fits<__half>(75) && fits<__half>(80) && fits<__nv_bfloat16>(80) &&
                  fits<Tf32>(80),
              "product_smem_kib of tiles.h is what a convolution takes at most");

#ifndef __CUDACC_RTC__
void conv(const ConvParams& p, bool by_output, int dtype, bool tf32, int capability, void* stream) {
  for_mma(dtype, tf32, [&](auto tag) {
    using E = typename decltype(tag)::Type;
    const int smem_bytes = conv_smem<E>(capability, by_output, p.num_ctas);
    launch(by_output ? conv_kernel<E, false> : conv_kernel<E, true>, dim3(static_cast<unsigned>(p.num_ctas)),
           MmaTraits<E>::kThreads, static_cast<size_t>(smem_bytes), stream, p);
  });
}
#endif

}  // namespace dsts::cuda
