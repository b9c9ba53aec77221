// How a kernel is declared: DSTS_KERNEL(name, Arguments) beside its arguments. Its .cpp is compiled once for
// every instruction set, into a namespace of its own; to everyone else `name` is the kernel of the set in use.
#pragma once

#include "cpu/common.h"

namespace dsts::cpu {

enum class Isa { portable, avx2, avx512 };
const char* name_of(Isa isa);

// Sets that this build holds and this machine can run, the best last; count of them in *n.
const Isa* supported_isas(int* n);

// The set in use: the best, until one is set.
Isa isa_in_use();
void set_isa(Isa isa);

#ifdef DSTS_HAVE_AVX2
#  define DSTS_IF_AVX2(...) __VA_ARGS__
#else
#  define DSTS_IF_AVX2(...)
#endif
#ifdef DSTS_HAVE_AVX512
#  define DSTS_IF_AVX512(...) __VA_ARGS__
#else
#  define DSTS_IF_AVX512(...)
#endif

#ifdef DSTS_ISA
#  define DSTS_KERNEL(name, Arguments) \
    namespace DSTS_ISA {               \
    Status name(const Arguments& a);   \
    }
#else
#  define DSTS_KERNEL(name, Arguments)                                    \
    namespace portable {                                                  \
    Status name(const Arguments& a);                                      \
    }                                                                     \
    DSTS_IF_AVX2(namespace avx2 { Status name(const Arguments& a); })     \
    DSTS_IF_AVX512(namespace avx512 { Status name(const Arguments& a); }) \
    inline Status name(const Arguments& a) {                              \
      [[maybe_unused]] const Isa isa = isa_in_use();                      \
      DSTS_IF_AVX512(if (isa == Isa::avx512) return avx512::name(a);)     \
      DSTS_IF_AVX2(if (isa == Isa::avx2) return avx2::name(a);)           \
      return portable::name(a);                                           \
    }
#endif

}  // namespace dsts::cpu
