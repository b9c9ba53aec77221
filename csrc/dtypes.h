// The dtypes that kernels take, once: name (as Python has it), constant, code, bytes, and element type of the
// CPU kernels. To add one: a line here, its element type with `load` and `store` in cpu/scalar.h, and a line
// in backends/base.py.
#pragma once

// X(name, constant, code, bytes, element type)
#define DSTS_DTYPES(X)               \
  X(float32, kFloat32, 0, 4, float)  \
  X(float64, kFloat64, 1, 8, double) \
  X(bfloat16, kBFloat16, 2, 2, bf16) \
  X(float16, kFloat16, 3, 2, f16)

namespace dsts {

#define DSTS_CODE(name, constant, code, bytes, type) constant = code,
enum DType : int { DSTS_DTYPES(DSTS_CODE) };
#undef DSTS_CODE

struct DTypeFacts {
  const char* name;
  DType dtype;
  int bytes;
};

#define DSTS_FACTS(name, constant, code, bytes, type) {#name, constant, bytes},
constexpr DTypeFacts kDTypes[] = {DSTS_DTYPES(DSTS_FACTS)};
#undef DSTS_FACTS

}  // namespace dsts
