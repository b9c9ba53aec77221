// Operands of an implicit convolution: rows are positions of a panel shifted by the taps of a kernel, columns
// are filters. The reduction goes over K blocks, for each over the taps of the operator that reads it: first
// those of the first operator, then those of the second (3x1x1). Shared by the convolution and its data
// gradient.
#pragma once

#include "cuda/product.h"

namespace dsts::cuda {

constexpr int kTaps = 12;  // most that both operators have

struct Taps {
  int kt, kh, kw, first, second, sign;  // of the first operator; how many each has
};

// Reach of tap `tap` counted over both operators.
__device__ __forceinline__ Place reach_of(const Taps& k, int tap) {
  return tap < k.first ? reach(tap, k.kt, k.kh, k.kw, k.sign) : Place{k.sign * (tap - k.first - 1), 0, 0};
}

// Where tiles of one launch read: what does not change from tile to tile.
template <class T>
struct Implicit {
  const T *panel, *filters;
  const Extent* extent;
  Taps taps;
  int width, pitch;     // columns of the panel that each operator may read, and how far its rows are apart
  int outputs, rows;    // columns of the result; channels of filters by tap
  int filter_pitch;     // how far rows of filters are apart
  int64 matrix;         // elements from tap to tap, or from K block to K block
  bool packed;          // filters are K blocks behind one another, not by tap
  const int64* shifts;  // shared: elements of the panel that each tap reaches

  // Fills the table of shifts; all threads, a barrier must follow.
  __device__ void fill(int64* table) const {
    if (threadIdx.x < kTaps) {
      const Place by = reach_of(taps, threadIdx.x);
      table[threadIdx.x] = ((static_cast<int64>(by.t) * extent->h + by.h) * extent->w + by.w) * pitch;
    }
  }
};

// One sample's reduction; it lies in shared memory, where it takes no registers from the loop.
struct Reduction {
  int blocks_1;          // K blocks of the first operator
  int columns_2;         // where the second one's columns of the panel start
  int base;              // first matrix of the filters, or first K block of packed ones
  int count_1, start_2;  // of a channel list: what the first operator reads, where the second one's starts
  const int* order;      // that list, or null
};

// Taps as bits, `APART` of them from tap to tap, by the edge of the features that they reach over: what a
// position there must not read.
template <int APART>
struct Edges {
  using Bits = unsigned long long;
  Bits all = 0, before_t = 0, after_t = 0, before_h = 0, after_h = 0, before_w = 0, after_w = 0;

  __device__ __forceinline__ explicit Edges(const Taps& taps) {
#pragma unroll 1
    for (int tap = 0; tap < taps.first + taps.second; ++tap) {
      const Place by = reach_of(taps, tap);
      const Bits bit = Bits{1} << (tap * APART);
      all |= bit;
      before_t |= by.t < 0 ? bit : 0, after_t |= by.t > 0 ? bit : 0;
      before_h |= by.h < 0 ? bit : 0, after_h |= by.h > 0 ? bit : 0;
      before_w |= by.w < 0 ? bit : 0, after_w |= by.w > 0 ? bit : 0;
    }
  }

  // The taps that meet features at `at`.
  __device__ __forceinline__ Bits met(const Extent& e, const Place& at) const {
    Bits over = (at.t == 0 ? before_t : 0) | (at.t == e.t - 1 ? after_t : 0);
    over |= (at.h == 0 ? before_h : 0) | (at.h == e.h - 1 ? after_h : 0);
    over |= (at.w == 0 ? before_w : 0) | (at.w == e.w - 1 ? after_w : 0);
    return all & ~over;
  }
};

// Sources of a step are worked out by next(), without a branch, while the step before is multiplied: where
// the first vector of either operand lies, and which vectors exist, a bit each. Offsets within one matrix of
// filters fit 32 bits.
template <class Engine, bool FILTERS_BY_K, bool LISTED_COLUMNS>
class ImplicitOperands {
  using T = typename Engine::T;
  using A = Copies<typename Engine::A, T, Engine::kThreads>;
  using B = Copies<typename Engine::B, T, Engine::kThreads>;
  static constexpr int kDepth = Engine::A::kDepth;
  static constexpr int kBlock = kBlockBytes / static_cast<int>(sizeof(T)), kSteps = kBlock / kDepth;
  static_assert(A::kCount * kTaps <= 64 && (FILTERS_BY_K || !LISTED_COLUMNS));

 public:
  static constexpr int kStepsOfBlock = kSteps;

  // Rows: positions p0 and on of sample b. Columns: o0 and on, or what `list` names there.
  __device__ __forceinline__ ImplicitOperands(const Implicit<T>& in, const Reduction& sum, int b, int p0,
                                              int o0, const int* list)
      : in_(in), sum_(sum) {
    const int64 first = static_cast<int64>(b) * in.extent->positions + p0 + A::row();
    panel_ = in.panel + first * in.pitch + A::column();
    const Edges<A::kCount> edges(in.taps);
#pragma unroll
    for (int i = 0; i < A::kCount; ++i) {
      const int position = p0 + A::row() + i * A::kRowsApart;
      if (position < in.extent->positions) met_ |= edges.met(*in.extent, place_of(*in.extent, position)) << i;
    }
    const int column = o0 + (FILTERS_BY_K ? B::row() : B::column());
    filters_ = in.filters + (FILTERS_BY_K ? B::column() : column);
    if constexpr (!FILTERS_BY_K) {
      columns_ = column < in.outputs ? (1u << B::kCount) - 1 : 0;
    } else if constexpr (LISTED_COLUMNS) {
#pragma unroll
      for (int i = 0; i < B::kCount; ++i) {
        const int o = column + i * B::kRowsApart;
        if (o < in.outputs) columns_ |= 1u << i;
        rows_[i] = o < in.outputs ? list[o] : 0;
      }
    } else {
#pragma unroll
      for (int i = 0; i < B::kCount; ++i)
        if (column + i * B::kRowsApart < in.outputs) columns_ |= 1u << i;
      filters_ += static_cast<int64>(column) * in.filter_pitch;
    }
  }

