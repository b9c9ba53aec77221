// Winograd's transforms along one dimension, on vectors of channels:
//
//   input     M + 2 to M + 2
//   filter    3 to M + 2
//   output    M + 2 to M
//   gradient  M to M + 2, the transpose of output: for the gradient of a filter
//   weight    M + 2 to 3, the transpose of filter: likewise
//
// Two-dimensional tiles take one pass in each dimension. Coefficients are compile-time constants and zeros
// cost nothing, in the strict arithmetic where 0 * x is not 0.
#pragma once

#include "cpu/transpose.h"
#include "cpu/winograd_tiles.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

enum class Matrix { input, filter, output, gradient, weight };

template <int M>
constexpr ::dsts::Winograd<M> kScheme{};

template <int M, Matrix kMatrix>
constexpr double coefficient(int i, int j) {
  if (kMatrix == Matrix::input) return kScheme<M>.input[i][j];
  if (kMatrix == Matrix::filter) return kScheme<M>.filter[i][j];
  if (kMatrix == Matrix::gradient) return kScheme<M>.output[j][i];
  if (kMatrix == Matrix::weight) return kScheme<M>.filter[j][i];
  return kScheme<M>.output[i][j];
}

template <int M, Matrix kMatrix>
constexpr int kResults = kMatrix == Matrix::output   ? ::dsts::Winograd<M>::kOutputs
                         : kMatrix == Matrix::weight ? 3
                                                     : ::dsts::Winograd<M>::kInputs;
template <int M, Matrix kMatrix>
constexpr int kTerms = kMatrix == Matrix::gradient ? ::dsts::Winograd<M>::kOutputs
                       : kMatrix == Matrix::filter ? 3
                                                   : ::dsts::Winograd<M>::kInputs;

// Which columns of a row count: the points come in pairs p, -p, whose rows differ in the sign of the odd
// ones.
enum class Part { all, even, odd };

template <Part kPart>
constexpr bool counts(int column) {
  return kPart == Part::all || (column % 2 == 1) == (kPart == Part::odd);
}

// sum += part of row i of the matrix times v, from column j on; kFirst: nothing has been added yet.
template <int M, Matrix kMatrix, Part kPart, int i, int j = 0, bool kFirst = true>
DSTS_INLINE void add_columns(Vector& sum, const Vector* v) {
  if constexpr (j < kTerms<M, kMatrix>) {
    constexpr double c = counts<kPart>(j) ? coefficient<M, kMatrix>(i, j) : 0;
    if constexpr (c == 1)
      sum = kFirst ? v[j] : sum + v[j];
    else if constexpr (c == -1)
      sum = kFirst ? -v[j] : sum - v[j];
    else if constexpr (c != 0)
      sum = kFirst ? float(c) * v[j] : sum + float(c) * v[j];
    add_columns<M, kMatrix, kPart, i, j + 1, kFirst && c == 0>(sum, v);
  }
}

// put(i, row i of matrix * v) for every row, from row i on: input, filter and gradient. Rows of p and -p
// share their terms.
template <int M, Matrix kMatrix, int i = 0, class Put>
DSTS_INLINE void apply_rows(const Vector* v, Put put) {
  constexpr int n = kResults<M, kMatrix>;
  if constexpr (i == 0 || i == n - 1) {
    Vector sum = {};
    add_columns<M, kMatrix, Part::all, i>(sum, v);
    put(i, sum);
    if constexpr (i + 1 < n) apply_rows<M, kMatrix, i + 1>(v, put);
  } else {
    Vector even = {}, odd = {};
    add_columns<M, kMatrix, Part::even, i>(even, v);
    add_columns<M, kMatrix, Part::odd, i>(odd, v);
    put(i, even + odd);
    put(i + 1, even - odd);
    apply_rows<M, kMatrix, i + 2>(v, put);
  }
}

// The output and weight matrices have their points in columns: of a pair, even rows see the sum, odd rows the
// difference.
template <int M, Matrix kMatrix>
constexpr double pair_coefficient(int i, int j) {
  const bool paired = j > 0 && j < M + 1, sum = j % 2 == 1;
  if (!paired) return coefficient<M, kMatrix>(i, j);
  return sum == (i % 2 == 0) ? coefficient<M, kMatrix>(i, sum ? j : j - 1) : 0;
}

template <int M, Matrix kMatrix, int i, int j = 0, bool kFirst = true>
DSTS_INLINE void add_pairs(Vector& sum, const Vector* v) {
  if constexpr (j < kTerms<M, kMatrix>) {
    constexpr double c = pair_coefficient<M, kMatrix>(i, j);
    if constexpr (c == 1)
      sum = kFirst ? v[j] : sum + v[j];
    else if constexpr (c != 0)
      sum = kFirst ? float(c) * v[j] : sum + float(c) * v[j];
    add_pairs<M, kMatrix, i, j + 1, kFirst && c == 0>(sum, v);
  }
}

template <int M, Matrix kMatrix, int i = 0, class Put>
DSTS_INLINE void apply_pairs(const Vector* v, Put put) {
  if constexpr (i < kResults<M, kMatrix>) {
    Vector sum = {};
    add_pairs<M, kMatrix, i>(sum, v);
    put(i, sum);
    apply_pairs<M, kMatrix, i + 1>(v, put);
  }
}

template <int M, Matrix kMatrix, class Put>
DSTS_INLINE void apply(Vector* v, Put put) {
  if constexpr (kMatrix == Matrix::output || kMatrix == Matrix::weight) {
#pragma GCC unroll 4
    for (int j = 1; j + 1 < ::dsts::Winograd<M>::kInputs; j += 2) {
      const Vector sum = v[j] + v[j + 1], difference = v[j] - v[j + 1];
      v[j] = sum, v[j + 1] = difference;
    }
    apply_pairs<M, kMatrix>(v, put);
  } else {
    apply_rows<M, kMatrix>(v, put);
  }
}

DSTS_INLINE Vector vector_at(const float* p) {
  Vector v;
  memcpy(&v, p, sizeof v);
  return v;
}

// How the lines of a pass lie: `count` of them, each `length` floats long (whole vectors), in source and
// target; the elements that a transform combines, or gives, are `step` apart.
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

template <int kSize>
struct TileSize {
  static constexpr int value = kSize;
};

// f(TileSize<size>) for a size of the list. The binding has refused every other.
template <class F, int... kSizes>
DSTS_INLINE void with_tile(TileList<kSizes...>, int size, F f) {
  const bool listed = ((size == kSizes && (f(TileSize<kSizes>{}), true)) || ...);
  if (!listed) __builtin_trap();
}

template <class Tiles, Matrix kMatrix, bool kAdd = false>
void pass_of(int tile, const float* from, float* to, const Lines& l) {
  with_tile(Tiles{}, tile, [&](auto size) { pass<decltype(size)::value, kMatrix, kAdd>(from, to, l); });
}

inline int64_t inputs_of(int tile) { return tile == 1 ? 1 : tile + 2; }
inline int64_t lead_of(int tile) { return tile == 1 ? 0 : 1; }

}  // namespace
}  // namespace dsts::cpu::DSTS_ISA
