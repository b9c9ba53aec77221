// The matrix product inside fast convolution, for one Winograd point: C = A * B, or C += A * B. A (rows, K)
// has its rows lda apart; B is [block][k][kBlock], a block being kBlock columns; C (rows, blocks * kBlock)
// has its rows ldc apart. The accumulators of a tile of rows x columns stay in registers over the whole of K,
// so each element of A and B is read once a tile; tile sizes fill the register file of the instruction set
// being compiled.
#pragma once

#include "cpu/transpose.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

constexpr int64_t kBlock = 16;
constexpr int kVectorsABlock = int(kBlock) / kWide;

#if defined(__AVX512F__)
constexpr int kMaxBlocks = 4;  // 24 accumulators, 4 columns of B, 1 broadcast: 32 registers
constexpr int tile_rows(int blocks) { return blocks == 4 ? 6 : blocks == 3 ? 8 : blocks == 2 ? 12 : 14; }
#elif defined(__AVX2__)
constexpr int kMaxBlocks = 1;  // 12 accumulators of 16 registers
constexpr int tile_rows(int) { return 6; }
#elif defined(__aarch64__)
constexpr int kMaxBlocks = 1;  // 24 accumulators, 4 columns of B, 2 of A: 32 registers
constexpr int tile_rows(int) { return 6; }
#else
constexpr int kMaxBlocks = 1;  // 8 accumulators of 16 registers
constexpr int tile_rows(int) { return 2; }
#endif

struct Left {
  const float* data;
  int64_t ld;
};
struct Right {
  const float* data;
  int64_t step, block;  // between rows of B, and between blocks
};
enum class Kind { plain, add, transposed };  // transposed: A in memory, and C is not added to

template <int kRows, int kBlocks, Kind kKind>
void product_tile(Left A, Right B, int64_t K, float* C, int64_t ldc) {
  constexpr int kVectors = kBlocks * kVectorsABlock;
  // What comes from beyond the first-level cache is asked for a tile's time ahead.
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; v += kVectorsABlock) __builtin_prefetch(C + r * ldc + v * kWide, 1);
  Vector sum[kRows][kVectors] = {};
  for (int64_t k0 = 0; k0 < K; k0 += kBlock) {
    for (int r = 0; r < kRows && kKind != Kind::transposed; ++r)
      __builtin_prefetch(A.data + (kRows + r) * A.ld + k0);
    const int64_t end = min64(K, k0 + kBlock);
    for (int64_t k = k0; k < end; ++k) {
      if constexpr (kKind == Kind::transposed) __builtin_prefetch(A.data + (k + 16) * A.ld + kRows);
      Vector b[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v)
        memcpy(&b[v], B.data + v / kVectorsABlock * B.block + k * B.step + v % kVectorsABlock * kWide,
               sizeof b[v]);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const float a = kKind == Kind::transposed ? A.data[k * A.ld + r] : A.data[r * A.ld + k];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) sum[r][v] += a * b[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      float* to = C + r * ldc + v * kWide;
      Vector before;
      if constexpr (kKind == Kind::add) {
        memcpy(&before, to, sizeof before);
        sum[r][v] += before;
      }
      memcpy(to, &sum[r][v], sizeof sum[r][v]);
    }
}

// The last rows, fewer than a tile's.
template <int kRows, int kBlocks, Kind kKind>
void product_rest(int64_t rows, Left A, Right B, int64_t K, float* C, int64_t ldc) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return product_tile<kRows, kBlocks, kKind>(A, B, K, C, ldc);
    product_rest<kRows - 1, kBlocks, kKind>(rows, A, B, K, C, ldc);
  }
}

template <int kBlocks, Kind kKind>
void product_columns(int64_t rows, Left A, Right B, int64_t K, float* C, int64_t ldc) {
  constexpr int kRows = tile_rows(kBlocks);
  const int64_t step = kKind == Kind::transposed ? 1 : A.ld;
  for (; rows >= kRows; rows -= kRows, A.data += kRows * step, C += kRows * ldc)
    product_tile<kRows, kBlocks, kKind>(A, B, K, C, ldc);
  product_rest<kRows - 1, kBlocks, kKind>(rows, A, B, K, C, ldc);
}

template <int kBlocks, Kind kKind>
void product_from(int64_t rows, Left A, Right B, int64_t K, int64_t blocks, float* C, int64_t ldc) {
  for (; blocks >= kBlocks; blocks -= kBlocks, B.data += kBlocks * B.block, C += kBlocks * kBlock)
    product_columns<kBlocks, kKind>(rows, A, B, K, C, ldc);
  if constexpr (kBlocks > 1)
    if (blocks) product_from<kBlocks - 1, kKind>(rows, A, B, K, blocks, C, ldc);
}

template <Kind kKind>
void product(int64_t rows, Left A, Right B, int64_t K, int64_t blocks, float* C, int64_t ldc) {
  product_from<kMaxBlocks, kKind>(rows, A, B, K, blocks, C, ldc);
}

}  // namespace
}  // namespace dsts::cpu::DSTS_ISA
