// Products in tensor cores from sm_75 on: `TuringMma`, a TileMma (product.h) by ldmatrix and mma.sync, and
// its main loop.
//
// A warp has 64 rows by 64 columns of a tile. Operands lie in shared memory without padding: 16-byte vectors
// of a row change places by the row's number, so that lanes which load or store together meet every bank
// once. Fragments go by slabs of 32 bytes of K; one slab's come from shared memory while the slab before is
// multiplied, those of the right operand into the registers that it has done with. From sm_80 on a step is
// two slabs, and cp.async keeps three more on their way. On sm_75, where two CTAs must do with 64 KiB, a
// step is one slab, and the next one waits in registers.
#pragma once

#include "cuda/matrix.h"
#include "cuda/product.h"

namespace dsts::cuda {

constexpr int kSlabBytes = 32;
constexpr int kStepBytes = step_bytes(DSTS_SM80 ? 80 : 75, false);

template <class T, bool BY_K>
struct SwizzledTile {
  static constexpr int kSize = static_cast<int>(sizeof(T));
  static constexpr int kVector = kVectorBytes / kSize;
  static constexpr int kDepth = kStepBytes / kSize;
  static constexpr int kRows = BY_K ? kTile : kDepth;
  static constexpr int kColumns = BY_K ? kDepth : kTile;
  static constexpr int kPitch = kColumns * kSize;  // in bytes
  static constexpr int kBytes = kTile * kStepBytes;
  static constexpr int kRowVectors = kColumns / kVector;

  // What a row's number does to its vectors' numbers, by an exclusive or. By K, eight rows that are read at
  // the same vector lie in all banks; by column too, or, of words, four rows at two vectors.
  static __device__ __forceinline__ int turn(int row) {
    if (BY_K) return row * kRowVectors / 8 % kRowVectors;
    return kSize == 2 ? row % 8 : row % 4 * 2;
  }
};

// One operand's part of a step that this thread brings, as in product.h. Its rows have the same turn.
template <class T, bool BY_K, int THREADS>
struct GlobalToShared<SwizzledTile<T, BY_K>, T, THREADS> {
  using Tile = SwizzledTile<T, BY_K>;
  static constexpr int kCount = Tile::kRows * Tile::kRowVectors / THREADS;
  static constexpr int kRowsApart = THREADS / Tile::kRowVectors;

  static __device__ __forceinline__ int row() { return threadIdx.x / Tile::kRowVectors; }
  static __device__ __forceinline__ int vector() { return threadIdx.x % Tile::kRowVectors; }
  static __device__ __forceinline__ int column() { return vector() * Tile::kVector; }
  static __device__ __forceinline__ int place() {  // in bytes, of the first; others are kApart behind
    return row() * Tile::kPitch + (vector() ^ Tile::turn(row())) * 16;
  }
  static constexpr int kApart = kRowsApart * Tile::kPitch;
};

// How a warp reads its 64 rows or columns of an operand, `first` and on, in four blocks of 16. A block's slab
// is four registers, of its lower and upper 8 over the lower and upper 16 bytes of K: in the order that
// products want them, of the left operand both eights come first, of the right one both 16 bytes.
template <class T, bool BY_K, bool LEFT>
class Reader {
  using Tile = SwizzledTile<T, BY_K>;
  static constexpr bool kWords = !BY_K && sizeof(T) == 4;  // ldmatrix turns 16-bit elements round, not words
  // Slabs of a step are two vectors of K apart in a turned row; so are blocks, or words' eights, by column.
  static constexpr int kPlaces = BY_K ? kStepBytes / kSlabBytes : 4;

 public:
  __device__ __forceinline__ explicit Reader(int first) {
    const int lane = threadIdx.x % 32;
    const int eight = LEFT ? lane / 8 % 2 : lane / 16, deep = LEFT ? lane / 16 : lane / 8 % 2;
    int row, vector, within = 0;
    if (kWords) {
      row = lane % 4, vector = first / 4 + lane / 16, within = lane / 4 % 4 * 4;
    } else if (BY_K) {
      row = first + 8 * eight + lane % 8, vector = deep;
    } else {
      row = 8 * deep + lane % 8, vector = first / 8 + eight;
    }
#pragma unroll
    for (int i = 0; i < kPlaces; ++i)
      places_[i] = row * Tile::kPitch + ((vector + 2 * i) ^ Tile::turn(row)) * 16 + within;
  }

