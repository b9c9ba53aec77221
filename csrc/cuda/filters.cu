// Filters between the layout that parameters have, (N, O, C, taps), and those that kernels read, by slot and
// tap: of the neurons that the batch chose. On the way back, gradients of all others, and of channels that no
// list holds, are written as zeros in the same pass.
//
// Either way every access to memory is 16 bytes a lane, and eight lanes side by side take a line of 128
// bytes. By channel the layout is a transposition: a thread takes a square of vectors, turns it round in
// registers, and squares meet in shared memory to be written as lines. By output the taps of a channel are
// taken apart, in shared memory alone. Where parameters have rows of no whole 16 bytes, their side goes
// element by element.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/lines.h"

namespace dsts::cuda {

constexpr int kFilterThreads = 256;
constexpr int kSquares = kAcross * kAcross;              // threads of a tile, a square each
constexpr int kFilterTiles = kFilterThreads / kSquares;  // of a CTA, along parameters' rows
constexpr int kGroups = kFilterThreads / kAcross;        // of lanes that take a line
constexpr int kAtOnce = 4;                               // lines of a group on their way together
constexpr int kLines = kGroups * kAtOnce;                // of a CTA by output, where taps allow

// CTAs that a multiprocessor is to hold of those that pack; converted elements take twice the registers.
template <class From, class To>
constexpr int resident_of = sizeof(From) == sizeof(To) ? 3 : 2;

// Rows of parameters that a CTA takes where filters lie by output.
__host__ __device__ constexpr int rows_by_output(int taps) { return taps < kLines ? kLines / taps : 1; }

// Where, in rows as parameters have them, element `e` of what lane `lane` has of a line of tap `tap` lies.
template <class T>
__host__ __device__ constexpr int cell_by_output(int taps, int row, int tap, int lane, int e) {
  return row * taps * Side<T>::kLine + (lane * Side<T>::kVector + e) * taps + tap;
}

// Row of a filter by tap. All that depends on the slot is alike for a CTA; the rest takes one wide product.
__device__ __forceinline__ int64 row_by_tap(const FilterParams& p, int slot, int tap, int row) {
  const int rows = p.by_channel ? p.channels : p.outputs;
  return static_cast<int64>(slot) * p.all_taps * rows * p.pitch +
         static_cast<int64>((p.first_tap + tap) * rows + row) * p.pitch;
}

// The same of element `f` of channels and taps, where filters lie by channel.
__device__ __forceinline__ int64 row_by_element(const FilterParams& p, int slot, int f) {
  const int c = quotient(p.taps_divmod, f);
  return row_by_tap(p, slot, f - c * p.taps, c);
}

__device__ __forceinline__ bool in_list(const FilterParams& p, int slot, int c) {
  return !p.listed || (p.listed[static_cast<int64>(slot) * p.channels + c] & p.reader);
}

// By channel: a thread's place in its tile, and where tile and CTA begin.
template <class T>
struct Square {
  int i, j;         // of eight squares of rows and of columns
  Vector<T>* tile;  // kAcross vectors a row
  int o0, f0;       // outputs; elements of channels and taps

  __device__ __forceinline__ Square(const FilterParams& p, unsigned char* smem) {
    const int along = ceil_div(p.channels * p.taps, kFilterTiles * Side<T>::kLine);
    const int across = static_cast<int>(blockIdx.x) / along;
    const int number = static_cast<int>(threadIdx.x) / kSquares;  // of the CTA's tiles
    i = threadIdx.x % kSquares / kAcross, j = threadIdx.x % kAcross;
    tile = reinterpret_cast<Vector<T>*>(smem + number * Side<T>::kTileBytes);
    o0 = across * Side<T>::kLine;
    f0 = ((static_cast<int>(blockIdx.x) - across * along) * kFilterTiles + number) * Side<T>::kLine;
  }

  // The square's columns become vectors of the tile's rows.
  template <class From>
  __device__ __forceinline__ void turn(const Taken<From, T> (&rows)[Side<T>::kVector]) const {
#pragma unroll
    for (int e = 0; e < Side<T>::kVector; ++e) {
      Vector<T> column;
#pragma unroll
      for (int k = 0; k < Side<T>::kVector; ++k) column.v[k] = rows[k].element(e);
      const int row = element_of<From>(j, e);
      tile[row * kAcross + place_in_row<From>(row, i)] = column;
    }
  }

