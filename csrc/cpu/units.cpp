// Matrix units: the bits of CPUID's leaf 7, what the operating system saves at a switch of threads (XCR0), and
// Linux's permission for the 8 KiB of tiles that a thread then has. Compiled for the baseline processor.
#include "cpu/units.h"

#if defined(__x86_64__) && defined(__linux__)
#  include <cpuid.h>
#  include <errno.h>
#  include <sys/syscall.h>
#  include <unistd.h>
#endif

namespace dsts::cpu {

namespace {

#if defined(__x86_64__) && defined(__linux__)

constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM of arch_prctl(2)
constexpr long kTileData = 18;               // the number of its state component
constexpr unsigned kTileStates = 3u << 17;   // in XCR0: tile configuration and tile data
constexpr unsigned kVectorStates = 0xE6;     // SSE, AVX, and the three of AVX-512

bool bit(unsigned value, int index) { return (value >> index & 1) != 0; }

// What the operating system saves, of the first 32 components; 0 where it says nothing.
unsigned saved_states() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return 0;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

Units ask() {
  Units units;
  unsigned a, b, c, d, a1 = 0, ignored;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return units;
  if (a >= 1) __get_cpuid_count(7, 1, &a1, &ignored, &ignored, &ignored);
  const unsigned saved = saved_states();
  if ((saved & kVectorStates) == kVectorStates && bit(b, 16)) {  // AVX512F
    units.avx512_bf16 = bit(a1, 5);
    units.avx512_vnni = bit(c, 11);
  }
  if ((saved & kTileStates) == kTileStates && bit(d, 24)) {  // AMX-TILE
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) {
      units.refused = errno;
      return units;
    }
    units.amx_bf16 = bit(d, 22);
    units.amx_int8 = bit(d, 25);
    units.amx_fp16 = bit(a1, 21);
  }
  return units;
}

#else

Units ask() { return {}; }

#endif

}  // namespace

const Units& units() {
  static const Units found = ask();
  return found;
}

}  // namespace dsts::cpu
