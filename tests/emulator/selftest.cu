// Small kernels that use every part of the emulator, right and wrong.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_ptx.h>
#include <cuda_runtime.h>
#include <mma.h>

#include "selftest.h"

namespace selftest {
namespace {

template <class P>
int run(void (*kernel)(P), P params, dim3 grid, dim3 block, size_t shared) {
  void* args[] = {&params};
  return cudaLaunchKernel(kernel, grid, block, args, shared, nullptr);
}

struct BlockSum {
  const float* x;
  float* out;
  int beyond, beyond_input;
};
__global__ void __launch_bounds__(1024) block_sum_kernel(const __grid_constant__ BlockSum p) {
  DSTS_DYNAMIC_SMEM(memory);
  float* sums = reinterpret_cast<float*>(memory);
  const unsigned t = threadIdx.x;
  sums[t] = p.x[blockIdx.x * blockDim.x + t + p.beyond_input];  // here: beyond_input
  for (unsigned n = blockDim.x / 2; n > 0; n /= 2) {
    __syncthreads();                               // here: step
    if (t < n) sums[t] += sums[t + n + p.beyond];  // here: beyond
  }
  if (t == 0) p.out[blockIdx.x] = sums[0];
}

struct WarpSum {
  const float* x;
  float* out;
  unsigned* ballots;
};
__global__ void warp_sum_kernel(const __grid_constant__ WarpSum p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float v = p.x[i];
  const unsigned positive = __ballot_sync(0xFFFFFFFFu, v > 0);
  for (int lane = 16; lane; lane /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, lane);
  if (threadIdx.x % 32 == 0) {
    p.out[i / 32] = v;
    p.ballots[i / 32] = positive;
  }
}

struct LastBlock {
  const float* x;
  float* partial;
  int* counter;
  float* out;
};
__global__ void last_block_kernel(const __grid_constant__ LastBlock p) {
  DSTS_DYNAMIC_SMEM(memory);
  int* last = reinterpret_cast<int*>(memory);
  const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  p.partial[i] = p.x[i];
  __syncthreads();
  if (t == 0) {
    __threadfence();  // here: before
    *last = atomicAdd(p.counter, 1) == int(gridDim.x) - 1;
    __threadfence();  // here: after
  }
  __syncthreads();  // here: told
  if (*last && t == 0) {
    float sum = 0;
    for (unsigned j = 0; j < gridDim.x * blockDim.x; ++j) sum += __ldcg(p.partial + j);
    *p.out = sum;
    *p.counter = 0;
  }
}

struct DoubleBuffer {
  const float* x;
  float* out;
  int chunks, keep;
};
constexpr int kChunk = 64 * 4;
__global__ void double_buffer_kernel(const __grid_constant__ DoubleBuffer p) {
  DSTS_DYNAMIC_SMEM(memory);
  float* buffer = reinterpret_cast<float*>(memory);
  const int t = threadIdx.x;
  const float* x = p.x + size_t(blockIdx.x) * p.chunks * kChunk;
  float* out = p.out + size_t(blockIdx.x) * p.chunks * kChunk;
  __pipeline_memcpy_async(buffer + t * 4, x + t * 4, 16);
  __pipeline_commit();
  for (int c = 0; c < p.chunks; ++c) {
    if (c + 1 < p.chunks)
      __pipeline_memcpy_async(buffer + (c + 1) % 2 * kChunk + t * 4, x + (c + 1) * kChunk + t * 4, 16);
    __pipeline_commit();
    __pipeline_wait_prior(p.keep);
    __syncthreads();  // here: filled
    const int turned = kChunk - 1 - t;
    for (int i = 0; i < 4; ++i) {
      const int j = turned - i * 64;
      out[c * kChunk + j] = 2 * buffer[c % 2 * kChunk + j];
    }
    __syncthreads();  // here: emptied
  }
}

namespace wmma = nvcuda::wmma;

struct Product {
  const void *a, *b;
  float* d;
  int depth, d_by_column, repeat;
};
template <class T, class E, int kDepth, class LayoutA, class LayoutB>
__global__ void product_kernel(const __grid_constant__ Product p) {
  const E *a = static_cast<const E*>(p.a), *b = static_cast<const E*>(p.b);
  constexpr bool a_by_column = __is_same(LayoutA, wmma::col_major);
  constexpr bool b_by_column = __is_same(LayoutB, wmma::col_major);
  wmma::fragment<wmma::matrix_a, 16, 16, kDepth, T, LayoutA> fa;
  wmma::fragment<wmma::matrix_b, 16, 16, kDepth, T, LayoutB> fb;
  wmma::fragment<wmma::accumulator, 16, 16, kDepth, float> sum;
  wmma::fill_fragment(sum, 0.0f);
  for (int k = 0; k < p.depth; k += kDepth) {
    wmma::load_matrix_sync(fa, a + (a_by_column ? k * 16 : k), a_by_column ? 16 : p.depth);
    wmma::load_matrix_sync(fb, b + (b_by_column ? k : k * 16), b_by_column ? p.depth : 16);
    if constexpr (__is_same(E, float)) {
      for (int i = 0; i < fa.num_elements; ++i) fa.x[i] = wmma::__float_to_tf32(fa.x[i]);
      for (int i = 0; i < fb.num_elements; ++i) fb.x[i] = wmma::__float_to_tf32(fb.x[i]);
    }
    for (int i = 0; i < p.repeat; ++i) wmma::mma_sync(sum, fa, fb, sum);
  }
  for (int i = 0; i < sum.num_elements; ++i) sum.x[i] *= 0.5f;
  wmma::store_matrix_sync(p.d, sum, 16, p.d_by_column ? wmma::mem_col_major : wmma::mem_row_major);
}
template <class T, class E, int kDepth>
int product_of(Product p, bool a_by_column, bool b_by_column) {
  using wmma::col_major, wmma::row_major;
  if (a_by_column)
    return b_by_column ? run(product_kernel<T, E, kDepth, col_major, col_major>, p, 1, 32, 0)
                       : run(product_kernel<T, E, kDepth, col_major, row_major>, p, 1, 32, 0);
  return b_by_column ? run(product_kernel<T, E, kDepth, row_major, col_major>, p, 1, 32, 0)
                     : run(product_kernel<T, E, kDepth, row_major, row_major>, p, 1, 32, 0);
}

struct Quads {
  const uint2 *a, *b;
  float* c;
  int a_by_row, b_by_column;
};
__global__ void quads_kernel(const __grid_constant__ Quads p) {
  const uint2 a = p.a[threadIdx.x], b = p.b[threadIdx.x];
  float c[8];
  for (int i = 0; i < 8; ++i) c[i] = p.c[threadIdx.x * 8 + i];
  ::emulator::multiply_quads(p.a_by_row, p.b_by_column, c, &a, &b);
  for (int i = 0; i < 8; ++i) p.c[threadIdx.x * 8 + i] = c[i];
}

struct Misaligned {
  const void* a;
  int offset, stride;
};
__global__ void misaligned_kernel(const __grid_constant__ Misaligned p) {
  wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> a;
  wmma::load_matrix_sync(a, static_cast<const __half*>(p.a) + p.offset, p.stride);
}

#if __CUDA_ARCH__ >= 750
struct Matrices {
  const unsigned char* rows;
  unsigned* out;
  int turned, offset, lanes;
};
__global__ void matrices_kernel(const __grid_constant__ Matrices p) {
  DSTS_DYNAMIC_SMEM(memory);
  const int t = threadIdx.x, other = 31 - t;
  memcpy(memory + other * 16, p.rows + other * 16, 16);
  __syncthreads();  // here: rows
  if (t >= p.lanes) return;
  unsigned to[4];
  emulator::load_matrices(to, memory + t * 16 + p.offset, p.turned != 0);  // here: matrices
  for (int i = 0; i < 4; ++i) p.out[t * 4 + i] = to[i];
}

struct FragmentProduct {
  const unsigned *a, *b;
  const float* c;
  float* out;
  emulator::Operand operand;
  int depth_bytes;
};
__global__ void fragment_product_kernel(const __grid_constant__ FragmentProduct p) {
  const int t = threadIdx.x;
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = p.c[t * 4 + i];
  emulator::multiply_add(p.operand, p.depth_bytes, sum, p.a + t * (p.depth_bytes / 8),
                         p.b + t * (p.depth_bytes / 16));
  for (int i = 0; i < 4; ++i) p.out[t * 4 + i] = sum[i];
}
#endif

struct Divergent {
  int kind;
  float* out;
};
__global__ void divergent_kernel(const __grid_constant__ Divergent p) {
  const unsigned t = threadIdx.x;
  if (p.kind == 2) {
    if (t == 5) return;
    __syncthreads();
    __syncwarp();
    p.out[t] = 1;
  } else if (t < 16) {
    __syncthreads();
  } else if (p.kind == 0) {
    __syncthreads();
  } else {
    p.out[t] = __shfl_xor_sync(0xFFFFFFFFu, float(t), 1);
  }
}

struct RoundTrip {
  const float* x;
  float *halves, *bfloats;
  int n;
};
__global__ void round_trip_kernel(const __grid_constant__ RoundTrip p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= p.n) return;
  p.halves[i] = __half2float(__float2half_rn(p.x[i]));
  p.bfloats[i] = static_cast<float>(static_cast<__nv_bfloat16>(p.x[i]));
}

struct Bare {
  int repeat;
};
__global__ void bare_kernel(const __grid_constant__ Bare p) {
  for (int i = 0; i < p.repeat; ++i) __syncthreads();
}

}  // namespace