  template <class From>
  __device__ __forceinline__ Vector<T> turned(int row) const {
    return tile[row * kAcross + place_in_row<From>(row, j)];
  }
};

// By output: rows of parameters that a CTA takes, from which output and channel on, and its lanes of a
// line.
template <class T>
struct Lines {
  int rows, o0, c0, group, lane;
  T* line;  // rows as parameters have them, of kLine channels by taps

  __device__ __forceinline__ Lines(const FilterParams& p, unsigned char* smem) {
    const int across = ceil_div(p.pitch, Side<T>::kLine), along = static_cast<int>(blockIdx.x) / across;
    rows = rows_by_output(p.taps);
    o0 = along * rows, c0 = (static_cast<int>(blockIdx.x) - along * across) * Side<T>::kLine;
    group = threadIdx.x / kAcross, lane = threadIdx.x % kAcross;
    line = reinterpret_cast<T*>(smem);
  }

  // Element `e` of what this lane has of a line of tap `tap`.
  __device__ __forceinline__ T& cell(const FilterParams& p, int row, int tap, int e) const {
    return line[cell_by_output<T>(p.taps, row, tap, lane, e)];
  }
};

template <bool kWhole, class From, class To>
__device__ __forceinline__ void take_squares(const FilterParams& p, const Square<To>& square,
                                             const From* from) {
  constexpr int kVector = Side<To>::kVector;
  const int size = p.channels * p.taps;
  Taken<From, To> taken[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    const int o = square.o0 + square.i * kVector + k;
    taken[k].template read<kWhole>(from + static_cast<int64>(o) * size, square.f0, o < p.outputs ? size : 0,
                                   square.j);
  }
  square.turn(taken);
}

template <class From, class To>
__device__ void lay_rows(const FilterParams& p, const Square<To>& square, int slot) {
  const int o = square.o0 + square.j * Side<To>::kVector;
#pragma unroll
  for (int k = 0; k < Side<To>::kVector; ++k) {
    const int row = square.i + kAcross * k, f = square.f0 + row;
    if (f < p.channels * p.taps && o < p.pitch)
      *reinterpret_cast<Vector<To>*>(static_cast<To*>(p.to) + row_by_element(p, slot, f) + o) =
          square.template turned<From>(row);
  }
}

template <bool kWhole, class From, class To>
__device__ __forceinline__ void take_lines(const FilterParams& p, const Lines<To>& lines, const From* from) {
  constexpr int kVector = Side<To>::kVector, kPart = Side<From>::kVector;
  const int size = p.channels * p.taps, count = lines.rows * p.taps;
  for (int first = lines.group; first < count; first += kLines) {
    Taken<From, To> taken[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int q = first + k * kGroups, row = quotient(p.taps_divmod, q), o = lines.o0 + row;
      const int f = lines.c0 * p.taps + (q - row * p.taps) * Side<To>::kLine;
      taken[k].template read<kWhole>(from + static_cast<int64>(o) * size, f,
                                     q < count && o < p.outputs ? size : 0, lines.lane);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
#pragma unroll
      for (int e = 0; e < kVector; e += kPart) {
        Pack<To, kPart> part;
#pragma unroll
        for (int i = 0; i < kPart; ++i) part.v[i] = taken[k].element(e + i);
        if (first + k * kGroups < count)
          *reinterpret_cast<Pack<To, kPart>*>(lines.line + (first + k * kGroups) * Side<To>::kLine +
                                              element_of<From>(lines.lane, e)) = part;
      }
  }
}

template <class To>
__device__ void lay_lines(const FilterParams& p, const Lines<To>& lines, int slot) {
  const int c = lines.c0 + lines.lane * Side<To>::kVector;
  for (int q = lines.group; q < lines.rows * p.taps; q += kGroups) {
    const int row = quotient(p.taps_divmod, q), tap = q - row * p.taps, o = lines.o0 + row;
    if (o >= p.outputs || c >= p.pitch) continue;
    Vector<To> line;
#pragma unroll
    for (int e = 0; e < Side<To>::kVector; ++e) line.v[e] = lines.cell(p, row, tap, e);
    *reinterpret_cast<Vector<To>*>(static_cast<To*>(p.to) + row_by_tap(p, slot, tap, o) + c) = line;
  }
}

template <class From, class To>
__global__ void __launch_bounds__(kFilterThreads, resident_of<From, To>)
    pack_filters_kernel(const __grid_constant__ FilterParams p) {
  DSTS_DYNAMIC_SMEM(smem);
  const int slot = blockIdx.y, n = p.index[slot];
  if (n < 0) return;
  const From* from =
      static_cast<const From*>(p.from) + static_cast<int64>(n) * p.outputs * p.channels * p.taps;
  if (p.by_channel && p.vector)
    take_squares<true>(p, Square<To>(p, smem), from);
  else if (p.by_channel)
    take_squares<false>(p, Square<To>(p, smem), from);
  else if (p.vector)
    take_lines<true>(p, Lines<To>(p, smem), from);
  else
    take_lines<false>(p, Lines<To>(p, smem), from);
  __syncthreads();
  if (p.by_channel)
    lay_rows<From, To>(p, Square<To>(p, smem), slot);
  else
    lay_lines<To>(p, Lines<To>(p, smem), slot);
}

// The way back of take_squares: rows are elements of channels and taps.
template <bool kWhole, class T>
__device__ __forceinline__ void take_rows(const FilterParams& p, const Square<T>& square, int slot) {
  constexpr int kVector = Side<T>::kVector;
  const int f0 = square.f0 + square.i * kVector;
  bool wanted[kVector];  // asked for before any row is
#pragma unroll
  for (int k = 0; k < kVector; ++k)
    wanted[k] =
        slot >= 0 && f0 + k < p.channels * p.taps && in_list(p, slot, quotient(p.taps_divmod, f0 + k));
  Taken<T, T> taken[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k)
    taken[k].template read<kWhole>(static_cast<const T*>(p.from) + row_by_element(p, max(slot, 0), f0 + k),
                                   square.o0, wanted[k] ? p.pitch : 0, square.j);
  square.turn(taken);
}

template <class T>
__device__ void lay_squares(const FilterParams& p, const Square<T>& square, T* to) {
  const int size = p.channels * p.taps;
#pragma unroll
  for (int k = 0; k < Side<T>::kVector; ++k) {
    const int row = square.i + kAcross * k, o = square.o0 + row;
    if (o < p.outputs)
      write(to + static_cast<int64>(o) * size, square.f0 + square.j * Side<T>::kVector, size,
            square.template turned<T>(row), p.vector);
  }
}

// The way back of take_lines: each channel's taps are put together.
template <bool kWhole, class T>
__device__ __forceinline__ void take_taps(const FilterParams& p, const Lines<T>& lines, int slot) {
  constexpr int kVector = Side<T>::kVector;
  const int c = lines.c0 + lines.lane * kVector, count = lines.rows * p.taps;
  for (int first = lines.group; first < count; first += kLines) {
    Taken<T, T> taken[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int q = first + k * kGroups, row = quotient(p.taps_divmod, q), o = lines.o0 + row;
      taken[k].template read<kWhole>(
          static_cast<const T*>(p.from) + row_by_tap(p, max(slot, 0), q - row * p.taps, o), lines.c0,
          slot >= 0 && q < count && o < p.outputs ? p.pitch : 0, lines.lane);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int q = first + k * kGroups, row = quotient(p.taps_divmod, q), tap = q - row * p.taps;
      if (q < count)
#pragma unroll
        for (int e = 0; e < kVector; ++e)
          lines.cell(p, row, tap, e) = slot >= 0 && c + e < p.channels && in_list(p, slot, c + e)
                                           ? taken[k].element(e)
                                           : from_float<T>(0.0f);
    }
  }
}

template <class T>
__device__ void lay_taps(const FilterParams& p, const Lines<T>& lines, T* to) {
  const int size = p.channels * p.taps;
  for (int q = lines.group; q < lines.rows * p.taps; q += kGroups) {
    const int row = quotient(p.taps_divmod, q), o = lines.o0 + row;
    const int at = (q - row * p.taps) * Side<T>::kLine + lines.lane * Side<T>::kVector;
    if (o < p.outputs)
      write(to + static_cast<int64>(o) * size, lines.c0 * p.taps + at, size,
            *reinterpret_cast<const Vector<T>*>(lines.line + row * p.taps * Side<T>::kLine + at), p.vector);
  }
}

template <class T>
__global__ void __launch_bounds__(kFilterThreads, 2)
    unpack_filters_kernel(const __grid_constant__ FilterParams p) {
  DSTS_DYNAMIC_SMEM(smem);
  const int n = blockIdx.y, slot = p.index[n];
  T* to = static_cast<T*>(p.to) + static_cast<int64>(n) * p.outputs * p.channels * p.taps;
  if (p.by_channel && p.vector)
    take_rows<true>(p, Square<T>(p, smem), slot);
  else if (p.by_channel)
    take_rows<false>(p, Square<T>(p, smem), slot);
  else if (p.vector)
    take_taps<true>(p, Lines<T>(p, smem), slot);
  else
    take_taps<false>(p, Lines<T>(p, smem), slot);
  __syncthreads();
  if (p.by_channel)
    lay_squares<T>(p, Square<T>(p, smem), to);
  else
    lay_taps<T>(p, Lines<T>(p, smem), to);
}

#define INSTANTIATE(code, name, T)                                                          \
  template __global__ void pack_filters_kernel<T, T>(const __grid_constant__ FilterParams); \
  template __global__ void unpack_filters_kernel<T>(const __grid_constant__ FilterParams);
DSTS_DTYPES(INSTANTIATE)
#undef INSTANTIATE
#define INSTANTIATE(code, name, T) \
  template __global__ void pack_filters_kernel<float, T>(const __grid_constant__ FilterParams);
DSTS_HALF_DTYPES(INSTANTIATE)
#undef INSTANTIATE

#ifndef __CUDACC_RTC__
namespace {

template <class T>
dim3 filter_grid(const FilterParams& p, int rows) {
  constexpr int line = Side<T>::kLine;
  const int across = ceil_div(p.pitch, line);
  const int along = p.by_channel ? ceil_div(p.channels * p.taps, kFilterTiles * line)
                                 : ceil_div(p.outputs, rows_by_output(p.taps));
  return dim3(static_cast<unsigned>(across * along), static_cast<unsigned>(rows));
}

template <class T>
size_t filter_smem(const FilterParams& p) {
  return p.by_channel ? kFilterTiles * Side<T>::kTileBytes : kLineBytes * rows_by_output(p.taps) * p.taps;
}

// Whether rows of so many elements are whole vectors.
bool whole(const void* address, int64 row, int bytes) {
  return reinterpret_cast<unsigned long long>(address) % kVectorBytes == 0 && row * bytes % kVectorBytes == 0;
}

}  // namespace

void pack_filters(const FilterParams& p, int slots, int from_dtype, int to_dtype, void* stream) {
  FilterParams params = p;
  params.vector = whole(p.from, static_cast<int64>(p.channels) * p.taps, element_bytes(from_dtype));
  for_element(to_dtype, [&](auto element) {
    using T = decltype(element);
    launch(from_dtype == to_dtype ? pack_filters_kernel<T, T> : pack_filters_kernel<float, T>,
           filter_grid<T>(p, slots), kFilterThreads, filter_smem<T>(p), stream, params);
  });
}

// Rows of gradients by tap are as long as their products left them.
void unpack_filters(const FilterParams& p, int neurons, int dtype, void* stream) {
  for_element(dtype, [&](auto element) {
    using T = decltype(element);
    FilterParams params = p;
    params.vector =
        whole(p.to, static_cast<int64>(p.channels) * p.taps, sizeof(T)) && whole(p.from, p.pitch, sizeof(T));
    launch(unpack_filters_kernel<T>, filter_grid<T>(p, neurons), kFilterThreads, filter_smem<T>(p), stream,
           params);
  });
}
#endif

}  // namespace dsts::cuda
