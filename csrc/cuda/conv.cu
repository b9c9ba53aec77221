// Grouped implicit convolution: every sample of a panel with its own filters, in one launch.
//
// A tile is 128 positions by 128 outputs; its reduction runs over K blocks and taps (implicit.h) in one
// pipelined loop (product.h). schedule.h deals the tiles out and shares what is left; a tile that several
// programs compute is added up from memory by the last of them, in order. The epilogue adds bias, ReLU and
// skip, and takes the tap sums that the next layer routes by.
//
// Filters come in four forms, each read as it lies:
//   packed   (blocks, O, K block): K blocks of one neuron behind one another, made by freezing
//   rows     (slots * taps, O, C): a mixing kernel as it is stored
//   listed   (slots * taps, C, O): rows picked by a channel list, for gated training
//   columns  the same with the rows in order: a mixing kernel's data gradient
// The first two lie by K, the others by output. Rows of panels and filters are padded to 16 bytes, with zeros
// along K.
#include "cuda/implicit.h"
#include "cuda/launch.h"
#include "cuda/schedule.h"

namespace dsts::cuda {

// A tile, or a program's part of one: iterations `from` to `to` of `length`, which count from `start` among
// the shared ones. It lies in shared memory, so that it takes no registers from the loop.
struct Tile {
  int item, begin, stop;        // how many the program had; what is left of its range of shared iterations
  int b, index, tiles, p0, o0;  // sample, which of its `tiles` along positions, first position and output
  int from, to, length, start;
  int bias_row;
  int known;  // else its outputs are NaN
  Reduction sum;
};

// Shared memory behind the operands.
struct ConvShared {
  int64 shifts[kTaps];
  Tile tile;
  int flag;
};

// Units of an epilogue whose skips are on their way together; from sm_100 on registers are full without.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kSkipsAtOnce = 1;
#else
constexpr int kSkipsAtOnce = 4;
#endif

// Bias, ReLU, skip and the store of one part of a tile's columns; leaves what was stored in the chunk, zero
// outside.
template <class T, int V, int THREADS>
__device__ __forceinline__ void finish_cells(const ConvParams& p, const Tile& tile, int column0,
                                             float* chunk) {
  constexpr int kUnits = kTile * kChunkColumns / V, kAtOnce = kSkipsAtOnce;
  static_assert(kUnits % (THREADS * kAtOnce) == 0);
  const bool along_rows = V == 1 && p.out_strides.c != 1;
  T* out = static_cast<T*>(p.out) + tile.b * p.out_strides.b;
  const T* skip = p.skip ? static_cast<const T*>(p.skip) + tile.b * p.out_strides.b : nullptr;
  const float* bias = p.bias ? p.bias + static_cast<int64>(tile.bias_row) * p.outputs : nullptr;
#pragma unroll 1
  for (int first = threadIdx.x; first < kUnits; first += THREADS * kAtOnce) {
    Pack<T, V> more[kAtOnce];
    int64 at[kAtOnce];  // -1 outside
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int u = first + j * THREADS;
      const int r = along_rows ? u % kTile : u / (kChunkColumns / V);
      const int c = along_rows ? u / kTile : u % (kChunkColumns / V) * V;
      const int position = tile.p0 + r, o = column0 + c;
      const bool within = position < p.extent.positions && o < p.outputs;
      at[j] = within ? o * p.out_strides.c + offset_of(p.out_strides, place_of(p.extent, position)) : -1;
      if (skip && within) more[j] = *reinterpret_cast<const Pack<T, V>*>(skip + at[j]);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int u = first + j * THREADS;
      const int r = along_rows ? u % kTile : u / (kChunkColumns / V);
      const int c = along_rows ? u / kTile : u % (kChunkColumns / V) * V;
      float* cell = chunk + r * kChunkPitch + c;
      if (at[j] < 0) {
        for (int i = 0; i < V; ++i) cell[i] = 0;
        continue;
      }
      Pack<T, V> y;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        float v = tile.known ? cell[i] : not_a_number();
        if (bias) v += bias[column0 + c + i];
        if (p.relu && v < 0) v = 0;  // keeps NaN, as torch does
        if (skip) v += to_float(more[j].v[i]);
        y.v[i] = from_float<T>(v);
        cell[i] = to_float(y.v[i]);
      }
      *reinterpret_cast<Pack<T, V>*>(out + at[j]) = y;
    }
  }
}

