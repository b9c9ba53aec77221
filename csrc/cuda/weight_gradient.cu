// Filter gradients, grouped by neuron: a CTA has one tile of one tap of one slot, over all the slot's
// samples in order.
//
// The reduction runs over positions. Rows of the result come from `left`, shifted by the tap, columns from
// `right`. For the gated convolution `left` is its panel, gathered by the lists of the slot, so that only
// listed channels are computed, and `right` the gradient; for a mixing kernel `left` is the gradient, shifted
// the other way.
#include "cuda/implicit.h"
#include "cuda/launch.h"

namespace dsts::cuda {

// Both operands lie by column: rows are positions of the samples of a slot. Each lane works out for one of a
// step's positions whether it exists, and whether its shifted one does, and all lanes tell.
template <class Mma>
class PositionOperands {
  using T = typename Mma::T;
  using A = GlobalToShared<typename Mma::A, T, Mma::kThreads>;
  using B = GlobalToShared<typename Mma::B, T, Mma::kThreads>;
  static constexpr int kDepth = Mma::A::kDepth;
  static_assert(kDepth <= 32);

 public:
  // There is at least one sample.
  __device__ __forceinline__ PositionOperands(const WeightGradientParams& p, const Place& by,
                                              const int* members, int left0, int left_end, int right0)
      : p_(p), by_(by), member_(members), sample_(*members) {
    const int left = left0 + A::column(), right = right0 + B::column();
    shift_ = (by.t * p.extent.h + by.h) * p.extent.w + by.w;
    left_ = static_cast<const T*>(p.left) + static_cast<int64>(A::row() + shift_) * p.left_pitch + left;
    right_ = static_cast<const T*>(p.right) + static_cast<int64>(B::row()) * p.right_pitch + right;
    a_inside_ = left < left_end, b_inside_ = right < p.columns;
    locate();
  }

  // Nothing is read any more, if `over`.
  __device__ __forceinline__ void end(bool over) {
    active_ = !over;
    if (over) a_valid_ = b_valid_ = 0;
  }

  __device__ __forceinline__ void next() {
    p0_ += kDepth;
    const bool sample_done = p0_ >= p_.extent.positions;
    p0_ = sample_done ? 0 : p0_, member_ += sample_done;
    if (sample_done & active_) sample_ = *member_;
    locate();
  }

  __device__ __forceinline__ Source<T> a(int i) const {
    return {further(a_at_, p_.left_pitch, i * A::kRowsApart), a_valid_ & 1u << i * A::kRowsApart};
  }
  __device__ __forceinline__ Source<T> b(int i) const {
    return {further(b_at_, p_.right_pitch, i * B::kRowsApart), b_valid_ & 1u << i * B::kRowsApart};
  }

 private:
  // The present step's sources: where a thread's first vectors lie, and which positions from theirs on exist.
  __device__ __forceinline__ void locate() {
    const int64 first = static_cast<int64>(sample_) * p_.extent.positions + p0_;
    a_at_ = left_ + first * p_.left_pitch, b_at_ = right_ + first * p_.right_pitch;
    const int position = p0_ + static_cast<int>(threadIdx.x) % 32;
    const Place at = place_of(p_.extent, position);
    const bool exists = active_ & (position < p_.extent.positions);
    // Within its row and column a shifted position is in a frame if it is one at all.
    const bool reached =
        exists & (static_cast<unsigned>(position + shift_) < static_cast<unsigned>(p_.extent.positions)) &
        (static_cast<unsigned>(at.h + by_.h) < static_cast<unsigned>(p_.extent.h)) &
        (static_cast<unsigned>(at.w + by_.w) < static_cast<unsigned>(p_.extent.w));
    a_valid_ = __ballot_sync(0xffffffffu, reached) >> A::row(),
    b_valid_ = __ballot_sync(0xffffffffu, exists) >> B::row();
    a_valid_ = a_inside_ ? a_valid_ : 0, b_valid_ = b_inside_ ? b_valid_ : 0;
  }

