// Instructions of a warp for matrix products, from sm_75 on: fragments from shared memory (ldmatrix),
// products (mma.sync), and copies that do not wait (cp.async, from sm_80 on). Fragments lie in lanes as the
// PTX ISA says of them, here with g = lane / 4 and t = lane % 4. Tests run kernels on the CPU, where the
// emulator's functions of the same names check and do the same.
#pragma once

#include "cuda/device.h"

#ifdef DSTS_NO_PTX
#  include <cuda_ptx.h>
#endif

namespace dsts::cuda {

struct Tf32;

// Four matrices of 8 rows of 16 bytes: lane 8 i + r says where row r of matrix i lies. Register i of a lane
// gets four bytes of matrix i: word t of row g or, of 16-bit elements and turned round, element g of rows 2 t
// and 2 t + 1.
template <bool TURNED>
__device__ __forceinline__ void load_matrices(unsigned (&to)[4], const unsigned char* row) {
#ifdef DSTS_NO_PTX
  ::emulator::load_matrices(to, row, TURNED);
#else
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (TURNED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
#endif
}

// c += a b: 16 rows by 8 columns over 32 bytes of K. A lane's registers of `a` are of rows g, g + 8, g, g +
// 8, the first two of the lower 16 bytes of K; those of `b`, of column g, of the lower and the upper; in
// each, four bytes of K from 4 t on. Of `c` it has columns 2 t and 2 t + 1 of row g, then of row g + 8.
template <class E>
__device__ __forceinline__ void multiply_add(float (&c)[4], const unsigned (&a)[4], const unsigned* b) {
  static_assert(kSame<E, __half> || kSame<E, __nv_bfloat16> || kSame<E, Tf32>, "E has no instruction here");
#ifdef DSTS_NO_PTX
#  if __CUDA_ARCH__ >= 800
  ::emulator::multiply_add(::emulator::operand_of<E, Tf32>(), 32, c, a, b);
#  else
  ::emulator::multiply_add(::emulator::Operand::kHalf, 16, c, a, b);
  ::emulator::multiply_add(::emulator::Operand::kHalf, 16, c, a + 2, b + 1);
#  endif
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#  define DSTS_MULTIPLY_ADD(shape, type)                                 \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type \
                 ".f32 {%0, %1, %2, %3}, "                               \
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"         \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (kSame<E, __half>)
    DSTS_MULTIPLY_ADD("m16n8k16", "f16");
  else if constexpr (kSame<E, __nv_bfloat16>)
    DSTS_MULTIPLY_ADD("m16n8k16", "bf16");
  else
    DSTS_MULTIPLY_ADD("m16n8k8", "tf32");
#  undef DSTS_MULTIPLY_ADD
#else  // sm_75 takes 16 bytes of K at a time
#  define DSTS_MULTIPLY_ADD(a0, a1, b0)                                                                    \
    asm volatile(                                                                                          \
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, " \
        "%3};"                                                                                             \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                   \
        : "r"(a0), "r"(a1), "r"(b0))
  DSTS_MULTIPLY_ADD(a[0], a[1], b[0]);
  DSTS_MULTIPLY_ADD(a[2], a[3], b[1]);
#  undef DSTS_MULTIPLY_ADD
#endif
}

// Float32 bits as a tensor core takes them, rounded to nearest.
__device__ __forceinline__ unsigned rounded_to_tf32(unsigned bits) {
#ifdef DSTS_NO_PTX
  return ::emulator::rounded_to_tf32(bits);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  unsigned rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
#else
  return bits;
#endif
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
// 16 bytes to shared memory, or as many zeros where `inside` is 0; they arrive at some time before
// wait_for_copies returns.
__device__ __forceinline__ void start_copy(unsigned char* to, const void* from, unsigned inside) {
#  ifdef DSTS_NO_PTX
  __pipeline_memcpy_async(to, from, 16, inside ? 0 : 16);
#  else
  asm volatile(
      "{\n"
      ".reg .pred outside;\n"
      "setp.eq.u32 outside, %2, 0;\n"
      "cp.async.cg.shared.global [%0], [%1], 16, outside;\n"
      "}" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
      "l"(__cvta_generic_to_global(from)), "r"(inside)
      : "memory");
#  endif
}

// Ends a group of copies.
__device__ __forceinline__ void group_copies() {
#  ifdef DSTS_NO_PTX
  __pipeline_commit();
#  else
  asm volatile("cp.async.commit_group;" ::: "memory");
#  endif
}

// Waits for this thread's copies, but for the last GROUPS groups; a barrier makes them seen by all.
template <int GROUPS>
__device__ __forceinline__ void wait_for_copies() {
#  ifdef DSTS_NO_PTX
  __pipeline_wait_prior(GROUPS);
#  else
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#  endif
}
#endif

}  // namespace dsts::cuda
