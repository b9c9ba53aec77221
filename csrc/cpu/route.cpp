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

// The first of the largest; NaN is the largest of all.
int64_t largest(const float* scores, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n && scores[best] == scores[best]; ++i)
    if (!(scores[i] <= scores[best])) best = i;
  return best;
}

}  // namespace

Status route(const Route& a) {
  parallel_for(a.N, a.B * a.N * a.K, a.threads, [&](int64_t n) {
    for (int64_t b = 0; b < a.B; ++b)
      a.scores[b * a.N + n] = float(inner(a.sums + b * a.K, a.scoring + n * a.K, a.K) / a.divisor);
  });
  for (int64_t b = 0; b < a.B; ++b) a.neuron[b] = largest(a.scores + b * a.N, a.N);
  return Status::ok;
}

}  // namespace dsts::cpu::DSTS_ISA