  const WeightGradientParams& p_;
  Place by_;
  const int* member_;
  int sample_;
  const T *left_, *right_, *a_at_, *b_at_;
  int shift_, p0_ = 0;
  unsigned a_valid_ = 0, b_valid_ = 0;  // a bit a position
  bool a_inside_, b_inside_, active_ = true;
};

template <class E>
__device__ void weight_gradient_body(const WeightGradientParams& p) {
  using Mma = TileMma<E, false, false>;
  using T = typename Mma::T;
  constexpr int kThreads = Mma::kThreads, kBlock = kKBlockBytes / static_cast<int>(sizeof(T));
  DSTS_DYNAMIC_SMEM(smem);
  float* staging = reinterpret_cast<float*>(smem);
  const int slot = blockIdx.z, tap = blockIdx.y, n = p.neuron_of[slot];
  if (n < 0) return;
  const int across = ceil_div(p.columns, kTile), j0 = blockIdx.x / across * kTile,
            o0 = blockIdx.x % across * kTile;
  const bool spatial = tap < p.spatial_taps;
  const Taps taps = {p.kt, p.kh, p.kw, p.spatial_taps, p.temporal_taps, p.sign};
  int count = p.rows, list_start = 0, column = j0;
  if (p.plans) {
    const Plan& plan = plan_at(p.plans, slot);
    list_start = spatial ? 0 : plan.temporal_start;
    count = spatial ? plan.spatial_channels : p.rows - list_start;
    column += spatial ? 0 : plan.spatial_blocks * kBlock;
  }
  if (j0 >= count) return;

  Mma mma;
  mma.clear();
  PositionOperands<Mma> operands(p, reach_of(taps, tap), p.members + p.groups[slot * 2], column,
                                 column + count - j0, o0);
  accumulate(mma, operands, p.groups[slot * 2 + 1] * ceil_div(p.extent.positions, Mma::A::kDepth), smem);

  const int64 matrix = static_cast<int64>(p.by_neuron ? n : slot) * (p.spatial_taps + p.temporal_taps) + tap;
  for (int part = 0; part < kEpilogueParts; ++part) {
    __syncthreads();
    mma.store(staging, part);
    __syncthreads();
    for (int i = threadIdx.x; i < kTile * kEpilogueColumns; i += kThreads) {
      const int r = i / kEpilogueColumns, c = i % kEpilogueColumns, j = j0 + r,
                o = o0 + part * kEpilogueColumns + c;
      if (j >= count || o >= p.columns) continue;
      const int row = p.order ? p.order[static_cast<int64>(slot) * p.rows + list_start + j] : j;
      const int64 at = (matrix * p.rows + row) * p.columns + o;
      const float v = staging[r * kEpiloguePitch + c];
      if (p.out_float)
        static_cast<float*>(p.out)[at] = v;
      else
        static_cast<T*>(p.out)[at] = from_float<T>(v);
    }
  }
}

template <class E>
__global__ void __launch_bounds__(MmaTraits<E>::kThreads, MmaTraits<E>::kResident)
    weight_gradient_kernel(const __grid_constant__ WeightGradientParams p) {
  if constexpr (MmaTraits<E>::kSupported) weight_gradient_body<E>(p);
}

#define INSTANTIATE(code, name, E) \
  template __global__ void weight_gradient_kernel<E>(const __grid_constant__ WeightGradientParams);
DSTS_MMA_DTYPES(INSTANTIATE)
#undef INSTANTIATE

#ifndef __CUDACC_RTC__
void weight_gradient(const WeightGradientParams& p, int dtype, bool tf32, int capability, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.rows, kTile) * ceil_div(p.columns, kTile)),
                  static_cast<unsigned>(p.spatial_taps + p.temporal_taps), static_cast<unsigned>(p.slots));
  for_mma(dtype, tf32, [&](auto tag) {
    using E = typename decltype(tag)::Type;
    launch(weight_gradient_kernel<E>, grid, MmaTraits<E>::kThreads,
           product_smem_of<E, false, false>(capability), stream, p);
  });
}
#endif

}  // namespace dsts::cuda
