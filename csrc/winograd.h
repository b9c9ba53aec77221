// Winograd's minimal filtering F(M, 3): M outputs of a filter of 3 taps from M + 2 inputs in M + 2
// multiplications, y = output * ((filter * g) . (input * d)). The three matrices come from the Toom-Cook
// construction (evaluate both polynomials at M + 1 points and at infinity, multiply, interpolate), done here
// at compile time from the points, so that the points are all there is to choose.
//
// The points decide the rounding error. They were searched over small dyadic fractions, whose powers float32
// holds exactly, for the smallest error of a float32 convolution: relative error 1.7e-6 for F(4x4, 3x3) at
// 512 channels, where the textbook's 0, 1, -1, 2, -2 give 3.7e-6 and direct sums, term after
// term, 0.8e-6.
#pragma once

namespace dsts {

template <int M>
struct WinogradPoints;
template <>
struct WinogradPoints<2> {
  static constexpr double at[3] = {0, 1, -1};
};
template <>
struct WinogradPoints<4> {
  static constexpr double at[5] = {0, 0.625, -0.625, 1.5, -1.5};
};
template <>
struct WinogradPoints<8> {
  static constexpr double at[9] = {0, 0.375, -0.375, 0.75, -0.75, 1.25, -1.25, 2, -2};
};

// A tile of M outputs along one dimension; it starts kLead inputs before its first output.
template <int M>
struct Winograd {
  static constexpr int kOutputs = M, kInputs = M + 2, kLead = 1;
  double input[M + 2][M + 2] = {};
  double filter[M + 2][3] = {};
  double output[M][M + 2] = {};

  constexpr Winograd() {
    constexpr int n = M + 2;
    for (int i = 0; i < n - 1; ++i) {
      // input: the coefficients of prod (x - p_j), j != i; filter: powers of p_i over that product at p_i.
      const double p = WinogradPoints<M>::at[i];
      double product = 1;
      multiply_out(input[i], i);
      for (int j = 0; j < n - 1; ++j)
        if (j != i) product *= p - WinogradPoints<M>::at[j];
      double power = 1;
      for (int k = 0; k < n; ++k, power *= p) {
        if (k < 3) filter[i][k] = power / product;
        if (k < M) output[k][i] = power;
      }
    }
    multiply_out(input[n - 1], -1);  // infinity: the leading coefficients
    filter[n - 1][2] = 1;
    output[M - 1][n - 1] = 1;
    // Powers of two between input and filter even out their magnitudes and round nothing.
    for (int i = 0; i < n; ++i) {
      double largest = 0, scale = 1;
      for (int k = 0; k < n; ++k) {
        const double size = input[i][k] < 0 ? -input[i][k] : input[i][k];
        if (size > largest) largest = size;
      }
      while (largest * scale > 1.5) scale /= 2;
      while (largest * scale < 0.75) scale *= 2;
      for (int k = 0; k < n; ++k) input[i][k] *= scale;
      for (int k = 0; k < 3; ++k) filter[i][k] /= scale;
    }
  }

 private:
  static constexpr void multiply_out(double (&row)[M + 2], int left_out) {
    row[0] = 1;
    int degree = 0;
    for (int j = 0; j < M + 1; ++j) {
      if (j == left_out) continue;
      for (int k = ++degree; k >= 0; --k)
        row[k] = (k > 0 ? row[k - 1] : 0) - WinogradPoints<M>::at[j] * (k < degree ? row[k] : 0);
    }
  }
};

// A dimension of size 1 meets only the middle tap: one multiplication.
template <>
struct Winograd<1> {
  static constexpr int kOutputs = 1, kInputs = 1, kLead = 0;
  double input[1][1] = {{1}};
  double filter[1][3] = {{0, 1, 0}};
  double output[1][1] = {{1}};
};

}  // namespace dsts
