// Filter gradients, grouped by neuron: a block has one tile of one tap of one slot, over all the slot's
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
template <class Engine>
class PositionOperands {
  using T = typename Engine::T;
  using A = Copies<typename Engine::A, T, Engine::kThreads>;
  using B = Copies<typename Engine::B, T, Engine::kThreads>;
  static constexpr int kDepth = Engine::A::kDepth;
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
    left_inside_ = left < left_end, right_inside_ = right < p.columns;
    move();
  }

  // Nothing is read any more.
  __device__ __forceinline__ void end(bool really) {
    more_ = !really;
    if (really) met_ = exist_ = 0;
  }

  __device__ __forceinline__ void next() {
    p0_ += kDepth;
    const bool over = p0_ >= p_.extent.positions;
    p0_ = over ? 0 : p0_, member_ += over;
    if (over & more_) sample_ = *member_;
    move();
  }

  __device__ __forceinline__ Source<T> a(int i) const {
    return {further(from_a_, p_.left_pitch, i * A::kRowsApart), met_ & 1u << i * A::kRowsApart};
  }
  __device__ __forceinline__ Source<T> b(int i) const {
    return {further(from_b_, p_.right_pitch, i * B::kRowsApart), exist_ & 1u << i * B::kRowsApart};
  }

 private:
  // The present step's sources: where a thread's first vectors lie, and which positions from theirs on exist.
  __device__ __forceinline__ void move() {
    const int64 first = static_cast<int64>(sample_) * p_.extent.positions + p0_;
    from_a_ = left_ + first * p_.left_pitch, from_b_ = right_ + first * p_.right_pitch;
    const int position = p0_ + static_cast<int>(threadIdx.x) % 32;
    const Place at = place_of(p_.extent, position);
    const bool exists = more_ & (position < p_.extent.positions);
    // Within its row and column a shifted position is in a frame if it is one at all.
    const bool met = exists &
                     (static_cast<unsigned>(position + shift_) < static_cast<unsigned>(p_.extent.positions)) &
                     (static_cast<unsigned>(at.h + by_.h) < static_cast<unsigned>(p_.extent.h)) &
                     (static_cast<unsigned>(at.w + by_.w) < static_cast<unsigned>(p_.extent.w));
    met_ = __ballot_sync(0xffffffffu, met) >> A::row(),
    exist_ = __ballot_sync(0xffffffffu, exists) >> B::row();
    met_ = left_inside_ ? met_ : 0, exist_ = right_inside_ ? exist_ : 0;
  }

  const WeightGradientParams& p_;
  Place by_;
  const int* member_;
  int sample_;
  const T *left_, *right_, *from_a_, *from_b_;
  int shift_, p0_ = 0;
  unsigned met_ = 0, exist_ = 0;  // a bit a position
  bool left_inside_, right_inside_, more_ = true;
};

template <class E>
__device__ void weight_gradient_body(const WeightGradientParams& p) {
  using Tiles = Engine<E, false, false>;
  using T = typename Tiles::T;
  constexpr int kThreads = Tiles::kThreads, kBlock = kBlockBytes / static_cast<int>(sizeof(T));
  DSTS_DYNAMIC_SHARED(memory);
  float* chunk = reinterpret_cast<float*>(memory);
  const int slot = blockIdx.z, tap = blockIdx.y, n = p.neuron_of[slot];
  if (n < 0) return;
  const int across = ceil_div(p.columns, kTile), j0 = blockIdx.x / across * kTile,
            o0 = blockIdx.x % across * kTile;
  const bool in_first = tap < p.taps_1;
  const Taps taps = {p.kt, p.kh, p.kw, p.taps_1, p.taps_2, p.sign};
  int count = p.rows, list_start = 0, column = j0;
  if (p.plans) {
    const int* plan = p.plans + slot * kPlan;
    list_start = in_first ? 0 : plan[4];
    count = in_first ? plan[3] : p.rows - list_start;
    column += in_first ? 0 : plan[1] * kBlock;
  }
  if (j0 >= count) return;

  Tiles engine;
  engine.clear();
  PositionOperands<Tiles> operands(p, reach_of(taps, tap), p.members + p.groups[slot * 2], column,
                                   column + count - j0, o0);
  accumulate(engine, operands, p.groups[slot * 2 + 1] * ceil_div(p.extent.positions, Tiles::A::kDepth),
             memory);

  const int64 matrix = static_cast<int64>(p.by_neuron ? n : slot) * (p.taps_1 + p.taps_2) + tap;
  for (int part = 0; part < kParts; ++part) {
    __syncthreads();
    engine.store(chunk, part);
    __syncthreads();
    for (int i = threadIdx.x; i < kTile * kChunkColumns; i += kThreads) {
      const int r = i / kChunkColumns, c = i % kChunkColumns, j = j0 + r, o = o0 + part * kChunkColumns + c;
      if (j >= count || o >= p.columns) continue;
      const int row = p.order ? p.order[static_cast<int64>(slot) * p.rows + list_start + j] : j;
      const int64 at = (matrix * p.rows + row) * p.columns + o;
      const float v = chunk[r * kChunkPitch + c];
      if (p.out_float)
        static_cast<float*>(p.out)[at] = v;
      else
        static_cast<T*>(p.out)[at] = from_float<T>(v);
    }
  }
}

template <class E>
__global__ void __launch_bounds__(Multiplier<E>::kThreads, Multiplier<E>::kResident)
    weight_gradient_kernel(const __grid_constant__ WeightGradientParams p) {
  if constexpr (Multiplier<E>::kSupported) weight_gradient_body<E>(p);
}

#define INSTANTIATE(E) \
  template __global__ void weight_gradient_kernel<E>(const __grid_constant__ WeightGradientParams);
DSTS_ENGINES(INSTANTIATE)
#undef INSTANTIATE

#ifndef __CUDACC_RTC__
void weight_gradient(const WeightGradientParams& p, int dtype, bool tf32, int capability, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.rows, kTile) * ceil_div(p.columns, kTile)),
                  static_cast<unsigned>(p.taps_1 + p.taps_2), static_cast<unsigned>(p.slots));
  for_engine(dtype, tf32, [&](auto tag) {
    using E = typename decltype(tag)::Type;
    launch(weight_gradient_kernel<E>, grid, Multiplier<E>::kThreads,
           product_bytes<E, false, false>(capability), stream, p);
  });
}
#endif

}  // namespace dsts::cuda
