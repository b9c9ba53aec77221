// Winograd's filter stage: filters as they lie in the caller's memory, transformed into U a slice of channels
// at a time.
#pragma once

#include "cpu/tile.h"
#include "cpu/winograd_blocking.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

constexpr int64_t kLoadChannels = 16;  // loaded at a time
constexpr int64_t kAhead = 1;          // how many such loads packed filters are asked for ahead

// w[tap][lane] = rows[lane][offset + tap], or in reverse order of taps: a transposition of which only kTaps
// rows are wanted, a number known at compile time so that the rest of it is never done.
template <class T, int kTaps, int kFirst = 0>
DSTS_INLINE void load_taps(const T* const* rows, int64_t lanes, int64_t offset, bool reversed, const T* end,
                           float* w) {
  constexpr int kCount = kTaps - kFirst < kWide ? kTaps - kFirst : kWide;
  for (int64_t o = 0; o < lanes; o += kWide) {
    Vector block[kWide];
    for (int i = 0; i < kWide; ++i)
      block[i] =
          o + i < lanes ? load_lanes<float, false>(rows[o + i] + offset + kFirst, kCount, end) : Vector{};
    transpose_block<float>(block);
#pragma GCC unroll 16
    for (int j = 0; j < kCount; ++j) {
      const int tap = kFirst + j;
      memcpy(w + (reversed ? kTaps - 1 - tap : tap) * kBlock + o, &block[j], sizeof block[j]);
    }
  }
  if constexpr (kFirst + kCount < kTaps)
    load_taps<T, kTaps, kFirst + kCount>(rows, lanes, offset, reversed, end, w);
}

// w[channel][tap][kBlock] of up to kLoadChannels channels from k0 on, for one block of outputs from o0 on.
template <class T, int kTaps>
void load_filters(const Operator& op, const T* end, int64_t o0, int64_t outputs, int64_t k0, int64_t n,
                  float* w) {
  const T* rows[kBlock];
  for (int64_t o = 0; o < outputs; ++o)
    rows[o] = static_cast<const T*>(op.weight) + (op.o_list ? op.o_list[o0 + o] : o0 + o) * op.stride_o;
  const auto column = [&](int64_t k) { return (op.k_list ? op.k_list[k0 + k] : k0 + k) * op.stride_k; };
  if (op.stride_tap == 1 || op.stride_tap == -1) {
    for (int64_t k = 0; k < n; ++k)
      load_taps<T, kTaps>(rows, outputs, column(k) - (op.stride_tap < 0 ? kTaps - 1 : 0), op.stride_tap < 0,
                          end, w + k * kTaps * kBlock);
  } else {
    for (int64_t k = 0; k < n; ++k)
      for (int64_t tap = 0; tap < kTaps; ++tap)
        for (int64_t o = 0; o < outputs; ++o)
          w[(k * kTaps + tap) * kBlock + o] = load(rows[o][column(k) + tap * op.stride_tap]);
  }
}

// Filters (3, 3) to points (nh, nw), or 3 to nt where kH is 0; n of them, kBlock floats a tap.
template <int kH, int kW>
void transform_filters(const float* w, int64_t n, float* U, int64_t u_point) {
  constexpr int nw = ::dsts::Winograd<kW>::kInputs;
  for (int64_t k = 0; k < n; ++k)
    for (int64_t c = 0; c < kBlock; c += kWide) {
      float* at = U + k * kBlock + c;
      if constexpr (kH == 0) {
        Vector v[3];
        for (int j = 0; j < 3; ++j) v[j] = vector_at(w + (3 * k + j) * kBlock + c);
        apply<kW, Matrix::filter>(v, [&](int i, Vector sum) { memcpy(at + i * u_point, &sum, sizeof sum); });
      } else {
        Vector half[::dsts::Winograd<kH>::kInputs][3];
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) {
          Vector v[3];
#pragma GCC unroll 3
          for (int i = 0; i < 3; ++i) v[i] = vector_at(w + (9 * k + 3 * i + j) * kBlock + c);
          apply<kH, Matrix::filter>(v, [&](int i, Vector sum) { half[i][j] = sum; });
        }
#pragma GCC unroll 6
        for (int i = 0; i < ::dsts::Winograd<kH>::kInputs; ++i)
          apply<kW, Matrix::filter>(
              half[i], [&](int j, Vector sum) { memcpy(at + (i * nw + j) * u_point, &sum, sizeof sum); });
      }
    }
}

template <int kTaps>
void transform_filters(const Geometry& g, const float* w, int64_t n, float* U, int64_t u_point) {
  if constexpr (kTaps == 3)
    with_tile(TemporalTiles{}, g.tile_t,
              [&](auto frames) { transform_filters<0, decltype(frames)::value>(w, n, U, u_point); });
  else
    with_tile(SpatialTiles{}, g.tile_h, [&](auto height) {
      with_tile(SpatialTiles{}, g.tile_w, [&](auto width) {
        transform_filters<decltype(height)::value, decltype(width)::value>(w, n, U, u_point);
      });
    });
}

// The end of the weights' memory as far as it is known to be readable.
template <class T>
const T* end_of(const Operator& op, int64_t outputs, int taps) {
  int64_t row = outputs - 1, column = op.k_channels - 1;
  if (op.o_list)
    for (int64_t o = row = 0; o < outputs; ++o) row = max64(row, op.o_list[o]);
  if (op.k_list)
    for (int64_t k = column = 0; k < op.k_channels; ++k) column = max64(column, op.k_list[k]);
  const int64_t last_tap = max64(0, (taps - 1) * op.stride_tap);
  return static_cast<const T*>(op.weight) + row * op.stride_o + column * op.stride_k + last_tap + 1;
}

// One slice's channels for the outputs [o0, o0 + outputs).
template <class T, int kTaps>
void filter_slice(const Geometry& g, const Blocking& m, const T* end, int64_t slice, int64_t o0,
                  int64_t outputs, float* U) {
  const int64_t channels = m.channels(slice);
  alignas(64) float w[kLoadChannels * kTaps * kBlock] = {};
  for (int64_t block = 0; block * kBlock < outputs; ++block) {
    const int64_t lanes = min64(kBlock, outputs - block * kBlock);
    if (lanes < kBlock) memset(w, 0, sizeof w);
    for (int64_t k = 0; k < channels; k += kLoadChannels) {
      const int64_t n = min64(kLoadChannels, channels - k);
      const float* filters = w;
      const int64_t first = (o0 / kBlock + block) * m.K + slice * m.width + k;
      if (m.op.blocked && same<T, float>) {
        filters = static_cast<const float*>(m.op.weight) + first * kTaps * kBlock;
        prefetch_row(filters + kAhead * kLoadChannels * kTaps * kBlock, n * kTaps * kBlock);
      } else if (m.op.blocked) {
        const T* from = static_cast<const T*>(m.op.weight) + first * kTaps * kBlock;
        for (int64_t i = 0; i < n * kTaps * kBlock; ++i) w[i] = load(from[i]);
      } else {
        load_filters<T, kTaps>(m.op, end, o0 + block * kBlock, lanes, slice * m.width + k, n, w);
      }
      float* to = U + (block * channels + k) * kBlock;
      transform_filters<kTaps>(g, filters, n, to, m.u_point);
    }
  }
}

}  // namespace
}  // namespace dsts::cpu::DSTS_ISA
