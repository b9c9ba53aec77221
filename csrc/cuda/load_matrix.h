// Loads an operand's fragment from shared memory. nvcc sees that float16 fragments come from there, but loads
// bfloat16 and TF32 ones word by word through generic addresses, so for these it is said in PTX.
#pragma once

#include <mma.h>

#include "cuda/device.h"

namespace dsts::cuda {

template <class Fragment, class T>
__device__ __forceinline__ void load_matrix(Fragment& to, const T* from, int pitch) {
  nvcuda::wmma::load_matrix_sync(to, from, pitch);
}

// Tests run kernels on the CPU, which has no PTX, and leave this out.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && !defined(DSTS_NO_PTX)
#  define DSTS_LOAD_MATRIX(use, letter, layout, order, k, operand, type, T)                      \
    __device__ __forceinline__ void load_matrix(                                                 \
        nvcuda::wmma::fragment<nvcuda::wmma::use, 16, 16, k, operand, nvcuda::wmma::layout>& to, \
        const T* from, int pitch) {                                                              \
      static_assert(sizeof(to.x) == 16, "four registers");                                       \
      int* x = reinterpret_cast<int*>(to.x);                                                     \
      asm volatile("wmma.load." letter ".sync.aligned." order ".m16n16k" #k ".shared." type      \
                   " {%0, %1, %2, %3}, [%4], %5;"                                                \
                   : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])                              \
                   : "l"(__cvta_generic_to_shared(from)), "r"(pitch)                             \
                   : "memory");                                                                  \
    }
#  define DSTS_LOAD_MATRICES(k, operand, type, T)                          \
    DSTS_LOAD_MATRIX(matrix_a, "a", row_major, "row", k, operand, type, T) \
    DSTS_LOAD_MATRIX(matrix_a, "a", col_major, "col", k, operand, type, T) \
    DSTS_LOAD_MATRIX(matrix_b, "b", row_major, "row", k, operand, type, T) \
    DSTS_LOAD_MATRIX(matrix_b, "b", col_major, "col", k, operand, type, T)
DSTS_LOAD_MATRICES(16, __nv_bfloat16, "bf16", __nv_bfloat16)
DSTS_LOAD_MATRICES(8, nvcuda::wmma::precision::tf32, "tf32", float)
#  undef DSTS_LOAD_MATRICES
#  undef DSTS_LOAD_MATRIX
#endif

}  // namespace dsts::cuda
