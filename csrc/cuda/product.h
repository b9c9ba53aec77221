// A tile of a matrix product, 128 by 128 floats in the registers of one CTA: how its operands come through
// shared memory, and what multiplies them.
//
// `TileMma` is one of: `TuringMma` (turing.h) in tensor cores from sm_75 on (half, bfloat16, TF32; 4 warps of
// 64 by 64), `VoltaMma` (volta.h) or, for simulators, `Wmma` in those of sm_70 (half), `SimtMma` in full
// float32 (256 threads of 8 by 8). A step brings some bytes of K of both operands, each as a shared tile that
// lies either by K ([128][K], K contiguous) or by column ([K][128]). Up to sm_75 the next step waits in
// registers while this one is multiplied (two tiles take turns); from sm_80 on cp.async keeps several on
// their way.
#pragma once

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#  include <cuda_pipeline.h>
#  define DSTS_SM80 1  // bfloat16 and TF32 in tensor cores, asynchronous copies
#else
#  define DSTS_SM80 0
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 750
#  include <mma.h>
#  define DSTS_SM70 1
#else
#  define DSTS_SM70 0
#endif

#include "cuda/device.h"

namespace dsts::cuda {

struct Tf32 {};  // float32 multiplied as TF32

// How elements E are multiplied: `Element` in memory, threads of a CTA, CTAs that a multiprocessor holds.
template <class E>
struct MmaTraits;
template <class E, bool SUPPORTED>
struct HalfMmaTraits {
  using Element = E;
  static constexpr int kThreads = 128, kResident = 2;
  static constexpr bool kSupported = SUPPORTED;
};
template <>
struct MmaTraits<__half> : HalfMmaTraits<__half, true> {};
template <>
struct MmaTraits<__nv_bfloat16> : HalfMmaTraits<__nv_bfloat16, DSTS_SM80 != 0> {};
template <>
struct MmaTraits<Tf32> {
  using Element = float;
  static constexpr int kThreads = 128, kResident = 2;
  static constexpr bool kSupported = DSTS_SM80;
};
template <>
struct MmaTraits<float> {
  using Element = float;
  static constexpr int kThreads = 256, kResident = 1;
  static constexpr bool kSupported = true;
};

// The first chip that has what this code uses: by it the table of tiles.h says what depends on the chip.
constexpr int kCapability = DSTS_SM80 ? 80 : DSTS_SM70 ? 70 : 75;

// Whether E is float32 without tensor cores.
template <class E>
constexpr bool kExact = kSame<E, float>;

// Where an operand lies in shared memory in padded rows, for all but `TuringMma`. Rows are padded by 16
// bytes, so that eight of them touch every bank once; on sm_70, whose fragments are read 8 bytes at a time,
// by 32 where rows are K.
template <class T, bool BY_K>
struct SharedTile {
  static constexpr int kStep = 64;  // bytes of K
  static constexpr int kVector = kVectorBytes / sizeof(T);
  static constexpr int kDepth = kStep / sizeof(T);
  static constexpr int kRows = BY_K ? kTile : kDepth;
  static constexpr int kColumns = BY_K ? kDepth : kTile;
  static constexpr int kPitch = kColumns + (BY_K || !DSTS_SM70 ? 1 : 2) * kVector;
  static constexpr int kBytes = padded_bytes(kStep, BY_K, sizeof(T));
  static constexpr int kRowVectors = kColumns / kVector;  // 16-byte vectors of a row
  static_assert(kRows * kPitch * static_cast<int>(sizeof(T)) <= kBytes, "rows lie within their tile");
  static_assert(kStep == step_bytes(70, true) && kStep == step_bytes(80, true), "as tiles.h counts");
  static __device__ __forceinline__ int at(int mn, int k) { return BY_K ? mn * kPitch + k : k * kPitch + mn; }
};

// An epilogue's staging memory: part of a finished tile's columns, [128][kEpiloguePitch].
constexpr int kEpilogueColumns = epilogue_columns(kCapability);
constexpr int kEpiloguePitch = kEpilogueColumns + kEpiloguePad;
constexpr int kEpilogueBytes = epilogue_bytes(kCapability);
constexpr int kEpilogueParts = kTile / kEpilogueColumns;
constexpr int kSumGroups = kTile / kEpilogueColumns;  // of rows: kTile threads add columns up
constexpr int kSumRows = kTile / kSumGroups;
static_assert(kEpilogueParts * kEpilogueColumns == kTile && kSumRows * kSumGroups == kTile);

#if DSTS_SM70
template <bool ROW_MAJOR>
struct LayoutOf {
  using Type = nvcuda::wmma::row_major;
};
template <>
struct LayoutOf<false> {
  using Type = nvcuda::wmma::col_major;
};

template <class E, bool A_BY_K, bool B_BY_K>
class Wmma {
 public:
  using T = E;
  using A = SharedTile<T, A_BY_K>;
  using B = SharedTile<T, B_BY_K>;
  static constexpr int kThreads = MmaTraits<E>::kThreads;
  static_assert(kThreads / 32 * 64 * 64 == kTile * kTile, "a warp has 64 by 64");