  // Starts at K block and tap number `at` of all.
  __device__ __forceinline__ void start(int at) {
    number_ = sum_.base + (in_.packed ? at : 0);
    blocks_ = sum_.blocks_1 * kBlock, columns_2_ = sum_.columns_2;
    const bool first = at < sum_.blocks_1 * in_.taps.first;
    if (!first) at -= sum_.blocks_1 * in_.taps.first;
    const int taps = first ? in_.taps.first : in_.taps.second, block = taps ? at / taps : 0;
    k_ = block * kBlock;
    tap_ = at - block * taps + (first ? 0 : in_.taps.first);
    if constexpr (!FILTERS_BY_K) {
      const int start = first || !sum_.order ? 0 : sum_.start_2;
      listed_ = sum_.order ? ~0u : 0;
      order_ = sum_.order + start + B::row();
      rows_end_ = (first && sum_.order ? sum_.count_1 : in_.rows) - start - B::row();
    }
    move();
  }

  // Nothing is read any more.
  __device__ __forceinline__ void end(bool really) {
    more_ = !really;
    if (really) met_now_ = read_now_ = 0;
  }

  // The next part of a K block; behind the last one the next tap, then the next K block.
  __device__ __forceinline__ void next() {
    k_ += kDepth;
    const bool first = tap_ < in_.taps.first, moved = (k_ & (kBlock - 1)) == 0;
    tap_ += moved, number_ += moved & in_.packed;
    const bool wrapped = moved & (tap_ == in_.taps.first + (first ? 0 : in_.taps.second));
    const bool over = wrapped & first & (k_ == blocks_);
    k_ = over ? 0 : moved & !wrapped ? k_ - kBlock : k_;
    tap_ = wrapped & !over ? (first ? 0 : in_.taps.first) : tap_;
    if constexpr (!FILTERS_BY_K) {
      if (over & (listed_ != 0)) {
        order_ += sum_.start_2;
        rows_end_ = in_.rows - sum_.start_2 - B::row();
      }
    }
    move();
  }

  __device__ __forceinline__ Source<T> a(int i) const {
    return {further(from_a_, in_.pitch, i * A::kRowsApart), met_now_ & 1u << i};
  }

  __device__ __forceinline__ Source<T> b(int i) const {
    constexpr bool kRegular = FILTERS_BY_K && !LISTED_COLUMNS;
    return {kRegular ? further(from_b_, in_.filter_pitch, i * B::kRowsApart)
                     : further(from_b_, in_.filter_pitch, rows_[i]),
            read_now_ & 1u << i};
  }

 private:
  __device__ __forceinline__ void move() {
    const bool first = tap_ < in_.taps.first;
    from_a_ = panel_ + (in_.shifts[tap_] + (k_ + (first ? 0 : columns_2_)));
    const bool exists = more_ & (k_ + A::column() < in_.width);
    met_now_ = exists ? static_cast<unsigned>(met_ >> (tap_ * A::kCount)) : 0;
    from_b_ = filters_ + (number_ + (in_.packed ? 0 : tap_)) * in_.matrix;
    if constexpr (FILTERS_BY_K) {
      from_b_ += in_.packed ? k_ & (kBlock - 1) : k_;
      read_now_ = more_ & (in_.packed | (k_ + B::column() < in_.rows)) ? columns_ : 0;
    } else {
      constexpr int kApart = B::kRowsApart;
      const int left = min(max(more_ ? rows_end_ - k_ : 0, 0), B::kCount * kApart);
      const unsigned found = (1u << (left + kApart - 1) / kApart) - 1;
      const int* order = further(order_, 1, k_);
      read_now_ = found & columns_;
#pragma unroll
      for (int i = 0; i < B::kCount; ++i) {
        rows_[i] = k_ + B::row() + i * kApart;
        if (found & listed_ & 1u << i) rows_[i] = __ldg(order + i * kApart);
      }
    }
  }

  const Implicit<T>& in_;
  const Reduction& sum_;
  const T *panel_, *filters_, *from_a_, *from_b_;
  unsigned long long met_ = 0;  // by tap, a bit a vector: which of a tap's positions exist
  unsigned columns_ = 0, met_now_, read_now_;
  unsigned rows_[FILTERS_BY_K && !LISTED_COLUMNS ? 1 : B::kCount];  // of filters
  const int* order_;  // of this thread's first row, and how many rows there are from it on
  int rows_end_;
  unsigned listed_;  // all bits, or none: rows go in order
  int number_, blocks_, columns_2_, tap_, k_;
  bool more_ = true;
};

}  // namespace dsts::cuda