// Tap sums of a chunk, into the tile's place in memory: some groups of rows a column, added up in order.
__device__ __forceinline__ void sum_taps(const ConvParams& p, const Tile& tile, int column0,
                                         const float* chunk, float* room) {
  const int c = threadIdx.x % kChunkColumns, group = threadIdx.x / kChunkColumns, taps = p.sum_taps;
  if (group < kSumGroups) {
    float sum[9] = {};
    for (int r = group * kSumRows; r < (group + 1) * kSumRows; ++r) {
      const float v = chunk[r * kChunkPitch + c];
      if (taps == 1) {
        sum[0] += v;
      } else if (tile.p0 + r < p.extent.positions) {
        const Place at = place_of(p.extent, tile.p0 + r);
#pragma unroll
        for (int tap = 0; tap < 9; ++tap) sum[tap] += tap_meets(tap, at.h, at.w, p.extent) ? v : 0.0f;
      }
    }
#pragma unroll
    for (int tap = 0; tap < 9; ++tap)
      if (tap < taps) room[(group * kChunkColumns + c) * 9 + tap] = sum[tap];
  }
  __syncthreads();
  if (group == 0 && column0 + c < p.outputs) {
    float* to = p.part_sums +
                ((static_cast<int64>(tile.b) * tile.tiles + tile.index) * p.outputs + column0 + c) * taps;
    for (int tap = 0; tap < taps; ++tap) {
      float sum = room[c * 9 + tap];
#pragma unroll
      for (int other = 1; other < kSumGroups; ++other) sum += room[(other * kChunkColumns + c) * 9 + tap];
      to[tap] = sum;
    }
  }
}

// The last of a sample's tiles to come here adds up the tap sums of all of them, in order.
template <int THREADS>
__device__ __forceinline__ void add_tiles(const ConvParams& p, const Tile& tile, int* flag) {
  const int tiles = tile.tiles, columns = ceil_div(p.outputs, kTile);
  if (!last_to_arrive(p.flags + p.programs + tile.b * columns + tile.o0 / kTile, tiles, flag)) return;
  const int width = min(kTile, p.outputs - tile.o0) * p.sum_taps;
  const int64 size = static_cast<int64>(p.outputs) * p.sum_taps,
              first = static_cast<int64>(tile.o0) * p.sum_taps;
  for (int i = threadIdx.x; i < width; i += THREADS) {
    float whole = 0;
    for (int t = 0; t < tiles; ++t)
      whole += __ldcg(p.part_sums + (static_cast<int64>(tile.b) * tiles + t) * size + first + i);
    p.sums[tile.b * size + first + i] = whole;
  }
}

// Ends a tile whose parts `fill` puts into the chunk.
template <class T, int THREADS, class Fill>
__device__ __forceinline__ void finish(const ConvParams& p, const Tile& tile, unsigned char* memory,
                                       int* flag, const Fill& fill) {
  float* chunk = reinterpret_cast<float*>(memory);
  for (int part = 0; part < kParts; ++part) {
    const int column0 = tile.o0 + part * kChunkColumns;
    if (column0 >= p.outputs) break;
    __syncthreads();
    fill(chunk, part);
    __syncthreads();
    if (p.vector_out)
      finish_cells<T, 16 / sizeof(T), THREADS>(p, tile, column0, chunk);
    else
      finish_cells<T, 1, THREADS>(p, tile, column0, chunk);
    if (p.sum_taps) {
      __syncthreads();
      sum_taps(p, tile, column0, chunk, reinterpret_cast<float*>(memory + kChunkBytes));
    }
  }
  if (p.sum_taps) add_tiles<THREADS>(p, tile, flag);
}