  __device__ __forceinline__ void clear() {
#  pragma unroll
    for (int i = 0; i < 4; ++i)
#  pragma unroll
      for (int j = 0; j < 4; ++j) nvcuda::wmma::fill_fragment(sum_[i][j], 0.0f);
  }

  // Half of a step: k from `part` halves on.
  __device__ __forceinline__ void multiply(const T* a, const T* b, int part) {
    const int m0 = threadIdx.x / 64 * 64, n0 = threadIdx.x / 32 % 2 * 64;
#  pragma unroll
    for (int k = part * (A::kDepth / 2); k < (part + 1) * (A::kDepth / 2); k += kK) {
      nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, kK, E, typename LayoutOf<A_BY_K>::Type> left[4];
#  pragma unroll
      for (int i = 0; i < 4; ++i)
        nvcuda::wmma::load_matrix_sync(left[i], a + A::at(m0 + 16 * i, k), A::kPitch);
#  pragma unroll
      for (int j = 0; j < 4; ++j) {
        nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, kK, E, typename LayoutOf<!B_BY_K>::Type> right;
        nvcuda::wmma::load_matrix_sync(right, b + B::at(n0 + 16 * j, k), B::kPitch);
#  pragma unroll
        for (int i = 0; i < 4; ++i) nvcuda::wmma::mma_sync(sum_[i][j], left[i], right, sum_[i][j]);
      }
    }
  }

  // Columns 64 * half and on, into staging [128][kEpiloguePitch].
  __device__ __forceinline__ void store(float* staging, int half) const {
    const int m0 = threadIdx.x / 64 * 64;
    if (static_cast<int>(threadIdx.x / 32 % 2) != half) return;
#  pragma unroll
    for (int i = 0; i < 4; ++i)
#  pragma unroll
      for (int j = 0; j < 4; ++j)
        nvcuda::wmma::store_matrix_sync(staging + (m0 + 16 * i) * kEpiloguePitch + 16 * j, sum_[i][j],
                                        kEpiloguePitch, nvcuda::wmma::mem_row_major);
  }

