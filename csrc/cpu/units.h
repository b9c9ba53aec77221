// What multiplies half types in this processor, as far as the operating system lets a program use it.
#pragma once

namespace dsts::cpu {

struct Units {
  bool amx_bf16 = false, amx_fp16 = false, amx_int8 = false;  // tiles, which Linux must grant
  bool avx512_bf16 = false, avx512_vnni = false;
  int refused = 0;  // errno of the request for tiles; 0 where they were granted, or nobody has any
};

// Asked of the processor, and of Linux for the permission to use tiles, at the first call; the same ever after.
// Threads and forked processes inherit the permission.
const Units& units();

}  // namespace dsts::cpu