// Puts this program's part of a tile into memory; the last program to bring one adds all up. Nobody waits.
template <class Engine>
__device__ __forceinline__ void share(const ConvParams& p, const Schedule& schedule, const Tile& tile,
                                      const Engine& engine, unsigned char* memory, int* flag) {
  constexpr int kThreads = Engine::kThreads, kCells = kTile * kChunkColumns;
  float* chunk = reinterpret_cast<float*>(memory);
  float* own = p.partial + static_cast<int64>(2 * blockIdx.x + (tile.from > 0)) * kTile * kTile;
  for (int part = 0; part < kParts; ++part) {
    __syncthreads();
    engine.store(chunk, part);
    __syncthreads();
#pragma unroll 1  // addresses worked out ahead would take registers from the loop
    for (int i = threadIdx.x; i < kCells; i += kThreads)
      own[part * kCells + i] = chunk[i / kChunkColumns * kChunkPitch + i % kChunkColumns];
  }
  const int start = tile.start, end = start + tile.length, mine = blockIdx.x;
  int first = mine, last = mine, parts = 1;  // programs that have a part are neighbours, but for idle ones
  for (int q = mine - 1; q >= 0 && schedule.starts[q + 1] > start; --q)
    if (schedule.has_part(q, start, end)) first = q, ++parts;
  for (int q = mine + 1; q < p.programs && schedule.starts[q] < end; ++q)
    if (schedule.has_part(q, start, end)) last = q, ++parts;
  if (!last_to_arrive(p.flags + last, parts, flag)) return;
  finish<typename Engine::T, kThreads>(p, tile, memory, flag, [&](float* to, int part) {
    constexpr int kAtOnce = 8;  // cells whose parts are on their way together
    for (int i = threadIdx.x; i < kCells; i += kThreads * kAtOnce) {
      float sum[kAtOnce] = {};
      for (int q = first; q <= last; ++q) {
        if (!schedule.has_part(q, start, end)) continue;
        const int64 slot = 2 * q + (schedule.starts[q] > start);
        const float* from = p.partial + slot * kTile * kTile + part * kCells + i;
        float more[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) more[j] = __ldcg(from + j * kThreads);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) sum[j] += more[j];
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int cell = i + j * kThreads;
        to[cell / kChunkColumns * kChunkPitch + cell % kChunkColumns] = sum[j];
      }
    }
  });
}

// What the plan, or the index of a mixing kernel, says of a sample; returns its iterations a tile.
template <int BLOCK>
__device__ __forceinline__ int look_up(const ConvParams& p, int b, Tile* tile) {
  int base, blocks_2 = 0;
  if (p.plan) {
    const int* plan = p.plan + b * kPlan;
    blocks_2 = plan[2], base = max(plan[0], 0);  // without a slot the panel is NaN
    tile->known = true, tile->bias_row = plan[5];
    tile->sum.blocks_1 = plan[1], tile->sum.count_1 = plan[3], tile->sum.start_2 = plan[4];
    tile->sum.order = p.order ? p.order + static_cast<int64>(plan[5]) * p.rows : nullptr;
  } else {
    const int64 index =
        p.index_wide ? static_cast<const int64*>(p.index)[b] : static_cast<const int*>(p.index)[b];
    tile->known = index >= 0 && index < p.slots;
    tile->bias_row = base = tile->known ? static_cast<int>(index) : 0;
    tile->sum.blocks_1 = ceil_div(p.width, BLOCK);
    tile->sum.order = nullptr;
  }
  tile->sum.columns_2 = tile->sum.blocks_1 * BLOCK;
  tile->sum.base = p.packed ? base : base * (p.taps_1 + p.taps_2);
  return tile->sum.blocks_1 * p.taps_1 + blocks_2 * p.taps_2;
}

// This program's next tile: one of every wave, then those its range of shared iterations reaches into. False
// after the last.
template <int BLOCK>
__device__ __forceinline__ bool choose(const ConvParams& p, const Schedule& schedule, Tile* tile) {
  const int item = tile->item++, columns = ceil_div(p.outputs, kTile);
  int number = blockIdx.x + item * p.programs, start = 0;
  if (item >= p.waves) {
    if (tile->begin >= tile->stop) return false;
    const int i = schedule.tile_of(tile->begin);
    number = p.waves * p.programs + i, start = schedule.tile_start(i);
  }
  const int b = number / schedule.per_sample, in_sample = number - b * schedule.per_sample;
  tile->b = b, tile->index = in_sample / columns, tile->tiles = schedule.per_sample / columns,
  tile->start = start;
  tile->p0 = tile->index * kTile, tile->o0 = (in_sample - tile->index * columns) * kTile;
  tile->length = look_up<BLOCK>(p, b, tile);
  if (item < p.waves) {
    tile->from = 0, tile->to = tile->length;
  } else {
    tile->from = tile->begin - start, tile->to = min(tile->stop - start, tile->length);
    tile->begin = start + tile->length;
  }
  return true;
}

