// Routing: a product of samples' sums and neurons' scoring kernels, bound by reading the kernels. A task is one
// neuron, whose kernel stays in cache for all samples.
#include "cpu/route.h"

#include "cpu/scalar.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

// Four streams, so that the adder's latency does not set the pace.
double inner(const float* a, const float* b, int64_t n) {
  double s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  const int64_t q = n / 4;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t i = 0; i < q; ++i) {
    s0 += double(a[i]) * b[i];
    s1 += double(a[i + q]) * b[i + q];
    s2 += double(a[i + 2 * q]) * b[i + 2 * q];
    s3 += double(a[i + 3 * q]) * b[i + 3 * q];
  }
  for (int64_t i = 4 * q; i < n; ++i) s0 += double(a[i]) * b[i];
  return (s0 + s1) + (s2 + s3);
}

// As inner(), of C by `taps` sums and a row that has one more tap for each channel, which is left out.
double inner_beside(const float* sums, const float* row, int64_t C, int64_t taps) {
  double sum = 0;
  for (int64_t t = 0; t < taps; ++t) {
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < C; ++c) sum += double(sums[c * taps + t]) * row[c * (taps + 1) + t];
  }
  return sum;
}

// The first of the largest; NaN is the largest of all.
int64_t largest(const float* scores, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n && scores[best] == scores[best]; ++i)
    if (!(scores[i] <= scores[best])) best = i;
  return best;
}

}  // namespace

Status route(const Route& a) {
  const int64_t K = a.C * a.taps, width = a.C * (a.taps + a.centered);
  parallel_for(a.N, a.B * a.N * K, a.threads, [&](int64_t n) {
    const float* row = a.scoring + n * width;
    for (int64_t b = 0; b < a.B; ++b) {
      const float* sums = a.sums + b * K;
      const double sum = a.centered ? inner_beside(sums, row, a.C, a.taps) : inner(sums, row, K);
      a.scores[b * a.N + n] = float(sum / a.divisor + (a.centered ? row[a.taps] : 0));
    }
  });
  for (int64_t b = 0; b < a.B; ++b) a.neuron[b] = largest(a.scores + b * a.N, a.N);
  return Status::ok;
}

}  // namespace dsts::cpu::DSTS_ISA
