// Features gathered by channel lists into panels: device code that gather_panel.cu and route.cu share.
//
// Features whose channels lie side by side come as whole positions, 16 bytes a lane, into shared memory; the
// lists are taken there, and panels leave 16 bytes a lane (`WholeGather`). Positions do not depend on the
// lists, so the first are on their way before these are known, and the next ones while panels are written.
//
// Features whose positions lie side by side come as lines of a channel's positions, 16 bytes a lane. Squares
// of 8 by 8 elements (4 by 4 of float32) are turned round in registers and meet in shared memory, from where
// panels leave in lines too (`gather_turned`).
//
// Else a CTA takes 64 positions of a sample and some K blocks of either list: it reads along whichever side
// of the features lies at stride 1, element by element, and writes whole rows of the panel
// (`gather_elements`).
#pragma once

#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/lines.h"

namespace dsts::cuda {

constexpr int kGatherThreads = 256;

// Both lists of one sample.
struct SampleLists {
  const int* order;  // [C]
  int spatial_blocks, temporal_blocks, spatial_channels, temporal_start;
  bool has_neuron;  // else the sample becomes NaN
};

// A K block of some positions in shared memory, where elements are gathered.
template <class T>
struct PanelTile {
  static constexpr int kBlock = kKBlockBytes / sizeof(T);           // channels of a K block
  static constexpr int kPitch = kBlock + kVectorBytes / sizeof(T);  // of a row
  static constexpr int kBytes = kGatherPositions * kPitch * sizeof(T);
};

// One K block: columns `first` and on of the order, `listed` of them, scaled by the gate or its complement.
template <class T>
__device__ void gather_block(const GatherParams& p, const SampleLists& lists, const float* gate,
                             bool complement, int b, int p0, int first, int listed, int column, T* tile) {
  using Q = PanelTile<T>;
  const T* x = static_cast<const T*>(p.x) + b * p.x_strides.b;
  const bool along_channels = p.x_strides.c == 1;
  __syncthreads();            // before the tile is written again
  constexpr int kAtOnce = 8;  // elements of a thread on their way together
  static_assert(kGatherPositions * Q::kBlock % (kGatherThreads * kAtOnce) == 0,
                "a K block of kGatherPositions is a whole number of steps of a CTA");
  for (int first_i = threadIdx.x; first_i < kGatherPositions * Q::kBlock;
       first_i += kGatherThreads * kAtOnce) {
    T value[kAtOnce];
    float scale[kAtOnce];
    int cell[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = first_i + j * kGatherThreads;
      const int k = along_channels ? i % Q::kBlock : i / kGatherPositions,
                r = along_channels ? i / Q::kBlock : i % kGatherPositions;
      const int position = p0 + r;
      cell[j] = r * Q::kPitch + k;
      value[j] = from_float<T>(lists.has_neuron ? 0.0f : not_a_number());
      scale[j] = 1;
      if (!lists.has_neuron || k >= listed || position >= p.extent.positions) continue;
      const int c = lists.order[first + k];
      value[j] = x[c * p.x_strides.c + offset_of(p.x_strides, place_of(p.extent, position))];
      if (gate) scale[j] = complement ? 1 - gate[c] : gate[c];
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      tile[cell[j]] = gate ? from_float<T>(to_float(value[j]) * scale[j]) : value[j];
  }
  __syncthreads();
  constexpr int kRowVectors = kKBlockBytes / kVectorBytes;
  T* panel = static_cast<T*>(p.panel) + (static_cast<int64>(b) * p.extent.positions + p0) * p.pitch + column;
  for (int i = threadIdx.x; i < kGatherPositions * kRowVectors; i += kGatherThreads) {
    const int r = i / kRowVectors, k = i % kRowVectors * (kVectorBytes / static_cast<int>(sizeof(T)));
    if (p0 + r < p.extent.positions)
      *reinterpret_cast<uint4*>(panel + static_cast<int64>(r) * p.pitch + k) =
          *reinterpret_cast<const uint4*>(tile + r * Q::kPitch + k);
  }
}

template <class T>
__device__ void gather_elements(const GatherParams& p, const SampleLists& lists, const float* gate, int b,
                                int p0, T* tile) {
  constexpr int kBlock = PanelTile<T>::kBlock;
  // The same block of either list in turn: both are sorted, so they read the same lines.
  for (int block = blockIdx.y; block < max(lists.spatial_blocks, lists.temporal_blocks); block += p.splits) {
    const int at = block * kBlock;
    if (block < lists.spatial_blocks)
      gather_block<T>(p, lists, gate, false, b, p0, at, lists.spatial_channels - at, at, tile);
    if (block < lists.temporal_blocks)
      gather_block<T>(p, lists, gate, true, b, p0, lists.temporal_start + at,
                      p.channels - lists.temporal_start - at, (lists.spatial_blocks + block) * kBlock, tile);
  }
}

// Vectors of whole positions that a thread has on their way.
constexpr int kVectorsAsked = kGatherBytes / kVectorBytes / kGatherThreads;
static_assert(kVectorsAsked * kVectorBytes * kGatherThreads == kGatherBytes,
              "kGatherBytes is a whole number of vectors for each thread");

// Whole positions, and where a CTA keeps what it needs of them.
template <class T>
struct WholeGather {
  static constexpr int kVector = Side<T>::kVector;

  T* tile;                 // [whole_positions, channels and a vector behind them]
  unsigned short* places;  // [pitch] the channel of every column of the panel
  float* scales;           // [pitch] and its gate, in training
  int pitch, vectors;

  __host__ __device__ static int tile_bytes(const GatherParams& p) {
    return p.whole_positions * (p.channels * static_cast<int>(sizeof(T)) + kVectorBytes);
  }
  __host__ __device__ static int bytes(const GatherParams& p, bool gated) {
    return tile_bytes(p) +
           p.pitch * static_cast<int>(sizeof(unsigned short) + (gated ? sizeof(float) : size_t{0}));
  }

  __device__ __forceinline__ WholeGather(const GatherParams& p, unsigned char* smem) {
    tile = reinterpret_cast<T*>(smem);
    places = reinterpret_cast<unsigned short*>(smem + tile_bytes(p));
    scales = reinterpret_cast<float*>(places + p.pitch);
    pitch = p.channels + kVector, vectors = p.channels / kVector;
  }

  // This thread's vectors of the positions from `p0` on, which lie `x_strides.w` apart.
  __device__ __forceinline__ void load(const GatherParams& p, int b, int p0,
                                       Vector<T> (&asked)[kVectorsAsked]) const {
    const T* x = static_cast<const T*>(p.x) + b * p.x_strides.b;
#pragma unroll
    for (int k = 0; k < kVectorsAsked; ++k) {
      const int i = threadIdx.x + k * kGatherThreads, row = quotient(p.vectors_divmod, i);
      asked[k] = zeros<T>();
      if (row < p.whole_positions && p0 + row < p.extent.positions)
        asked[k] = *reinterpret_cast<const Vector<T>*>(x + (p0 + row) * p.x_strides.w +
                                                       (i - row * vectors) * kVector);
    }
  }

  __device__ __forceinline__ void store(const GatherParams& p,
                                        const Vector<T> (&asked)[kVectorsAsked]) const {
#pragma unroll
    for (int k = 0; k < kVectorsAsked; ++k) {
      const int i = threadIdx.x + k * kGatherThreads, row = quotient(p.vectors_divmod, i);
      if (row < p.whole_positions)
        *reinterpret_cast<Vector<T>*>(tile + row * pitch + (i - row * vectors) * kVector) = asked[k];
    }
  }

  // Columns beyond a list read what stands behind a position's channels: zero, or NaN for a sample without a
  // neuron.
  __device__ __forceinline__ void place(const GatherParams& p, const SampleLists& lists,
                                        const float* gate) const {
    const int first = lists.spatial_blocks * PanelTile<T>::kBlock;
    const int width = first + lists.temporal_blocks * PanelTile<T>::kBlock;
    for (int column = threadIdx.x; column < width; column += kGatherThreads) {
      const bool complement = column >= first;
      const int k = complement ? column - first + lists.temporal_start : column;
      const bool listed = lists.has_neuron && k < (complement ? p.channels : lists.spatial_channels);
      const int c = listed ? lists.order[k] : p.channels;
      places[column] = static_cast<unsigned short>(c);
      if (gate) scales[column] = !listed ? 1 : complement ? 1 - gate[c] : gate[c];
    }
    for (int i = threadIdx.x; i < p.whole_positions * kVector; i += kGatherThreads)
      tile[i / kVector * pitch + p.channels + i % kVector] =
          from_float<T>(lists.has_neuron ? 0.0f : not_a_number());
  }

  // Panels of the positions in the tile, `width` vectors each.
  template <bool kGated>
  __device__ __forceinline__ void write(const GatherParams& p, int b, int p0, int width) const {
    T* panel = static_cast<T*>(p.panel) + (static_cast<int64>(b) * p.extent.positions + p0) * p.pitch;
    const int rows = min(p.whole_positions, p.extent.positions - p0);
    const int step = kGatherThreads / width, rest = kGatherThreads - step * width;
    int row = static_cast<int>(threadIdx.x) / width, v = static_cast<int>(threadIdx.x) - row * width;
    while (row < rows) {
      const Pack<unsigned short, kVector> c =
          *reinterpret_cast<const Pack<unsigned short, kVector>*>(places + v * kVector);
      Vector<T> gathered;
#pragma unroll
      for (int e = 0; e < kVector; ++e) gathered.v[e] = tile[row * pitch + c.v[e]];
      if (kGated) {
#pragma unroll
        for (int e = 0; e < kVector; e += 4) {
          const Pack<float, 4> scale = *reinterpret_cast<const Pack<float, 4>*>(scales + v * kVector + e);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            gathered.v[e + i] = from_float<T>(to_float(gathered.v[e + i]) * scale.v[i]);
        }
      }
      *reinterpret_cast<Vector<T>*>(panel + static_cast<int64>(row) * p.pitch + v * kVector) = gathered;
      row += step, v += rest;
      if (v >= width) v -= width, ++row;
    }
  }

  // All positions of this CTA, of which `asked` has the first.
  template <bool kGated>
  __device__ __forceinline__ void gather(const GatherParams& p, const SampleLists& lists, const float* gate,
                                         int b, Vector<T> (&asked)[kVectorsAsked]) const {
    const int width = (lists.spatial_blocks + lists.temporal_blocks) * (PanelTile<T>::kBlock / kVector);
    if (width == 0) return;
    place(p, lists, gate);
    for (int p0 = blockIdx.y * p.whole_positions; p0 < p.extent.positions;
         p0 += p.splits * p.whole_positions) {
      store(p, asked);
      __syncthreads();
      load(p, b, p0 + p.splits * p.whole_positions, asked);
      write<kGated>(p, b, p0, width);
      __syncthreads();  // before the tile is written again
    }
  }
};

// Channels of a K block, by as many positions, are a tile of 64 threads, a square each.
template <class T>
struct TurnedGather {
  static constexpr int kVector = Side<T>::kVector, kLine = Side<T>::kLine;
  static constexpr int kSquares = kAcross * kAcross, kTiles = kGatherThreads / kSquares;
  static constexpr int kAlong = kGatherPositions / kLine;  // tiles of a CTA's positions
  static constexpr int kBytes = kTiles * Side<T>::kTileBytes;
  static_assert(kLine == PanelTile<T>::kBlock, "a line of channels is a K block");
  static_assert(kGatherPositions % kLine == 0, "a CTA's positions are whole tiles");

  int number, i, j;  // of the CTA's tiles; of eight squares of channels and of positions
  Vector<T>* tile;   // [kLine positions, kAcross vectors of channels], swizzled

  __device__ __forceinline__ explicit TurnedGather(unsigned char* smem) {
    number = static_cast<int>(threadIdx.x) / kSquares;
    i = threadIdx.x % kSquares / kAcross, j = threadIdx.x % kAcross;
    tile = reinterpret_cast<Vector<T>*>(smem) + number * kLine * kAcross;
  }

  // K block `block` of the panel, from position `first` on: this thread's square, turned.
  __device__ __forceinline__ void take(const GatherParams& p, const SampleLists& lists, const float* gate,
                                       int b, int block, int first) const {
    const bool complement = block >= lists.spatial_blocks;
    const int start =
        (complement ? (block - lists.spatial_blocks) * kLine + lists.temporal_start : block * kLine) +
        i * kVector;
    const int end = lists.has_neuron ? (complement ? p.channels : lists.spatial_channels) : 0;
    const T* x = static_cast<const T*>(p.x) + b * p.x_strides.b + (first + j * kVector) * p.x_strides.w;
    const bool inside = first + j * kVector < p.extent.positions;
    int channel[kVector];
    Vector<T> rows[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) channel[k] = start + k < end ? lists.order[start + k] : -1;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
#pragma unroll
      for (int e = 0; e < kVector; ++e)
        rows[k].v[e] = from_float<T>(lists.has_neuron ? 0.0f : not_a_number());
      if (inside && channel[k] >= 0)
        rows[k] = *reinterpret_cast<const Vector<T>*>(x + channel[k] * p.x_strides.c);
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      if (!gate || channel[k] < 0) continue;
      const float scale = complement ? 1 - gate[channel[k]] : gate[channel[k]];
#pragma unroll
      for (int e = 0; e < kVector; ++e) rows[k].v[e] = from_float<T>(to_float(rows[k].v[e]) * scale);
    }
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      Vector<T> column;
#pragma unroll
      for (int k = 0; k < kVector; ++k) column.v[k] = rows[k].v[e];
      const int row = element_of<T>(j, e);
      tile[row * kAcross + place_in_row<T>(row, i)] = column;
    }
  }

