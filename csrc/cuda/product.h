// A tile of a matrix product, 128 by 128 floats in the registers of one block: how its operands come through
// shared memory, and who multiplies them.
//
// Engines: `Turing` (turing.h) in tensor cores from sm_75 on (half, bfloat16, TF32; 4 warps of 64 by 64),
// `Wmma` in those of sm_70 (half), `Simt` in full float32 (256 threads of 8 by 8). A step brings some bytes
// of K of both operands, each as a shared tile that lies either by K ([128][K], K contiguous) or by column
// ([K][128]). Up to sm_75 the next step waits in registers while this one is multiplied (two tiles take
// turns); from sm_80 on cp.async keeps several on their way.
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

// Who multiplies elements E: `Element` in memory, threads of a block, blocks that a multiprocessor holds.
template <class E>
struct Multiplier;
template <class E, bool SUPPORTED>
struct HalfMultiplier {
  using Element = E;
  static constexpr int kThreads = 128, kResident = 2;
  static constexpr bool kSupported = SUPPORTED;
};
template <>
struct Multiplier<__half> : HalfMultiplier<__half, true> {};
template <>
struct Multiplier<__nv_bfloat16> : HalfMultiplier<__nv_bfloat16, DSTS_SM80 != 0> {};
template <>
struct Multiplier<Tf32> {
  using Element = float;
  static constexpr int kThreads = 128, kResident = 2;
  static constexpr bool kSupported = DSTS_SM80;
};
template <>
struct Multiplier<float> {
  using Element = float;
  static constexpr int kThreads = 256, kResident = 1;
  static constexpr bool kSupported = true;
};

// What depends on the chip, by compute capability times ten: launchers need it too. kCapability is of the
// first chip that has what this code uses.
constexpr int kCapability = DSTS_SM80 ? 80 : DSTS_SM70 ? 70 : 75;

// Stages of the pipeline.
template <class E>
__host__ __device__ constexpr int stages_of(int capability) {
  return capability < 80 ? 2 : kSame<E, float> ? 3 : 4;
}

// Bytes of K that `Turing` takes at a time.
__host__ __device__ constexpr int step_bytes(int capability) { return capability < 80 ? 32 : 64; }

// Where an operand lies in shared memory for `Wmma` and `Simt`. Rows are padded by 16 bytes, so that eight of
// them touch every bank once; on sm_70, whose fragments are read 8 bytes at a time, by 32 where rows are K.
template <class T, bool BY_K>
struct SharedTile {
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kDepth = 64 / sizeof(T);
  static constexpr int kRows = BY_K ? kTile : kDepth;
  static constexpr int kColumns = BY_K ? kDepth : kTile;
  static constexpr int kPitch = kColumns + (BY_K || !DSTS_SM70 ? 1 : 2) * kVector;
  static constexpr int kBytes = kRows * (kColumns + (BY_K ? 1 : 2) * kVector) * static_cast<int>(sizeof(T));
  static constexpr int kRowVectors = kColumns / kVector;  // 16-byte vectors of a row
  static __device__ __forceinline__ int at(int mn, int k) { return BY_K ? mn * kPitch + k : k * kPitch + mn; }
};

// Epilogues take a finished tile in parts: some of its columns as floats, and room behind for sums of
// columns. On sm_75 two blocks have 64 KiB, so parts are half as wide.
__host__ __device__ constexpr int chunk_columns(int capability) {
  return capability >= 75 && capability < 80 ? kTile / 4 : kTile / 2;
}
__host__ __device__ constexpr int chunk_bytes(int capability) {
  return kTile * (chunk_columns(capability) + 4) * static_cast<int>(sizeof(float));
}
constexpr int kChunkColumns = chunk_columns(kCapability);
constexpr int kChunkPitch = kChunkColumns + 4;
constexpr int kChunkBytes = chunk_bytes(kCapability);
constexpr int kParts = kTile / kChunkColumns;
constexpr int kSumGroups = kTile / kChunkColumns;  // of rows: kTile threads add columns up
constexpr int kSumRows = kTile / kSumGroups;
constexpr int kSumsBytes = kTile * 9 * static_cast<int>(sizeof(float));

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
  static constexpr int kThreads = Multiplier<E>::kThreads;

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

  // Columns 64 * half and on, into chunk [128][kChunkPitch].
  __device__ __forceinline__ void store(float* chunk, int half) const {
    const int m0 = threadIdx.x / 64 * 64;
    if (static_cast<int>(threadIdx.x / 32 % 2) != half) return;
#  pragma unroll
    for (int i = 0; i < 4; ++i)
#  pragma unroll
      for (int j = 0; j < 4; ++j)
        nvcuda::wmma::store_matrix_sync(chunk + (m0 + 16 * i) * kChunkPitch + 16 * j, sum_[i][j], kChunkPitch,
                                        nvcuda::wmma::mem_row_major);
  }

 private:
  static constexpr int kK = 16;

  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, kK, float> sum_[4][4];
};
#endif

template <bool A_BY_K, bool B_BY_K>
class Simt {
 public:
  using T = float;
  using A = SharedTile<T, A_BY_K>;
  using B = SharedTile<T, B_BY_K>;
  static constexpr int kThreads = Multiplier<float>::kThreads;

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

  __device__ __forceinline__ void store(float* chunk, int part) const {
    constexpr int kEach = kChunkColumns / 16;
    const int m0 = threadIdx.x / 16 * 8, n0 = threadIdx.x % 16;
#pragma unroll
    for (int own = 0; own < kParts; ++own) {
      if (own != part) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j)
          chunk[(m0 + i) * kChunkPitch + n0 + 16 * j] = sum_[i][own * kEach + j];
    }
  }

 private:
  float sum_[8][8];
};

