// Operands of an implicit convolution: rows are positions of a panel shifted by the taps of a kernel, columns
// are filters. The reduction goes over K blocks, for each over the taps of the operator that reads it: first
// those of the spatial operator, then those of the temporal one (3x1x1). A mixing kernel stands in the
// spatial operator's place, alone. Shared by the convolution and its data gradient.
#pragma once

#include "cuda/product.h"

namespace dsts::cuda {

// Sides of the spatial operator, how many taps each operator has, and which way they reach.
struct Taps {
  int kt, kh, kw, spatial, temporal, sign;
};

// Reach of tap `tap` counted over both operators.
__device__ __forceinline__ Place reach_of(const Taps& k, int tap) {
  return tap < k.spatial ? reach(tap, k.kt, k.kh, k.kw, k.sign) : Place{k.sign * (tap - k.spatial - 1), 0, 0};
}

// Where tiles of one launch read: what does not change from tile to tile.
template <class T>
struct Implicit {
  const T* panel;    // [B, T, H, W, pitch]
  const T* filters;  // packed [K blocks, outputs, K block], else [taps, outputs or k_channels, filter_pitch]
  const Extent* extent;
  Taps taps;
  int width, pitch;  // columns of the panel that each operator may read, and how far its rows are apart
  int outputs, k_channels;  // columns of the result; channels of filters by tap
  int filter_pitch;         // how far rows of filters are apart
  int64 matrix_size;        // elements from tap to tap, or from K block to K block
  bool packed;              // filters are K blocks behind one another, not by tap
  const int64* shifts;      // [kMaxTaps], shared: elements of the panel that each tap reaches

  // Fills the table of shifts; all threads, a barrier must follow.
  __device__ void fill(int64* table) const {
    if (threadIdx.x < kMaxTaps) {
      const Place by = reach_of(taps, threadIdx.x);
      table[threadIdx.x] = ((static_cast<int64>(by.t) * extent->h + by.h) * extent->w + by.w) * pitch;
    }
  }
};

// One sample's reduction; it lies in shared memory, where it takes no registers from the loop.
struct Reduction {
  int spatial_blocks;    // K blocks of the spatial operator
  int temporal_column;   // where the temporal one's columns of the panel start
  int base;              // first matrix of the filters, or first K block of packed ones
  int spatial_channels;  // of a list: what the spatial operator reads
  int temporal_start;    // of a list: where the temporal one's starts
  const int* order;      // [k_channels]: that list, or null
};

// Taps as bits, `APART` of them from tap to tap, by the edge of the features that they reach over: what a
// position there must not read.
template <int APART>
struct Edges {
  using Bits = unsigned long long;
  Bits all = 0, before_t = 0, after_t = 0, before_h = 0, after_h = 0, before_w = 0, after_w = 0;

  __device__ __forceinline__ explicit Edges(const Taps& taps) {
#pragma unroll 1
    for (int tap = 0; tap < taps.spatial + taps.temporal; ++tap) {
      const Place by = reach_of(taps, tap);
      const Bits bit = Bits{1} << (tap * APART);
      all |= bit;
      before_t |= by.t < 0 ? bit : 0, after_t |= by.t > 0 ? bit : 0;
      before_h |= by.h < 0 ? bit : 0, after_h |= by.h > 0 ? bit : 0;
      before_w |= by.w < 0 ? bit : 0, after_w |= by.w > 0 ? bit : 0;
    }
  }

