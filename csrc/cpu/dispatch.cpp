// Which instruction set's kernels run: asked of the processor once, overridable for tests and measurements.
// Compiled for the baseline processor, as it runs before anything is known.
#include <atomic>

#include "cpu/kernels.h"

namespace dsts::cpu {

namespace portable {
extern const Kernels table;
}
#ifdef DSTS_HAVE_AVX2
namespace avx2 {
extern const Kernels table;
}
#endif
#ifdef DSTS_HAVE_AVX512
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

struct Supported {
  const Kernels* tables[3];
  int count = 0;

  Supported() {
    tables[count++] = &portable::table;
    // F16C is not asked for: every processor with AVX2 and FMA has it, and not every compiler knows its name.
#ifdef DSTS_HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables[count++] = &avx2::table;
#endif
#ifdef DSTS_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("fma"))
      tables[count++] = &avx512::table;
#endif
  }
};

const Supported& supported() {
  static const Supported s;
  return s;
}

std::atomic<const Kernels*> active{nullptr};

}  // namespace

const Kernels* const* supported_kernels(int* n) {
  *n = supported().count;
  return supported().tables;
}

const Kernels& kernels() {
  const Kernels* table = active.load(std::memory_order_acquire);
  return table ? *table : *supported().tables[supported().count - 1];
}

void set_kernels(const Kernels* table) { active.store(table, std::memory_order_release); }

}  // namespace dsts::cpu