// Other headers say more of these.
template <class E, bool A_BY_K, bool B_BY_K>
struct EngineOf {
#if DSTS_SM70
  using Type = Wmma<E, A_BY_K, B_BY_K>;
#endif
};
template <bool A_BY_K, bool B_BY_K>
struct EngineOf<float, A_BY_K, B_BY_K> {
  using Type = Simt<A_BY_K, B_BY_K>;
};
template <class E, bool A_BY_K, bool B_BY_K>
using Engine = typename EngineOf<E, A_BY_K, B_BY_K>::Type;

// Shared bytes of operands or, afterwards, of a chunk: the same memory.
template <class E, bool A_BY_K, bool B_BY_K>
__host__ __device__ constexpr int product_bytes(int capability) {
  using T = typename Multiplier<E>::Element;
  const bool padded = capability < 75 || kSame<E, float>;
  const int step = padded ? SharedTile<T, A_BY_K>::kBytes + SharedTile<T, B_BY_K>::kBytes
                          : 2 * kTile * step_bytes(capability);
  const int operands = stages_of<E>(capability) * step, chunk = chunk_bytes(capability) + kSumsBytes;
  return operands > chunk ? operands : chunk;
}

// 16 bytes of an operand, or as many zeros where it ends. Rows are padded to whole vectors in memory.
template <class T>
struct Source {
  const T* at;
  unsigned inside;  // or 0
};

// One operand's share of a step for this thread: vectors of 16 bytes, and where they go in its shared tile.
template <class Tile, class T, int THREADS>
struct Copies {
  static constexpr int kCount = Tile::kRows * Tile::kRowVectors / THREADS;
  static constexpr int kRowsApart = THREADS / Tile::kRowVectors;  // of a thread's vectors

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

// Adds `steps` steps of a product to what `engine` holds. `operands` gives the sources of the present step,
// by vector, and moves on with next(); after end(true) there is nothing to read. Starts with all threads done
// with the shared memory; a barrier must follow before it is used for something else.
template <class Engine, class Operands>
__device__ __forceinline__ void accumulate(Engine& engine, Operands& operands, int steps,
                                           unsigned char* shared) {
  using T = typename Engine::T;
  using A = Copies<typename Engine::A, T, Engine::kThreads>;
  using B = Copies<typename Engine::B, T, Engine::kThreads>;
  const auto tile_a = [&](int stage) {
    return reinterpret_cast<T*>(shared + stage * (Engine::A::kBytes + Engine::B::kBytes));
  };
  const auto tile_b = [&](int stage) {
    return reinterpret_cast<T*>(shared + stage * (Engine::A::kBytes + Engine::B::kBytes) + Engine::A::kBytes);
  };
  __syncthreads();
#if DSTS_SM80
  constexpr int kStages = stages_of<T>(80);
  const auto copy = [](T* to, const Source<T>& from) {
    __pipeline_memcpy_async(to, from.at, 16, from.inside ? 0 : 16);
  };
  const auto fetch = [&](int stage) {
#  pragma unroll
    for (int i = 0; i < A::kCount; ++i) copy(A::place(tile_a(stage), i), operands.a(i));
#  pragma unroll
    for (int i = 0; i < B::kCount; ++i) copy(B::place(tile_b(stage), i), operands.b(i));
  };
  const auto move = [&](int step) {
    operands.end(step >= steps);
    operands.next();
  };
#  pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) fetch(s), move(s + 1);
    __pipeline_commit();
  }
  int now = 0, then = kStages - 1;
  for (int s = 0; s < steps; ++s) {
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();
    if (s + kStages - 1 < steps) fetch(then), move(s + kStages);
    __pipeline_commit();
#  pragma unroll 1
    for (int part = 0; part < 2; ++part) engine.multiply(tile_a(now), tile_b(now), part);
    now = now + 1 == kStages ? 0 : now + 1;
    then = then + 1 == kStages ? 0 : then + 1;
  }
  __pipeline_wait_prior(0);
#else
  // The next step's left operand waits in registers during one half, the right one during the other.
  const auto copy = [](const Source<T>& from) {
    return from.inside ? *reinterpret_cast<const uint4*>(from.at) : make_uint4(0, 0, 0, 0);
  };
  uint4 held_a[A::kCount], held_b[B::kCount];
  for (int s = -1; s < steps; ++s) {  // -1 fills the first tile
    const bool more = s + 1 < steps;
    T *const now_a = tile_a(s & 1), *const now_b = tile_b(s & 1), *const to_a = tile_a((s + 1) & 1),
             *const to_b = tile_b((s + 1) & 1);
    if (more)
#  pragma unroll
      for (int i = 0; i < A::kCount; ++i) held_a[i] = copy(operands.a(i));
    if (s >= 0) engine.multiply(now_a, now_b, 0);
    if (more) {
#  pragma unroll
      for (int i = 0; i < A::kCount; ++i) *reinterpret_cast<uint4*>(A::place(to_a, i)) = held_a[i];
#  pragma unroll
      for (int i = 0; i < B::kCount; ++i) held_b[i] = copy(operands.b(i));
      operands.end(s + 2 >= steps);
      operands.next();
    }
    if (s >= 0) engine.multiply(now_a, now_b, 1);
    if (more)
#  pragma unroll
      for (int i = 0; i < B::kCount; ++i) *reinterpret_cast<uint4*>(B::place(to_b, i)) = held_b[i];
    __syncthreads();
  }
#endif
}

}  // namespace dsts::cuda

#if !DSTS_SM70
#  include "cuda/turing.h"
#endif
