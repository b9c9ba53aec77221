// Matrix operations of a whole warp: loads are checked, and products are taken by the lane that comes last
// for all of them.
#include <stdint.h>
#include <string.h>

#include "block.h"

namespace emulator {

void require_whole_warp(const char* name, Place place) {
  const Fiber* f = self();
  const unsigned alive = f->worker->warps[f->slot / 32].alive;
  if (alive != ~0u) fail(place, "%s needs all 32 lanes, here are only %#x", name, alive);
}

float widened(uint16_t h) {
  const uint32_t w = uint32_t(h) << 16, twice = w + w;
  const uint32_t scaled = (twice >> 4) + (0xE0u << 23), offset = (twice >> 17) | (126u << 23);
  float normal, subnormal;
  memcpy(&normal, &scaled, 4);
  memcpy(&subnormal, &offset, 4);
  normal *= 0x1p-112f;
  subnormal -= 0.5f;
  uint32_t a, b;
  memcpy(&a, &normal, 4);
  memcpy(&b, &subnormal, 4);
  const uint32_t bits = (w & 0x80000000u) | (twice < (1u << 27) ? b : a);
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

namespace {

// The values of a matrix whose elements lie in a row, whatever lanes they came from.
EMULATOR_CLONES void widen_halves(const uint16_t* __restrict__ in, float* __restrict__ out) {
  for (int i = 0; i < 256; ++i) out[i] = widened(in[i]);
}
EMULATOR_CLONES void widen_bfloats(const uint16_t* __restrict__ in, float* __restrict__ out) {
  for (int i = 0; i < 256; ++i) {
    const uint32_t bits = uint32_t(in[i]) << 16;
    memcpy(out + i, &bits, 4);
  }
}

EMULATOR_CLONES void product_16x16(const float* __restrict__ a, const float* __restrict__ b,
                                   float* __restrict__ c, int depth) {
  typedef float Row __attribute__((vector_size(32), aligned(32)));
  for (int i = 0; i < 16; i += 2) {
    auto* row = reinterpret_cast<Row*>(c + i * 16);
    Row c00 = row[0], c01 = row[1], c10 = row[2], c11 = row[3];
    for (int k = 0; k < depth; ++k) {
      const auto* other = reinterpret_cast<const Row*>(b + k * 16);
      const float x = a[i * depth + k], y = a[(i + 1) * depth + k];
      c00 += x * other[0], c01 += x * other[1];
      c10 += y * other[0], c11 += y * other[1];
    }
    row[0] = c00, row[1] = c01, row[2] = c10, row[3] = c11;
  }
}

template <Operand kOperand>
void multiply_shares(Fiber* lanes, unsigned) {
  constexpr int kDepth = kOperand == Operand::kTf32 ? 8 : 16;
  alignas(32) float a[256], b[256], c[256];
  if constexpr (kOperand == Operand::kTf32) {
    uint32_t bits[2][16 * kDepth];
    for (int i = 0; i < 32; ++i) {
      memcpy(bits[0] + i * 4, lanes[i].product.a, 16);
      memcpy(bits[1] + i * 4, lanes[i].product.b, 16);
    }
    for (auto& matrix : bits)  // the device takes the leading bits of what it gets
      for (uint32_t& x : matrix) x &= 0xFFFFE000u;
    memcpy(a, bits[0], sizeof bits[0]);
    memcpy(b, bits[1], sizeof bits[1]);
  } else {
    uint16_t bits[2][256];
    for (int i = 0; i < 32; ++i) {
      memcpy(bits[0] + i * 8, lanes[i].product.a, 16);
      memcpy(bits[1] + i * 8, lanes[i].product.b, 16);
    }
    const auto widen = kOperand == Operand::kHalf ? widen_halves : widen_bfloats;
    widen(bits[0], a);
    widen(bits[1], b);
  }
  for (int i = 0; i < 32; ++i) memcpy(c + i * 8, lanes[i].product.c, 32);
  product_16x16(a, b, c, kDepth);
  for (int i = 0; i < 32; ++i) memcpy(lanes[i].product.d, c + i * 8, 32);
}

// One operand of a quad pair, `along` by 4 of K: in one layout a lane holds four of K for its own row or
// column, in the other four rows or columns for its own k.
void gather_quad(const Fiber* lanes, int quad, bool left, bool own_row, float (&to)[8][4]) {
  for (int upper = 0; upper < 2; ++upper)
    for (int low = 0; low < 4; ++low) {
      const Fiber& lane = lanes[16 * upper + 4 * quad + low];
      uint16_t bits[4];
      memcpy(bits, left ? lane.product.a : lane.product.b, sizeof bits);
      for (int i = 0; i < 4; ++i) to[4 * upper + (own_row ? low : i)][own_row ? i : low] = widened(bits[i]);
    }
}

template <bool kRows, bool kColumns>
void multiply_quads_of(Fiber* lanes, unsigned) {
  for (int quad = 0; quad < 4; ++quad) {
    float a[8][4], b[8][4];
    gather_quad(lanes, quad, true, kRows, a);
    gather_quad(lanes, quad, false, kColumns, b);
    for (int upper = 0; upper < 2; ++upper)
      for (int low = 0; low < 4; ++low)
        for (int i = 0; i < 8; ++i) {
          const int row = 4 * upper + (low & 1) + (i & 2), column = (i & 4) + (low & 2) + (i & 1);
          float& sum = lanes[16 * upper + 4 * quad + low].product.d[i];
          for (int k = 0; k < 4; ++k) sum += a[row][k] * b[column][k];
        }
  }
}

}  // namespace

void meet_at_matrix(const char* name, const void* matrix, unsigned stride, size_t element_size, Place place) {
  require_whole_warp(name, place);
  if (reinterpret_cast<uintptr_t>(matrix) % 32 != 0)
    fail(place, "%s: the pointer %p is not 32-byte aligned", name, matrix);
  if (stride * element_size % 16 != 0)
    fail(place, "%s: the leading dimension %u is not a multiple of 16 bytes", name, stride);
  Fiber* f = self();
  f->product.a = matrix;
  f->product.depth = int(stride);
  f->place = place;
  meet(f, name, ~0u, place, false, [](Fiber* lanes, unsigned) {
    for (int i = 1; i < 32; ++i)
      if (lanes[i].product.a != lanes[0].product.a || lanes[i].product.depth != lanes[0].product.depth)
        fail(lanes[i].place, "lanes of a warp ask for different matrices or leading dimensions");
  });
}

void multiply(Operand operand, int depth, float* d, const void* a, const void* b, const float* c,
              Place place) {
  require_whole_warp("mma_sync", place);
  Fiber* f = self();
  f->product = {d, a, b, c, depth};
  switch (operand) {
    case Operand::kHalf:
      return meet(f, "mma_sync", ~0u, place, false, multiply_shares<Operand::kHalf>);
    case Operand::kBFloat16:
      return meet(f, "mma_sync", ~0u, place, false, multiply_shares<Operand::kBFloat16>);
    case Operand::kTf32:
      return meet(f, "mma_sync", ~0u, place, false, multiply_shares<Operand::kTf32>);
  }
}

void multiply_quads(bool a_by_row, bool b_by_column, float* c, const void* a, const void* b, Place place) {
  require_whole_warp("mma.m8n8k4", place);
  Fiber* f = self();
  f->product = {c, a, b, c, 4};
  const auto of = a_by_row      ? b_by_column ? multiply_quads_of<true, true> : multiply_quads_of<true, false>
                  : b_by_column ? multiply_quads_of<false, true>
                                : multiply_quads_of<false, false>;
  const char* names[] = {"mma.m8n8k4.col.row", "mma.m8n8k4.col.col", "mma.m8n8k4.row.row",
                         "mma.m8n8k4.row.col"};
  meet(f, names[2 * a_by_row + b_by_column], ~0u, place, false, of);
}

}  // namespace emulator