template <class E, bool BY_K>
__device__ void conv_body(const ConvParams& p) {
  using Tiles = Engine<E, true, BY_K>;
  using T = typename Tiles::T;
  using Operands = ImplicitOperands<Tiles, BY_K, false>;
  constexpr int kBlock = kBlockBytes / static_cast<int>(sizeof(T));
  DSTS_DYNAMIC_SHARED(memory);
  ConvShared& shared = *reinterpret_cast<ConvShared*>(memory + product_bytes<E, true, BY_K>(kCapability));
  Tile& tile = shared.tile;

  const Implicit<T> in = {static_cast<const T*>(p.panel),
                          static_cast<const T*>(p.filters),
                          &p.extent,
                          {p.kt, p.kh, p.kw, p.taps_1, p.taps_2, p.sign},
                          p.width,
                          p.pitch,
                          p.outputs,
                          p.rows,
                          p.filter_pitch,
                          static_cast<int64>(BY_K ? p.outputs : p.rows) * p.filter_pitch,
                          p.packed != 0,
                          shared.shifts};
  in.fill(shared.shifts);
  const int per_sample = ceil_div(p.extent.positions, kTile) * ceil_div(p.outputs, kTile);
  Schedule schedule = {p.programs, p.waves, per_sample, 0, nullptr, nullptr};
  schedule.build<Tiles::kThreads>(
      [&](int b) {
        return p.plan ? p.plan[b * kPlan + 1] * p.taps_1 + p.plan[b * kPlan + 2] * p.taps_2
                      : ceil_div(p.width, kBlock) * p.taps_1;
      },
      p.batch * per_sample, reinterpret_cast<int*>(&shared + 1));

  if (threadIdx.x == 0)
    tile.item = 0, tile.begin = schedule.starts[blockIdx.x], tile.stop = schedule.starts[blockIdx.x + 1];

  Tiles engine;
  while (true) {
    __syncthreads();  // all are done with the tile before
    if (threadIdx.x == 0) shared.flag = choose<kBlock>(p, schedule, &tile);
    __syncthreads();
    if (!shared.flag) return;
    Operands operands(in, tile.sum, tile.b, tile.p0, tile.o0, nullptr);
    operands.start(tile.from);
    engine.clear();
    accumulate(engine, operands, (tile.to - tile.from) * Operands::kStepsOfBlock, memory);
    if (tile.to - tile.from == tile.length)
      finish<T, Tiles::kThreads>(p, tile, memory, &shared.flag,
                                 [&](float* chunk, int part) { engine.store(chunk, part); });
    else
      share(p, schedule, tile, engine, memory, &shared.flag);
  }
}

template <class E, bool BY_K>
__global__ void __launch_bounds__(Multiplier<E>::kThreads, Multiplier<E>::kResident)
    conv_kernel(const __grid_constant__ ConvParams p) {
  if constexpr (Multiplier<E>::kSupported) conv_body<E, BY_K>(p);
}

#define INSTANTIATE(E)                                                               \
  template __global__ void conv_kernel<E, true>(const __grid_constant__ ConvParams); \
  template __global__ void conv_kernel<E, false>(const __grid_constant__ ConvParams);
DSTS_ENGINES(INSTANTIATE)
#undef INSTANTIATE

#ifndef __CUDACC_RTC__
void conv(const ConvParams& p, bool by_output, int dtype, bool tf32, int capability, void* stream) {
  for_engine(dtype, tf32, [&](auto tag) {
    using E = typename decltype(tag)::Type;
    const int threads = Multiplier<E>::kThreads;
    const size_t operands =
        by_output ? product_bytes<E, true, false>(capability) : product_bytes<E, true, true>(capability);
    const size_t shared = operands + sizeof(ConvShared) + sizeof(int) * Schedule::ints(p.programs, threads);
    launch(by_output ? conv_kernel<E, false> : conv_kernel<E, true>, dim3(static_cast<unsigned>(p.programs)),
           threads, shared, stream, p);
  });
}
#endif

}  // namespace dsts::cuda
