// The dtypes of features: `X(code, name, element)`. From this table come the instances of kernels, which of
// them a launcher takes, and what the bindings refuse. A dtype more also needs to_float and from_float
// (device.h) and MmaTraits (product.h).
#pragma once

namespace dsts::cuda {

constexpr int kFloat32 = 0, kBFloat16 = 2, kFloat16 = 3;  // those of the CPU kernels, and of Python

}  // namespace dsts::cuda

#define DSTS_HALF_DTYPES(X)               \
  X(kBFloat16, "bfloat16", __nv_bfloat16) \
  X(kFloat16, "float16", __half)
#define DSTS_DTYPES(X) X(kFloat32, "float32", float) DSTS_HALF_DTYPES(X)

// Kernels that multiply have one instance more: float32 in tensor cores.
#define DSTS_MMA_DTYPES(X) DSTS_DTYPES(X) X(kFloat32, "tf32", Tf32)
