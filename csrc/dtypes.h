// The dtypes that kernels take, once: name (as Python has it), constant, code, element type of the CPU
// kernels. To add one: a line here, its element type with `load` and `store` in cpu/scalar.h, and a line in
// backends/base.py.
#pragma once

// X(name, constant, code, element type)
#define DSTS_DTYPES(X)            \
  X(float32, kFloat32, 0, float)  \
  X(float64, kFloat64, 1, double) \
  X(bfloat16, kBFloat16, 2, bf16) \
  X(float16, kFloat16, 3, f16)

namespace dsts {

#define DSTS_CODE(name, constant, code, type) constant = code,
enum DType : int { DSTS_DTYPES(DSTS_CODE) };
#undef DSTS_CODE

struct NamedDType {
  const char* name;
  DType dtype;
};

#define DSTS_NAME(name, constant, code, type) {#name, constant},
constexpr NamedDType kDTypes[] = {DSTS_DTYPES(DSTS_NAME)};
#undef DSTS_NAME

}  // namespace dsts
