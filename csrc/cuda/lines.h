// Vectors of 16 bytes, eight lanes side by side to a line of 128: how kernels that only move elements touch
// memory, and how a square tile is turned round so that both its rows and its columns are lines.
#pragma once

#include "cuda/device.h"

namespace dsts::cuda {

constexpr int kAcross = kLineBytes / kVectorBytes;  // lanes, and vectors, of a line
static_assert(kAcross == 8, "eight lanes take a line");

template <class T>
struct Side {
  static constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(T));
  static constexpr int kLine = kAcross * kVector;  // elements of a line, and rows of a tile
  static constexpr int kTileBytes = kLine * kLineBytes;
};

template <class T>
using Vector = Pack<T, Side<T>::kVector>;

// Where element `e` of what lane `lane` takes of a line's worth lies. Of a wider type it comes in several
// loads, each of them of whole lines.
template <class From>
__host__ __device__ constexpr int element_of(int lane, int e) {
  constexpr int vector = Side<From>::kVector;
  return e / vector * (kAcross * vector) + lane * vector + e % vector;
}

// Which vector of row `row` of a turned tile holds the squares' `square`. Eight lanes write eight rows and
// read one, and meet in no bank.
template <class From>
__host__ __device__ constexpr int place_in_row(int row, int square) {
  return square ^ row / Side<From>::kVector % kAcross;
}

template <class To, class From>
__device__ __forceinline__ To converted(From v) {
  return from_float<To>(to_float(v));
}
template <>
__device__ __forceinline__ __half converted(__half v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 converted(__nv_bfloat16 v) {
  return v;
}

template <class T>
__device__ __forceinline__ Vector<T> zeros() {
  Vector<T> zero;
#pragma unroll
  for (int e = 0; e < Side<T>::kVector; ++e) zero.v[e] = from_float<T>(0.0f);
  return zero;
}

// What a lane takes of a line's worth of parameters, as it comes: converted only once all is on its way.
template <class From, class To>
struct Taken {
  static constexpr int kPart = Side<From>::kVector, kParts = Side<To>::kVector / kPart;
  Vector<From> parts[kParts];

  // From element `f` of the row on; zeros beyond `size`.
  template <bool kWhole>
  __device__ __forceinline__ void read(const From* row, int f, int size, int lane) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int at = f + element_of<From>(lane, i * kPart);
      parts[i] = zeros<From>();
      if (kWhole && at < size) parts[i] = *reinterpret_cast<const Vector<From>*>(row + at);
#pragma unroll
      for (int e = 0; e < kPart; ++e)
        if (!kWhole && at + e < size) parts[i].v[e] = row[at + e];
    }
  }

  __device__ __forceinline__ To element(int e) const { return converted<To>(parts[e / kPart].v[e % kPart]); }
};

template <class T>
__device__ __forceinline__ void write(T* row, int f, int size, const Vector<T>& v, bool whole) {
  if (whole) {
    if (f < size) *reinterpret_cast<Vector<T>*>(row + f) = v;
    return;
  }
#pragma unroll
  for (int e = 0; e < Side<T>::kVector; ++e)
    if (f + e < size) row[f + e] = v.v[e];
}

}  // namespace dsts::cuda
