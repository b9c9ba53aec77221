// Which instruction set's kernels run: asked of the processor once, overridable for tests and measurements.
// Compiled for the baseline processor, as it runs before anything is known.
#include "cpu/isa.h"

#include <atomic>

namespace dsts::cpu {

namespace {

struct Supported {
  Isa sets[3] = {Isa::portable};
  int count = 1;

  Supported() {
    // F16C is not asked for: every processor with AVX2 and FMA has it, and not every compiler knows its name.
#ifdef DSTS_HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets[count++] = Isa::avx2;
#endif
#ifdef DSTS_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("fma"))
      sets[count++] = Isa::avx512;
#endif
  }
};

const Supported& supported() {
  static const Supported s;
  return s;
}

std::atomic<Isa>& in_use() {
  static std::atomic<Isa> isa{supported().sets[supported().count - 1]};
  return isa;
}

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return "portable";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
  }
  return "";
}

const Isa* supported_isas(int* n) {
  *n = supported().count;
  return supported().sets;
}

Isa isa_in_use() { return in_use().load(std::memory_order_relaxed); }
void set_isa(Isa isa) { in_use().store(isa, std::memory_order_relaxed); }

}  // namespace dsts::cpu
