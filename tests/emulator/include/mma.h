// Stands in for CUDA's header of this name: nvcuda::wmma for the shapes that the project uses. A fragment
// holds the calling lane's share of a matrix, so element-wise code works and nothing else does. Loads and
// stores are each lane's own accesses, after all lanes have come; products are the runtime's.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };
namespace precision {
struct tf32 {};
}  // namespace precision

inline float __float_to_tf32(float x) {
  const uint32_t u = ::emulator::bits_as<uint32_t>(x);
  if ((u & 0x7F800000u) == 0x7F800000u) return x;
  return ::emulator::bits_as<float>((u + 0x1000u) & 0xFFFFE000u);
}

}  // namespace nvcuda::wmma

namespace emulator {

// Rows x columns elements over 32 lanes; unset elements are NaN, in place of a register's garbage.
template <class T, int kRows, int kColumns>
struct Share {
  static constexpr int num_elements = kRows * kColumns / 32;
  T x[num_elements];
  Share() { memset(static_cast<void*>(x), 0xFF, sizeof x); }
  static constexpr int rows = kRows, columns = kColumns;
};

// Where element i of a lane's share lies in memory.
template <int kRows, int kColumns>
size_t offset_of(int lane, int i, unsigned stride, bool by_column) {
  const int index = lane * (kRows * kColumns / 32) + i;
  const size_t row = size_t(index / kColumns), column = size_t(index % kColumns);
  return by_column ? column * stride + row : row * stride + column;
}

}  // namespace emulator

namespace nvcuda::wmma {

template <class Use, int m, int n, int k, class T, class Layout = void>
struct fragment;

#define EMULATOR_OPERANDS(depth, type, storage, operand_)                                          \
  template <class Layout>                                                                          \
  struct fragment<matrix_a, 16, 16, depth, type, Layout> : ::emulator::Share<storage, 16, depth> { \
    using element_type = type;                                                                     \
    using storage_element_type = storage;                                                          \
    static constexpr bool by_column = __is_same(Layout, col_major);                                \
    static constexpr ::emulator::Operand operand = ::emulator::Operand::operand_;                  \
  };                                                                                               \
  template <class Layout>                                                                          \
  struct fragment<matrix_b, 16, 16, depth, type, Layout> : ::emulator::Share<storage, depth, 16> { \
    using element_type = type;                                                                     \
    using storage_element_type = storage;                                                          \
    static constexpr bool by_column = __is_same(Layout, col_major);                                \
    static constexpr ::emulator::Operand operand = ::emulator::Operand::operand_;                  \
  };
EMULATOR_OPERANDS(16, __half, __half, kHalf)
#if __CUDA_ARCH__ >= 800
EMULATOR_OPERANDS(16, __nv_bfloat16, __nv_bfloat16, kBFloat16)
EMULATOR_OPERANDS(8, precision::tf32, float, kTf32)
#endif
#undef EMULATOR_OPERANDS

template <>
struct fragment<accumulator, 16, 16, 16, float> : ::emulator::Share<float, 16, 16> {
  using element_type = float;
  using storage_element_type = float;
};
#if __CUDA_ARCH__ >= 800
template <>
struct fragment<accumulator, 16, 16, 8, float> : ::emulator::Share<float, 16, 16> {
  using element_type = float;
  using storage_element_type = float;
};
#endif

template <class Use, int m, int n, int k, class T, class Layout, class V>
void fill_fragment(fragment<Use, m, n, k, T, Layout>& frag, const V& value) {
  for (auto& x : frag.x) x = value;
}

template <class Use, int m, int n, int k, class T, class Layout, class E>
void load_matrix_sync(fragment<Use, m, n, k, T, Layout>& frag, const E* p, unsigned ld,
                      ::emulator::Place place = {__builtin_FILE(), __builtin_LINE()}) {
  using Fragment = fragment<Use, m, n, k, T, Layout>;
  static_assert(__is_same(E, typename Fragment::storage_element_type), "pointer and fragment differ in type");
  ::emulator::meet_at_matrix("load_matrix_sync", p, ld, sizeof(E), place);
  const int lane = ::emulator::lane();
  for (int i = 0; i < Fragment::num_elements; ++i)
    frag.x[i] = p[::emulator::offset_of<Fragment::rows, Fragment::columns>(lane, i, ld, Fragment::by_column)];
}

template <int k>
void load_matrix_sync(fragment<accumulator, 16, 16, k, float>& frag, const float* p, unsigned ld,
                      layout_t layout, ::emulator::Place place = {__builtin_FILE(), __builtin_LINE()}) {
  ::emulator::meet_at_matrix("load_matrix_sync", p, ld, sizeof(float), place);
  const int lane = ::emulator::lane();
  for (int i = 0; i < frag.num_elements; ++i)
    frag.x[i] = p[::emulator::offset_of<16, 16>(lane, i, ld, layout == mem_col_major)];
}

template <int k>
void store_matrix_sync(float* p, const fragment<accumulator, 16, 16, k, float>& frag, unsigned ld,
                       layout_t layout, ::emulator::Place place = {__builtin_FILE(), __builtin_LINE()}) {
  ::emulator::meet_at_matrix("store_matrix_sync", p, ld, sizeof(float), place);
  const int lane = ::emulator::lane();
  for (int i = 0; i < frag.num_elements; ++i)
    p[::emulator::offset_of<16, 16>(lane, i, ld, layout == mem_col_major)] = frag.x[i];
}

template <int k, class T, class LayoutA, class LayoutB>
void mma_sync(fragment<accumulator, 16, 16, k, float>& d, const fragment<matrix_a, 16, 16, k, T, LayoutA>& a,
              const fragment<matrix_b, 16, 16, k, T, LayoutB>& b,
              const fragment<accumulator, 16, 16, k, float>& c,
              ::emulator::Place place = {__builtin_FILE(), __builtin_LINE()}) {
  ::emulator::multiply(a.operand, k, d.x, a.x, b.x, c.x, place);
}

}  // namespace nvcuda::wmma
