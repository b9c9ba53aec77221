// Products of halves on sm_70: `VoltaMma`, a TileMma (product.h) by mma.sync.m8n8k4, whose layout is
// documented (PTX ISA, "Matrix Fragments for mma.m8n8k4"), and its main loop.
//
// The instruction takes four products of 8 by 8 by 4 at once, one for each *quad pair*: lanes 4 q to 4 q + 3
// and the four that are 16 further. A warp has 64 by 64, in 4 by 4 squares of 16 by 16; in each square quad
// pair q takes one half of the rows (q % 2) by one half of the columns (q / 2). Which rows make a half is
// ours to choose: those that let lanes which load together meet every bank of shared memory once.
//
// A step of 32 of K is eight slabs of 4. While one slab is multiplied, the next one's fragments come from
// shared memory, and the next step's operands from global memory: the left one waits in registers during
// three slabs, the right one, in the same registers, during four. One barrier a step, before its last slab.
#pragma once

#include "cuda/product.h"

namespace dsts::cuda {

// c += a b for the whole warp; each lane gives 4 elements of both operands.
template <bool A_BY_K, bool B_BY_K>
__device__ __forceinline__ void multiply_quads(float (&c)[8], const uint2& a, const uint2& b) {
#ifdef DSTS_NO_PTX
  ::emulator::multiply_quads(A_BY_K, B_BY_K, c, &a, &b);
#else
#  define DSTS_MULTIPLY(layouts)                                                                       \
    asm volatile("mma.sync.aligned.m8n8k4." layouts                                                    \
                 ".f32.f16.f16.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9}, {%10, %11}, "           \
                 "{%0, %1, %2, %3, %4, %5, %6, %7};"                                                   \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), \
                   "+f"(c[7])                                                                          \
                 : "r"(a.x), "r"(a.y), "r"(b.x), "r"(b.y))
  if constexpr (A_BY_K && B_BY_K)
    DSTS_MULTIPLY("row.col");
  else if constexpr (A_BY_K)
    DSTS_MULTIPLY("row.row");
  else if constexpr (B_BY_K)
    DSTS_MULTIPLY("col.col");
  else
    DSTS_MULTIPLY("col.row");
#  undef DSTS_MULTIPLY
#endif
}

// Keeps the assembler from moving what stands behind before what stands in front. Lanes need not meet here,
// so tests that leave barriers out do not count it as one.
__device__ __forceinline__ void keep_order() {
#ifndef DSTS_NO_PTX
  __syncwarp();
#endif
}

// How quad pairs read one operand of a warp, 64 rows of the left or columns of the right one, from its shared
// tile. `half`: the half of a square that this lane's quad pair takes.
template <bool BY_K>
struct QuadOperand {
  using Tile = SharedTile<__half, BY_K>;

  // By K a lane reads 4 of K of its own row, and the 16 lanes of one pass read 8 rows. By column it reads 8
  // neighbouring columns of its own K, for two squares at once.
  static __device__ __forceinline__ const unsigned char* of_lane(const unsigned char* tile, int first,
                                                                 int half) {
    const int lane = threadIdx.x % 32;
    const int at = BY_K ? Tile::at(place(0, half, lane / 16, lane % 4), 0)
                        : Tile::at(place(0, half, lane / 16, 0), lane % 4);
    return tile + (Tile::at(first, 0) + at) * static_cast<int>(sizeof(__half));
  }

  static __device__ __forceinline__ void load(uint2 (&squares)[4], const unsigned char* from, int slab) {
    if constexpr (BY_K) {
#pragma unroll
      for (int q = 0; q < 4; ++q)
        squares[q] = *reinterpret_cast<const uint2*>(from + 2 * Tile::at(16 * q, 4 * slab));
    } else {
#pragma unroll
      for (int q = 0; q < 4; q += 2) {
        const uint4 both = *reinterpret_cast<const uint4*>(from + 2 * Tile::at(16 * q, 4 * slab));
        squares[q] = make_uint2(both.x, both.y), squares[q + 1] = make_uint2(both.z, both.w);
      }
    }
  }

  // Row or column, of the warp's 64, of what a half's product has at `within` (0 to 3) of its lower or upper
  // four.
  static __device__ __forceinline__ int place(int square, int half, int upper, int within) {
    if (BY_K) return 16 * square + 8 * upper + 4 * half + within;
    return 32 * (square / 2) + 16 * upper + 8 * half + 4 * (square % 2) + within;
  }
};

template <bool A_BY_K, bool B_BY_K>
class VoltaMma {
 public:
  using T = __half;
  using A = SharedTile<T, A_BY_K>;
  using B = SharedTile<T, B_BY_K>;
  static constexpr int kThreads = MmaTraits<T>::kThreads;
  static constexpr int kSlabs = A::kDepth / 4;  // of a step
  static_assert(kThreads / 32 * 64 * 64 == kTile * kTile, "a warp has 64 by 64");
  static_assert(kEpilogueParts == 2, "a part of the epilogue is what a warp has of the columns");