  // The taps that reach features from `at`.
  __device__ __forceinline__ Bits inside(const Extent& e, const Place& at) const {
    Bits over = (at.t == 0 ? before_t : 0) | (at.t == e.t - 1 ? after_t : 0);
    over |= (at.h == 0 ? before_h : 0) | (at.h == e.h - 1 ? after_h : 0);
    over |= (at.w == 0 ? before_w : 0) | (at.w == e.w - 1 ? after_w : 0);
    return all & ~over;
  }
};

// Sources of a step are worked out by next(), without a branch, while the step before is multiplied: where
// the first vector of either operand lies, and which vectors exist, a bit each. Offsets within one matrix of
// filters fit 32 bits.
template <class Mma, bool FILTERS_BY_K, bool LISTED_COLUMNS>
class ImplicitOperands {
  using T = typename Mma::T;
  using A = GlobalToShared<typename Mma::A, T, Mma::kThreads>;
  using B = GlobalToShared<typename Mma::B, T, Mma::kThreads>;
  static constexpr int kDepth = Mma::A::kDepth;
  static constexpr int kBlock = kKBlockBytes / static_cast<int>(sizeof(T)), kSteps = kBlock / kDepth;
  static_assert(kSteps * kDepth == kBlock && (kBlock & (kBlock - 1)) == 0, "a K block is whole steps");
  static_assert(A::kCount * kMaxTaps <= 64, "a bit for every vector and tap");
  static_assert(FILTERS_BY_K || !LISTED_COLUMNS);

 public:
  static constexpr int kStepsOfBlock = kSteps;

  // Rows: positions p0 and on of sample b. Columns: o0 and on, or what `list` names there.
  __device__ __forceinline__ ImplicitOperands(const Implicit<T>& in, const Reduction& reduction, int b,
                                              int p0, int o0, const int* list)
      : in_(in), reduction_(reduction) {
    const int64 first = static_cast<int64>(b) * in.extent->positions + p0 + A::row();
    panel_ = in.panel + first * in.pitch + A::column();
    const Edges<A::kCount> edges(in.taps);
#pragma unroll
    for (int i = 0; i < A::kCount; ++i) {
      const int position = p0 + A::row() + i * A::kRowsApart;
      if (position < in.extent->positions)
        a_mask_ |= edges.inside(*in.extent, place_of(*in.extent, position)) << i;
    }
    const int column = o0 + (FILTERS_BY_K ? B::row() : B::column());
    filters_ = in.filters + (FILTERS_BY_K ? B::column() : column);
    if constexpr (!FILTERS_BY_K) {
      b_mask_ = column < in.outputs ? (1u << B::kCount) - 1 : 0;
    } else if constexpr (LISTED_COLUMNS) {
#pragma unroll
      for (int i = 0; i < B::kCount; ++i) {
        const int o = column + i * B::kRowsApart;
        if (o < in.outputs) b_mask_ |= 1u << i;
        b_rows_[i] = o < in.outputs ? list[o] : 0;
      }
    } else {
#pragma unroll
      for (int i = 0; i < B::kCount; ++i)
        if (column + i * B::kRowsApart < in.outputs) b_mask_ |= 1u << i;
      filters_ += static_cast<int64>(column) * in.filter_pitch;
    }
  }

  // Starts at K block and tap number `at` of all.
  __device__ __forceinline__ void start(int at) {
    matrix_ = reduction_.base + (in_.packed ? at : 0);
    spatial_end_ = reduction_.spatial_blocks * kBlock, temporal_column_ = reduction_.temporal_column;
    const bool spatial = at < reduction_.spatial_blocks * in_.taps.spatial;
    if (!spatial) at -= reduction_.spatial_blocks * in_.taps.spatial;
    const int taps = spatial ? in_.taps.spatial : in_.taps.temporal, block = taps ? at / taps : 0;
    k_ = block * kBlock;
    tap_ = at - block * taps + (spatial ? 0 : in_.taps.spatial);
    if constexpr (!FILTERS_BY_K) {
      const int start = spatial || !reduction_.order ? 0 : reduction_.temporal_start;
      listed_ = reduction_.order ? ~0u : 0;
      order_ = reduction_.order + start + B::row();
      k_left_ =
          (spatial && reduction_.order ? reduction_.spatial_channels : in_.k_channels) - start - B::row();
    }
    locate();
  }

