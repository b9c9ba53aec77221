// ldmatrix and mma.sync.m16n8k*, as the PTX ISA lays their fragments out over the lanes of a warp: which rows
// of shared memory a lane's registers come from, and a product of all lanes' registers.
#include <stdint.h>
#include <string.h>

#include "block.h"

namespace emulator {

namespace {

// Below, g = lane / 4 and t = lane % 4. A register holds four bytes of K: two elements, or one of TF32.
struct Product {
  alignas(32) float a[16][16], b[16][8], c[16][8];
};

template <Operand kOperand>
void spread(uint32_t bits, float* to, int apart) {
  if constexpr (kOperand == Operand::kTf32) {
    bits &= 0xFFFFE000u;  // the device takes the leading bits of what it gets
    memcpy(to, &bits, 4);
  } else {
    for (int i = 0; i < 2; ++i) {
      const uint16_t half = uint16_t(bits >> 16 * i);
      const uint32_t wide = uint32_t(half) << 16;
      if constexpr (kOperand == Operand::kHalf)
        to[i * apart] = widened(half);
      else
        memcpy(to + i * apart, &wide, 4);
    }
  }
}

EMULATOR_CLONES void multiply_rows(Product& p, int depth) {
  typedef float Row __attribute__((vector_size(32), aligned(32)));
  for (int i = 0; i < 16; ++i) {
    auto* row = reinterpret_cast<Row*>(p.c[i]);
    Row sum = *row;
    for (int k = 0; k < depth; ++k) sum += p.a[i][k] * *reinterpret_cast<const Row*>(p.b[k]);
    *row = sum;
  }
}

template <Operand kOperand>
void multiply_fragments(Fiber* lanes, unsigned) {
  constexpr int kEach = kOperand == Operand::kTf32 ? 1 : 2;  // elements of a register
  const int vectors = lanes[0].product.depth / 16;           // of 16 bytes of K
  Product p;
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const auto& own = lanes[lane].product;
    const auto *a = static_cast<const uint32_t*>(own.a), *b = static_cast<const uint32_t*>(own.b);
    for (int v = 0; v < vectors; ++v) {
      const int k = (4 * v + t) * kEach;
      for (int half = 0; half < 2; ++half) spread<kOperand>(a[2 * v + half], &p.a[g + 8 * half][k], 1);
      spread<kOperand>(b[v], &p.b[k][g], 8);
    }
    for (int e = 0; e < 4; ++e) p.c[g + e / 2 * 8][2 * t + e % 2] = own.c[e];
  }
  multiply_rows(p, vectors * 4 * kEach);
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < 4; ++e) lanes[lane].product.d[e] = p.c[lane / 4 + e / 2 * 8][2 * (lane % 4) + e % 2];
}

}  // namespace

void meet_at_rows(const char* name, const unsigned char* row, bool turned, const unsigned char* (&from)[4][2],
                  Place place) {
  require_whole_warp(name, place);
  Fiber* f = self();
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    fail(place, "%s: the row at %p is not 16-byte aligned", name, static_cast<const void*>(row));
  if (row < f->shared || row + 16 > f->shared + f->worker->launch->shared_bytes)
    fail(place, "%s: a row is outside shared memory", name);
  f->product.a = row;
  f->product.depth = turned;
  f->product.b = from;
  f->place = place;
  meet(f, name, ~0u, place, false, [](Fiber* lanes, unsigned) {
    for (int lane = 0; lane < 32; ++lane) {
      const bool turned = lanes[lane].product.depth != 0;
      if (turned != (lanes[0].product.depth != 0))
        fail(lanes[lane].place, "lanes of a warp ask for matrices one turned round, one not");
      auto* from = static_cast<const unsigned char*(*)[2]>(const_cast<void*>(lanes[lane].product.b));
      for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 2; ++k) {
          const int row = turned ? 2 * (lane % 4) + k : lane / 4;
          from[i][k] = static_cast<const unsigned char*>(lanes[8 * i + row].product.a);
        }
    }
  });
}

void multiply_add(Operand operand, int depth_bytes, float (&c)[4], const unsigned* a, const unsigned* b,
                  Place place) {
  const char* name = "mma.sync";
  require_whole_warp(name, place);
  if (EMULATOR_ARCH < 800 && (operand != Operand::kHalf || depth_bytes != 16))
    fail(place, "%s: before sm_80 there are only halves, 8 of K at a time", name);
  Fiber* f = self();
  f->product = {c, a, b, c, depth_bytes};
  switch (operand) {
    case Operand::kHalf:
      return meet(f, name, ~0u, place, false, multiply_fragments<Operand::kHalf>);
    case Operand::kBFloat16:
      return meet(f, name, ~0u, place, false, multiply_fragments<Operand::kBFloat16>);
    case Operand::kTf32:
      return meet(f, name, ~0u, place, false, multiply_fragments<Operand::kTf32>);
  }
}

}  // namespace emulator