  // Block q of a slab.
  __device__ __forceinline__ void load(unsigned (&to)[4], const unsigned char* tile, int q, int slab) const {
    if constexpr (kWords) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int eight = LEFT ? i % 2 : i / 2, deep = LEFT ? i / 2 : i % 2;
        to[i] = *reinterpret_cast<const unsigned*>(tile + places_[q % 2 * 2 + eight] + q / 2 * 128 +
                                                   (slab * 8 + deep * 4) * Tile::kPitch);
      }
    } else {
      load_matrices<!BY_K>(to, BY_K ? tile + places_[slab] + q * 16 * Tile::kPitch
                                    : tile + places_[q] + slab * 16 * Tile::kPitch);
    }
  }

 private:
  int places_[kPlaces];
};

template <class E, bool A_BY_K, bool B_BY_K>
class TuringMma {
 public:
  using T = typename MmaTraits<E>::Element;
  using A = SwizzledTile<T, A_BY_K>;
  using B = SwizzledTile<T, B_BY_K>;
  static constexpr int kThreads = MmaTraits<E>::kThreads;
  static_assert(kThreads / 32 * 64 * 64 == kTile * kTile, "a warp has 64 by 64");

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum_[i][j][e] = 0;
  }

  // One slab. `next_b(q)` brings block q of the right operand's next one, once this one's was multiplied, and
  // `next_a(q)` of the left operand's, at the end.
  template <class NextA, class NextB>
  __device__ __forceinline__ void multiply(unsigned (&a)[4][4], unsigned (&b)[4][4], const NextA& next_a,
                                           const NextB& next_b) {
#pragma unroll
    for (int q = 0; q < 4; ++q) round(a[q]);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      round(b[q]);
#pragma unroll
      for (int n = 0; n < 8; ++n) {  // neighbouring products have an operand in common
        const int i = q == 3 ? n / 2 : n < 4 ? n : 7 - n, j = q == 3 ? n % 4 == 1 || n % 4 == 2 : n / 4;
        multiply_add<E>(sum_[i][2 * q + j], a[i], b[q] + j * 2);
        if (q == 3 && n % 2) next_a(i);
      }
      next_b(q);
    }
  }

  // Columns kEpilogueColumns * part and on, into staging [128][kEpiloguePitch].
  __device__ __forceinline__ void store(float* staging, int part) const {
    constexpr int kParts = 64 / kEpilogueColumns, kEach = 8 / kParts;  // of a warp's columns
    static_assert(kParts == 1 || kParts == 2);
    const int lane = threadIdx.x % 32;
    float* to = staging + (threadIdx.x / 64 * 64 + lane / 4) * kEpiloguePitch + lane % 4 * 2;
    if (static_cast<int>(threadIdx.x / 32 % 2) != part / kParts) return;
    const bool upper = part % kParts != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < kEach; ++j)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const float left = upper ? sum_[i][8 - kEach + j][e] : sum_[i][j][e];
          const float right = upper ? sum_[i][8 - kEach + j][e + 1] : sum_[i][j][e + 1];
          *reinterpret_cast<float2*>(to + (16 * i + 4 * e) * kEpiloguePitch + 8 * j) =
              make_float2(left, right);
        }
  }

 private:
  static __device__ __forceinline__ void round([[maybe_unused]] unsigned (&block)[4]) {
    if constexpr (sizeof(T) == 4)
#pragma unroll
      for (int i = 0; i < 4; ++i) block[i] = rounded_to_tf32(block[i]);
  }

  float sum_[4][8][4];
};