 private:
  static constexpr int kK = 16;

  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, kK, float> sum_[4][4];
};
#endif

template <bool A_BY_K, bool B_BY_K>
class SimtMma {
 public:
  using T = float;
  using A = SharedTile<T, A_BY_K>;
  using B = SharedTile<T, B_BY_K>;
  static constexpr int kThreads = MmaTraits<float>::kThreads;
  static_assert(kThreads * 8 * 8 == kTile * kTile && kThreads == kTile / 8 * 16);

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) sum_[i][j] = 0;
  }

  // A thread has 8 neighbouring rows and every 16th column.
  __device__ __forceinline__ void multiply(const T* a, const T* b, int part) {
    const int m0 = threadIdx.x / 16 * 8, n0 = threadIdx.x % 16;
#pragma unroll 4
    for (int k = part * (A::kDepth / 2); k < (part + 1) * (A::kDepth / 2); ++k) {
      float left[8], right[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) left[i] = a[A::at(m0 + i, k)];
#pragma unroll
      for (int j = 0; j < 8; ++j) right[j] = b[B::at(n0 + 16 * j, k)];
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sum_[i][j] += left[i] * right[j];
    }
  }

  __device__ __forceinline__ void store(float* staging, int part) const {
    constexpr int kEach = kEpilogueColumns / 16;
    const int m0 = threadIdx.x / 16 * 8, n0 = threadIdx.x % 16;
#pragma unroll
    for (int columns = 0; columns < kEpilogueParts; ++columns) {
      if (columns != part) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j)
          staging[(m0 + i) * kEpiloguePitch + n0 + 16 * j] = sum_[i][columns * kEach + j];
    }
  }

 private:
  float sum_[8][8];
};

// Which one multiplies E.
template <class E, bool A_BY_K, bool B_BY_K>
class TuringMma;
template <class E, bool A_BY_K, bool B_BY_K>
struct TileMmaOf {
#if DSTS_SM70
  using Type = Wmma<E, A_BY_K, B_BY_K>;
#else
  using Type = TuringMma<E, A_BY_K, B_BY_K>;
#endif
};
template <bool A_BY_K, bool B_BY_K>
struct TileMmaOf<float, A_BY_K, B_BY_K> {
  using Type = SimtMma<A_BY_K, B_BY_K>;
};
#if DSTS_SM70 && !defined(DSTS_WMMA)  // simulators know WMMA only
template <bool A_BY_K, bool B_BY_K>
class VoltaMma;
template <bool A_BY_K, bool B_BY_K>
struct TileMmaOf<__half, A_BY_K, B_BY_K> {
  using Type = VoltaMma<A_BY_K, B_BY_K>;
};
#endif
template <class E, bool A_BY_K, bool B_BY_K>
using TileMma = typename TileMmaOf<E, A_BY_K, B_BY_K>::Type;

// Shared bytes of operands or, afterwards, of the epilogue: the same memory.
template <class E, bool A_BY_K, bool B_BY_K>
__host__ __device__ constexpr int product_smem_of(int capability) {
  return product_smem(capability, kExact<E>, A_BY_K, B_BY_K, sizeof(typename MmaTraits<E>::Element));
}

// 16 bytes of an operand, or as many zeros where it ends. Rows are padded to whole vectors in memory.
template <class T>
struct Source {
  const T* at;
  unsigned inside;  // or 0
};

// One operand's part of a step that this thread brings: vectors of 16 bytes, and where they go in its shared
// tile.
template <class Tile, class T, int THREADS>
struct GlobalToShared {
  static constexpr int kCount = Tile::kRows * Tile::kRowVectors / THREADS;
  static constexpr int kRowsApart = THREADS / Tile::kRowVectors;  // of a thread's vectors
  static_assert(kCount * THREADS == Tile::kRows * Tile::kRowVectors && kCount * kRowsApart == Tile::kRows);

  // Of a tile by K, eight neighbouring threads take rows r and r + 4, whose vectors meet in no bank.
  static __device__ __forceinline__ int row() {
    const int lane = threadIdx.x % 32;
    if (Tile::kRowVectors == 4) return threadIdx.x / 32 * 8 + lane / 4 % 2 * 4 + lane / 8;
    return threadIdx.x / Tile::kRowVectors;
  }
  static __device__ __forceinline__ int column() { return threadIdx.x % Tile::kRowVectors * Tile::kVector; }
  static __device__ __forceinline__ T* place(T* tile, int i) {
    return tile + (row() + i * kRowsApart) * Tile::kPitch + column();
  }
};