int block_sum(const float* x, float* out, int blocks, int threads, int beyond, int beyond_input) {
  return run(block_sum_kernel, BlockSum{x, out, beyond, beyond_input}, blocks, threads,
             threads * sizeof(float));
}
int warp_sum(const float* x, float* out, unsigned* ballots, int warps) {
  return run(warp_sum_kernel, WarpSum{x, out, ballots}, warps / 4, 128, 0);
}
int last_block_sum(const float* x, float* partial, int* counter, float* out, int blocks) {
  return run(last_block_kernel, LastBlock{x, partial, counter, out}, blocks, 64, sizeof(int));
}
int double_buffer(const float* x, float* out, int chunks, int keep) {
  return run(double_buffer_kernel, DoubleBuffer{x, out, chunks, keep}, 3, 64, 2 * kChunk * sizeof(float));
}
int product(const void* a, const void* b, float* d, int kind, int depth, int a_by_column, int b_by_column,
            int d_by_column, int repeat) {
  const Product p{a, b, d, depth, d_by_column, repeat};
  if (kind == 0) return product_of<__half, __half, 16>(p, a_by_column, b_by_column);
#if __CUDA_ARCH__ >= 800
  if (kind == 1) return product_of<__nv_bfloat16, __nv_bfloat16, 16>(p, a_by_column, b_by_column);
  if (kind == 2) return product_of<wmma::precision::tf32, float, 8>(p, a_by_column, b_by_column);
#endif
  return -1;
}
int quads(const void* a, const void* b, float* c, int a_by_row, int b_by_column) {
  const Quads p{static_cast<const uint2*>(a), static_cast<const uint2*>(b), c, a_by_row, b_by_column};
  return run(quads_kernel, p, 1, 32, 0);
}
#if __CUDA_ARCH__ >= 750
int matrices(const unsigned char* rows, unsigned* out, int turned, int offset, int lanes) {
  return run(matrices_kernel, Matrices{rows, out, turned, offset, lanes}, 1, 32, 32 * 16);
}
int fragment_product(const unsigned* a, const unsigned* b, const float* c, float* out, int kind,
                     int depth_bytes) {
  using emulator::Operand;
  const Operand operand = kind == 0 ? Operand::kHalf : kind == 1 ? Operand::kBFloat16 : Operand::kTf32;
  return run(fragment_product_kernel, FragmentProduct{a, b, c, out, operand, depth_bytes}, 1, 32, 0);
}
#else
int matrices(const unsigned char*, unsigned*, int, int, int) { return -1; }
int fragment_product(const unsigned*, const unsigned*, const float*, float*, int, int) { return -1; }
#endif
int divergent(int kind, float* out) { return run(divergent_kernel, Divergent{kind, out}, 1, 32, 0); }
int round_trip(const float* x, float* halves, float* bfloats, int n) {
  return run(round_trip_kernel, RoundTrip{x, halves, bfloats, n}, (n + 63) / 64, 64, 0);
}
int misaligned_product(const void* a, int offset, int stride) {
  return run(misaligned_kernel, Misaligned{a, offset, stride}, 1, 32, 0);
}
int bare(int blocks, int threads, int shared_bytes, int allowed) {
  if (allowed) {
    const int error = cudaFuncSetAttribute(bare_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed);
    if (error != cudaSuccess) return error;
  }
  return run(bare_kernel, Bare{0}, blocks, threads, shared_bytes);
}
int barriers(int blocks, int threads, int repeat) {
  return run(bare_kernel, Bare{repeat}, blocks, threads, 0);
}

}  // namespace selftest
