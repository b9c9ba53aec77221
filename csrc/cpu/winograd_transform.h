// Winograd's transforms along one dimension, on vectors of channels: input M + 2 to M + 2, filter 3 to M + 2,
// output M + 2 to M. Two-dimensional tiles take one pass in each dimension. Coefficients are compile-time
// constants and zeros cost nothing, in the strict arithmetic where 0 * x is not 0.
#pragma once

#include "cpu/transpose.h"
#include "../winograd.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

enum class Matrix { input, filter, output };

template <int M>
constexpr ::dsts::Winograd<M> kScheme{};

template <int M, Matrix kMatrix>
constexpr double coefficient(int i, int j) {
  if (kMatrix == Matrix::input) return kScheme<M>.input[i][j];
  if (kMatrix == Matrix::filter) return kScheme<M>.filter[i][j];
  return kScheme<M>.output[i][j];
}

template <int M, Matrix kMatrix>
constexpr int kResults = kMatrix == Matrix::output ? ::dsts::Winograd<M>::kOutputs : ::dsts::Winograd<M>::kInputs;
template <int M, Matrix kMatrix>
constexpr int kTerms = kMatrix == Matrix::filter ? 3 : ::dsts::Winograd<M>::kInputs;

// sum += row i of the matrix times v, from column j on; kFirst: nothing has been added yet.
template <int M, Matrix kMatrix, int i, int j, bool kFirst>
DSTS_INLINE void add_columns(Vector& sum, const Vector* v) {
  if constexpr (j < kTerms<M, kMatrix>) {
    constexpr double c = coefficient<M, kMatrix>(i, j);
    constexpr bool kNone = kFirst && c == 0;
    if constexpr (c == 1)
      sum = kFirst ? v[j] : sum + v[j];
    else if constexpr (c == -1)
      sum = kFirst ? -v[j] : sum - v[j];
    else if constexpr (c != 0)
      sum = kFirst ? float(c) * v[j] : sum + float(c) * v[j];
    add_columns<M, kMatrix, i, j + 1, kNone>(sum, v);
  }
}

// put(i, row i of matrix * v) for every row.
template <int M, Matrix kMatrix, int i = 0, class Put>
DSTS_INLINE void apply(const Vector* v, Put put) {
  if constexpr (i < kResults<M, kMatrix>) {
    Vector sum = {};
    add_columns<M, kMatrix, i, 0, true>(sum, v);
    put(i, sum);
    apply<M, kMatrix, i + 1>(v, put);
  }
}

DSTS_INLINE Vector vector_at(const float* p) {
  Vector v;
  memcpy(&v, p, sizeof v);
  return v;
}

// How the lines of a pass lie: `count` of them, each `length` floats long (whole vectors), in source and target;
// the elements that a transform combines, or gives, are `step` apart.
struct Lines {
  int64_t count, length;
  int64_t from_step, from_next, to_step, to_next;
};

// One pass over all lines; `from` may be `to` where steps and lines are the same. kAdd: to += result.
template <int M, Matrix kMatrix, bool kAdd>
void pass(const float* from, float* to, const Lines& l) {
  for (int64_t line = 0; line < l.count; ++line, from += l.from_next, to += l.to_next)
    for (int64_t c = 0; c < l.length; c += kWide) {
      Vector v[kTerms<M, kMatrix>];
#pragma GCC unroll 16
      for (int j = 0; j < kTerms<M, kMatrix>; ++j) v[j] = vector_at(from + j * l.from_step + c);
      apply<M, kMatrix>(v, [&](int i, Vector sum) {
        float* at = to + i * l.to_step + c;
        if constexpr (kAdd) sum += vector_at(at);
        memcpy(at, &sum, sizeof sum);
      });
    }
}

template <Matrix kMatrix, bool kAdd = false>
void pass_of(int tile, const float* from, float* to, const Lines& l) {
  switch (tile) {
    case 1:
      return pass<1, kMatrix, kAdd>(from, to, l);
    case 2:
      return pass<2, kMatrix, kAdd>(from, to, l);
    case 4:
      return pass<4, kMatrix, kAdd>(from, to, l);
    default:
      return pass<8, kMatrix, kAdd>(from, to, l);
  }
}

inline int64_t inputs_of(int tile) { return tile == 1 ? 1 : tile + 2; }
inline int64_t lead_of(int tile) { return tile == 1 ? 0 : 1; }

}  // namespace
}  // namespace dsts::cpu::DSTS_ISA