// As in product.h.
template <class E, bool A_BY_K, bool B_BY_K, class Operands>
__device__ __forceinline__ void accumulate(TuringMma<E, A_BY_K, B_BY_K>& mma, Operands& operands, int steps,
                                           unsigned char* smem) {
  using Mma = TuringMma<E, A_BY_K, B_BY_K>;
  using T = typename Mma::T;
  using A = GlobalToShared<typename Mma::A, T, Mma::kThreads>;
  using B = GlobalToShared<typename Mma::B, T, Mma::kThreads>;
  constexpr int kLeft = Mma::A::kBytes, kStage = kLeft + Mma::B::kBytes;
  const Reader<T, A_BY_K, true> read_a(threadIdx.x / 64 * 64);
  const Reader<T, B_BY_K, false> read_b(threadIdx.x / 32 % 2 * 64);
  const int place_a = A::place(), place_b = kLeft + B::place();
  unsigned a[DSTS_SM80 ? 2 : 1][4][4], b[4][4];
  const auto load_a = [&](int which, int stage, int slab, int q) {
    read_a.load(a[which][q], smem + stage, q, slab);
  };
  const auto load_b = [&](int stage, int slab, int q) { read_b.load(b[q], smem + stage + kLeft, q, slab); };
  const auto load_all = [&](int which, int stage, int slab) {
#pragma unroll
    for (int q = 0; q < 4; ++q) load_a(which, stage, slab, q);
  };
  if (steps <= 0) return;
  __syncthreads();
#if DSTS_SM80
  constexpr int kStages = stages_of(kCapability, kExact<E>), kAll = kStages * kStage;
  static_assert(kStepBytes == 2 * kSlabBytes, "two slabs take turns in two sets of registers");
  const auto fetch = [&](int stage) {
#  pragma unroll
    for (int i = 0; i < A::kCount; ++i) {
      const Source<T> from = operands.a(i);
      start_copy(smem + stage + place_a + i * A::kApart, from.at, from.inside);
    }
#  pragma unroll
    for (int i = 0; i < B::kCount; ++i) {
      const Source<T> from = operands.b(i);
      start_copy(smem + stage + place_b + i * B::kApart, from.at, from.inside);
    }
    group_copies();
  };
  // Behind the last step zeros are copied, so that nothing in the loop depends on its number.
#  pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    fetch(s * kStage);
    operands.end(s + 1 >= steps);
    operands.next();
  }
  wait_for_copies<kStages - 2>();
  __syncthreads();
  load_all(0, 0, 0);
#  pragma unroll
  for (int q = 0; q < 4; ++q) load_b(0, 0, q);
  int now = 0, then = kAll - kStage;
#  pragma unroll 1
  for (int left = steps; left > 0; --left) {
    load_all(1, now, 1);
    fetch(then);
    operands.end(left <= kStages);
    operands.next();
    mma.multiply(a[0], b, [](int) {}, [&](int q) { load_b(now, 1, q); });
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the next stage is whole, and this one read
    then = now, now = now + kStage == kAll ? 0 : now + kStage;
    load_all(0, now, 0);
    mma.multiply(a[1], b, [](int) {}, [&](int q) { load_b(now, 0, q); });
  }
  wait_for_copies<0>();
#else
  static_assert(kStepBytes == kSlabBytes, "a step is one slab");
  uint4 staged[A::kCount + B::kCount];
  const auto copy = [](const Source<T>& from) {
    return from.inside ? *reinterpret_cast<const uint4*>(from.at) : make_uint4(0, 0, 0, 0);
  };
  const auto fetch = [&] {
#  pragma unroll
    for (int i = 0; i < A::kCount; ++i) staged[i] = copy(operands.a(i));
#  pragma unroll
    for (int i = 0; i < B::kCount; ++i) staged[A::kCount + i] = copy(operands.b(i));
  };
  const auto put = [&](int stage) {
#  pragma unroll
    for (int i = 0; i < A::kCount; ++i)
      *reinterpret_cast<uint4*>(smem + stage + place_a + i * A::kApart) = staged[i];
#  pragma unroll
    for (int i = 0; i < B::kCount; ++i)
      *reinterpret_cast<uint4*>(smem + stage + place_b + i * B::kApart) = staged[A::kCount + i];
  };
  fetch();
  put(0);
  operands.end(steps <= 1);
  operands.next();
  fetch();
  __syncthreads();
  load_all(0, 0, 0);
#  pragma unroll
  for (int q = 0; q < 4; ++q) load_b(0, 0, q);
  int then = kStage;
#  pragma unroll 1
  for (int left = steps; left > 0; --left) {
    put(then);
    operands.end(left <= 2);
    operands.next();
    fetch();
    __syncthreads();  // the next step is in place, and the stage behind it read
    mma.multiply(a[0], b, [&](int q) { load_a(0, then, 0, q); }, [&](int q) { load_b(then, 0, q); });
    then = kStage - then;
  }
#endif
}

}  // namespace dsts::cuda
