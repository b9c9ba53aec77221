// Stands in for the PTX instructions that csrc/cuda/matrix.h uses. Loads are each lane's own accesses, after
// all lanes have said where their rows lie; products are the runtime's.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_pipeline.h"

#if __CUDA_ARCH__ >= 750

namespace emulator {

// ldmatrix.x4, with .trans where `turned`.
inline void load_matrices(unsigned (&to)[4], const unsigned char* row, bool turned,
                          Place place = Place::here(__builtin_FILE(), __builtin_LINE())) {
  const unsigned char* from[4][2];
  meet_at_rows("ldmatrix", row, turned, from, place);
  for (int i = 0; i < 4; ++i) {
    if (turned) {
      uint16_t halves[2];
      for (int k = 0; k < 2; ++k) __builtin_memcpy(halves + k, from[i][k] + lane() / 4 * 2, 2);
      __builtin_memcpy(to + i, halves, 4);
    } else {
      __builtin_memcpy(to + i, from[i][0] + lane() % 4 * 4, 4);
    }
  }
}

template <class E, class Tf32>
constexpr Operand operand_of() {
  return __is_same(E, __half) ? Operand::kHalf : __is_same(E, Tf32) ? Operand::kTf32 : Operand::kBFloat16;
}

// cvt.rna.tf32.f32: to nearest, ties away from zero.
inline unsigned rounded_to_tf32(unsigned bits) {
  return (bits & 0x7F800000u) == 0x7F800000u ? bits : (bits + 0x1000u) & 0xFFFFE000u;
}

}  // namespace emulator

#endif