  struct Fragments {
    uint2 a[4], b[4];
  };

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 8; ++e) sum_[i][j][e] = 0;
  }

  // Neighbouring products have the left or the right operand in common, whose registers are read once.
  __device__ __forceinline__ void multiply(const Fragments& of) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int i = j % 2 ? 3 - n : n;
        multiply_quads<A_BY_K, B_BY_K>(sum_[i][j], of.a[i], of.b[j]);
      }
  }

  // Columns 64 * half and on, into staging [128][kEpiloguePitch].
  __device__ __forceinline__ void store(float* staging, int half) const {
    if (static_cast<int>(threadIdx.x / 32 % 2) != half) return;
    const int lane = threadIdx.x % 32, m0 = threadIdx.x / 64 * 64;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
          const int row = QuadOperand<A_BY_K>::place(i, lane / 4 % 2, lane / 16, (lane & 1) + (e & 2));
          const int column = QuadOperand<B_BY_K>::place(j, lane / 8 % 2, e / 4, lane & 2);
          *reinterpret_cast<float2*>(staging + (m0 + row) * kEpiloguePitch + column) =
              make_float2(sum_[i][j][e], sum_[i][j][e + 1]);
        }
  }

 private:
  float sum_[4][4][8];
};

// As in product.h. Operands also know end(true): from then on there is nothing to read.
template <bool A_BY_K, bool B_BY_K, class Operands>
__device__ __forceinline__ void accumulate(VoltaMma<A_BY_K, B_BY_K>& mma, Operands& operands, int steps,
                                           unsigned char* smem) {
  using Mma = VoltaMma<A_BY_K, B_BY_K>;
  using T = typename Mma::T;
  using A = GlobalToShared<typename Mma::A, T, Mma::kThreads>;
  using B = GlobalToShared<typename Mma::B, T, Mma::kThreads>;
  constexpr int kLeft = Mma::A::kBytes, kStage = kLeft + Mma::B::kBytes, kSlabs = Mma::kSlabs;
  static_assert(A::kCount == B::kCount, "operands take turns in the same registers");
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned char* from_a = QuadOperand<A_BY_K>::of_lane(smem, warp / 2 * 64, lane / 4 % 2);
  const unsigned char* from_b = QuadOperand<B_BY_K>::of_lane(smem + kLeft, warp % 2 * 64, lane / 8 % 2);
  unsigned char* to = smem;
  int other = kStage;  // how far the other stage is

  uint4 staged[A::kCount];
  const auto read = [](const Source<T>& from) {
    return from.inside ? *reinterpret_cast<const uint4*>(from.at) : make_uint4(0, 0, 0, 0);
  };
  const auto read_a = [&] {
#pragma unroll
    for (int i = 0; i < A::kCount; ++i) staged[i] = read(operands.a(i));
  };
  const auto read_b = [&] {
#pragma unroll
    for (int i = 0; i < B::kCount; ++i) staged[i] = read(operands.b(i));
  };
  const auto write_a = [&] {
#pragma unroll
    for (int i = 0; i < A::kCount; ++i)
      *reinterpret_cast<uint4*>(A::place(reinterpret_cast<T*>(to), i)) = staged[i];
  };
  const auto write_b = [&] {
#pragma unroll
    for (int i = 0; i < B::kCount; ++i)
      *reinterpret_cast<uint4*>(B::place(reinterpret_cast<T*>(to + kLeft), i)) = staged[i];
  };
  typename Mma::Fragments fragments[2];
  const auto load = [&](int slab) {
    QuadOperand<A_BY_K>::load(fragments[slab % 2].a, from_a, slab);
    QuadOperand<B_BY_K>::load(fragments[slab % 2].b, from_b, slab);
  };

  __syncthreads();
  operands.end(steps <= 0);
  read_a(), write_a(), read_b(), write_b();
  __syncthreads();
  to += other;
  load(0);
  operands.end(steps <= 1);
  operands.next();
#pragma unroll 1
  for (int left = steps; left > 0; --left) {
    read_a();
#pragma unroll
    for (int slab = 0; slab < kSlabs - 1; ++slab) {
      load(slab + 1);
      mma.multiply(fragments[slab % 2]);
      keep_order();
      if (slab != 2) continue;
      write_a();
      keep_order();
      read_b();
    }
    write_b();
    __syncthreads();
    from_a += other, from_b += other, to -= other, other = -other;
    load(0);
    operands.end(left <= 2);
    operands.next();
    mma.multiply(fragments[(kSlabs - 1) % 2]);
  }
}

}  // namespace dsts::cuda