// Adds `steps` steps of a product to the sums in `mma`. `operands` gives the sources of the present step, by
// vector, and goes on with next(); after end(true) there is nothing to read. Starts with all threads done
// with the shared memory; a barrier must follow before it is used for something else.
template <class Mma, class Operands>
__device__ __forceinline__ void accumulate(Mma& mma, Operands& operands, int steps, unsigned char* smem) {
  using T = typename Mma::T;
  using A = GlobalToShared<typename Mma::A, T, Mma::kThreads>;
  using B = GlobalToShared<typename Mma::B, T, Mma::kThreads>;
  const auto tile_a = [&](int stage) {
    return reinterpret_cast<T*>(smem + stage * (Mma::A::kBytes + Mma::B::kBytes));
  };
  const auto tile_b = [&](int stage) {
    return reinterpret_cast<T*>(smem + stage * (Mma::A::kBytes + Mma::B::kBytes) + Mma::A::kBytes);
  };
  __syncthreads();
#if DSTS_SM80
  constexpr int kStages = stages_of(kCapability, kExact<T>);
  const auto copy = [](T* to, const Source<T>& from) {
    __pipeline_memcpy_async(to, from.at, 16, from.inside ? 0 : 16);
  };
  const auto fetch = [&](int stage) {
#  pragma unroll
    for (int i = 0; i < A::kCount; ++i) copy(A::place(tile_a(stage), i), operands.a(i));
#  pragma unroll
    for (int i = 0; i < B::kCount; ++i) copy(B::place(tile_b(stage), i), operands.b(i));
  };
  const auto go_on = [&](int step) {
    operands.end(step >= steps);
    operands.next();
  };
#  pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) fetch(s), go_on(s + 1);
    __pipeline_commit();
  }
  int now = 0, then = kStages - 1;
  for (int s = 0; s < steps; ++s) {
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();
    if (s + kStages - 1 < steps) fetch(then), go_on(s + kStages);
    __pipeline_commit();
#  pragma unroll 1
    for (int part = 0; part < 2; ++part) mma.multiply(tile_a(now), tile_b(now), part);
    now = now + 1 == kStages ? 0 : now + 1;
    then = then + 1 == kStages ? 0 : then + 1;
  }
  __pipeline_wait_prior(0);
#else
  // The next step's left operand waits in registers during one half, the right one during the other.
  const auto copy = [](const Source<T>& from) {
    return from.inside ? *reinterpret_cast<const uint4*>(from.at) : make_uint4(0, 0, 0, 0);
  };
  uint4 staged_a[A::kCount], staged_b[B::kCount];
  for (int s = -1; s < steps; ++s) {  // -1 fills the first tile
    const bool has_next = s + 1 < steps;
    T *const now_a = tile_a(s & 1), *const now_b = tile_b(s & 1), *const to_a = tile_a((s + 1) & 1),
             *const to_b = tile_b((s + 1) & 1);
    if (has_next)
#  pragma unroll
      for (int i = 0; i < A::kCount; ++i) staged_a[i] = copy(operands.a(i));
    if (s >= 0) mma.multiply(now_a, now_b, 0);
    if (has_next) {
#  pragma unroll
      for (int i = 0; i < A::kCount; ++i) *reinterpret_cast<uint4*>(A::place(to_a, i)) = staged_a[i];
#  pragma unroll
      for (int i = 0; i < B::kCount; ++i) staged_b[i] = copy(operands.b(i));
      operands.end(s + 2 >= steps);
      operands.next();
    }
    if (s >= 0) mma.multiply(now_a, now_b, 1);
    if (has_next)
#  pragma unroll
      for (int i = 0; i < B::kCount; ++i) *reinterpret_cast<uint4*>(B::place(to_b, i)) = staged_b[i];
    __syncthreads();
  }
#endif
}

}  // namespace dsts::cuda

#if DSTS_SM70
#  include "cuda/volta.h"
#else
#  include "cuda/turing.h"
#endif