  __device__ __forceinline__ void write(const GatherParams& p, int b, int block, int first) const {
    T* panel = static_cast<T*>(p.panel) + static_cast<int64>(b) * p.extent.positions * p.pitch;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const int row = i + kAcross * k, position = first + row;
      if (position < p.extent.positions)
        *reinterpret_cast<Vector<T>*>(panel + static_cast<int64>(position) * p.pitch + block * kLine +
                                      j * kVector) = tile[row * kAcross + place_in_row<T>(row, j)];
    }
  }

  // A CTA's positions, from `p0` on.
  __device__ __forceinline__ void gather(const GatherParams& p, const SampleLists& lists, const float* gate,
                                         int b, int p0) const {
    const int count = (lists.spatial_blocks + lists.temporal_blocks) * kAlong;
    for (int at = blockIdx.y * kTiles; at < count; at += p.splits * kTiles) {
      const int block = (at + number) / kAlong, first = p0 + (at + number) % kAlong * kLine;
      const bool mine = at + number < count;
      if (mine) take(p, lists, gate, b, block, first);
      __syncthreads();
      if (mine) write(p, b, block, first);
      __syncthreads();  // before the tile is written again
    }
  }
};

#ifndef __CUDACC_RTC__
inline dim3 gather_grid(const GatherParams& p) {
  const int along = p.whole_positions ? p.batch : p.batch * ceil_div(p.extent.positions, kGatherPositions);
  return dim3(static_cast<unsigned>(along), static_cast<unsigned>(p.splits));
}

template <class T>
size_t gather_smem(const GatherParams& p, bool gated) {
  return p.whole_positions ? WholeGather<T>::bytes(p, gated)
         : p.turned        ? TurnedGather<T>::kBytes
                           : PanelTile<T>::kBytes;
}
#endif

}  // namespace dsts::cuda