  // Nothing is read any more, if `over`.
  __device__ __forceinline__ void end(bool over) {
    active_ = !over;
    if (over) a_valid_ = b_valid_ = 0;
  }

  // The next part of a K block; behind the last one the next tap, then the next K block.
  __device__ __forceinline__ void next() {
    k_ += kDepth;
    const bool spatial = tap_ < in_.taps.spatial, block_done = (k_ & (kBlock - 1)) == 0;
    tap_ += block_done, matrix_ += block_done & in_.packed;
    const bool taps_done = block_done & (tap_ == in_.taps.spatial + (spatial ? 0 : in_.taps.temporal));
    const bool spatial_done = taps_done & spatial & (k_ == spatial_end_);
    k_ = spatial_done ? 0 : block_done & !taps_done ? k_ - kBlock : k_;
    tap_ = taps_done & !spatial_done ? (spatial ? 0 : in_.taps.spatial) : tap_;
    if constexpr (!FILTERS_BY_K) {
      if (spatial_done & (listed_ != 0)) {
        order_ += reduction_.temporal_start;
        k_left_ = in_.k_channels - reduction_.temporal_start - B::row();
      }
    }
    locate();
  }

  __device__ __forceinline__ Source<T> a(int i) const {
    return {further(a_at_, in_.pitch, i * A::kRowsApart), a_valid_ & 1u << i};
  }

  __device__ __forceinline__ Source<T> b(int i) const {
    constexpr bool kRegular = FILTERS_BY_K && !LISTED_COLUMNS;
    return {kRegular ? further(b_at_, in_.filter_pitch, i * B::kRowsApart)
                     : further(b_at_, in_.filter_pitch, b_rows_[i]),
            b_valid_ & 1u << i};
  }

 private:
  __device__ __forceinline__ void locate() {
    const bool spatial = tap_ < in_.taps.spatial;
    a_at_ = panel_ + (in_.shifts[tap_] + (k_ + (spatial ? 0 : temporal_column_)));
    const bool exists = active_ & (k_ + A::column() < in_.width);
    a_valid_ = exists ? static_cast<unsigned>(a_mask_ >> (tap_ * A::kCount)) : 0;
    b_at_ = filters_ + (matrix_ + (in_.packed ? 0 : tap_)) * in_.matrix_size;
    if constexpr (FILTERS_BY_K) {
      b_at_ += in_.packed ? k_ & (kBlock - 1) : k_;
      b_valid_ = active_ & (in_.packed | (k_ + B::column() < in_.k_channels)) ? b_mask_ : 0;
    } else {
      constexpr int kApart = B::kRowsApart;
      const int left = min(max(active_ ? k_left_ - k_ : 0, 0), B::kCount * kApart);
      const unsigned present = (1u << (left + kApart - 1) / kApart) - 1;
      const int* order = further(order_, 1, k_);
      b_valid_ = present & b_mask_;
#pragma unroll
      for (int i = 0; i < B::kCount; ++i) {
        b_rows_[i] = k_ + B::row() + i * kApart;
        if (present & listed_ & 1u << i) b_rows_[i] = __ldg(order + i * kApart);
      }
    }
  }

  const Implicit<T>& in_;
  const Reduction& reduction_;
  const T *panel_, *filters_, *a_at_, *b_at_;
  unsigned long long a_mask_ = 0;            // by tap, a bit a vector: which of a tap's positions exist
  unsigned b_mask_ = 0, a_valid_, b_valid_;  // a bit a vector: columns that exist; what the step reads
  unsigned b_rows_[FILTERS_BY_K && !LISTED_COLUMNS ? 1 : B::kCount];  // of filters
  const int* order_;  // of this thread's first row, and how many rows there are from it on
  int k_left_;
  unsigned listed_;                                       // all bits, or none: rows go in order
  int matrix_, spatial_end_, temporal_column_, tap_, k_;  // spatial_end_: of k_, where the operators change
  bool active_ = true;
};

}  // namespace dsts::cuda
