// The scalar maths of Improved SemHash, one definition for the CPU and CUDA kernels: the saturating
// sigmoid r(q), the hard decision b(q) and the gradient that stands in for both.
//
// Linkage is static on purpose. The CPU kernels are compiled once for every instruction set, and of an
// inline function with external linkage the linker keeps one copy, possibly one built for AVX-512.
#pragma once

#ifndef __CUDACC_RTC__
#  include <math.h>
#endif

#ifdef __CUDACC__
#  define DSTS_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#  define DSTS_HOST_DEVICE static inline
#endif

namespace dsts {

DSTS_HOST_DEVICE float semhash_exp(float x) { return ::expf(x); }
DSTS_HOST_DEVICE double semhash_exp(double x) { return ::exp(x); }

// exp may overflow to infinity for very negative q, and 1 / inf is the 0 that is wanted: no branch needed.
template <class A>
DSTS_HOST_DEVICE A semhash_sigmoid(A q) {
  return A(1) / (A(1) + semhash_exp(-q));
}

// 1.2 * s - 0.1 before it is clamped to [0, 1].
template <class A>
DSTS_HOST_DEVICE A semhash_stretch(A s) {
  return A(1.2) * s - A(0.1);
}

// r(q) = max(0, min(1, 1.2 * sigmoid(q) - 0.1)); NaN stays NaN.
template <class A>
DSTS_HOST_DEVICE A semhash_soft(A q) {
  const A r = semhash_stretch(semhash_sigmoid(q));
  return r < A(0) ? A(0) : (r > A(1) ? A(1) : r);
}

// b(q) = 1 if q > 0 else 0; q == 0 and NaN give 0.
template <class A>
DSTS_HOST_DEVICE A semhash_hard(A q) {
  return q > A(0) ? A(1) : A(0);
}

// dr/dq = 1.2 * s * (1 - s) where 0 < r < 1, else exactly 0. It serves the hard gate too (db/dq := dr/dq).
template <class A>
DSTS_HOST_DEVICE A semhash_slope(A q) {
  const A s = semhash_sigmoid(q);
  const A r = semhash_stretch(s);
  return r > A(0) && r < A(1) ? A(1.2) * s * (A(1) - s) : A(0);
}

}  // namespace dsts
