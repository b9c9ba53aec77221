// What layers that run in one call have in common: which neuron each sample chooses, and which samples share a
// convolution. Seen by files that call kernels, and by no kernel.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/route.h"
#include "cpu/tap_sums.h"

namespace dsts::cpu {

constexpr int64_t kCallPositions = 4096;  // groups.CALL_POSITIONS

inline int64_t bytes_of(DType dtype) {
  for (const DTypeFacts& known : kDTypes)
    if (known.dtype == dtype) return known.bytes;
  return 0;
}

// Scores [B, N] and neuron [B] of x by collapsed scoring kernels, centered or not (see Route); tap sums are taken
// where they are not given.
inline Status choose_neurons(const Features& x, const float* sums, const float* scoring, int64_t N, int taps,
                             bool centered, double divisor, float* scores, int64_t* neuron, int threads) {
  std::vector<float> own;
  if (!sums) {
    own.resize(size_t(x.B * x.C * taps));
    const Status status = tap_sums({x, own.data(), taps, threads});
    if (status != Status::ok) return status;
    sums = own.data();
  }
  return route({sums, scoring, x.B, N, x.C, taps, centered, divisor, scores, neuron, threads});
}

// run(n, samples) for the samples of each chosen neuron, in calls of at most kCallPositions positions; samples
// that are the whole batch have no list.
template <class F>
Status by_neuron(const int64_t* neuron, int64_t B, int64_t positions, F run) {
  const int64_t most = std::max<int64_t>(1, kCallPositions / std::max<int64_t>(1, positions));
  if (B <= most && std::all_of(neuron, neuron + B, [&](int64_t n) { return n == *neuron; }))
    return B ? run(*neuron, Samples{nullptr, B}) : Status::ok;
  std::vector<int64_t> order(B);
  for (int64_t b = 0; b < B; ++b) order[b] = b;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return neuron[a] < neuron[b]; });
  Status status = Status::ok;
  for (int64_t i = 0; i < B && status == Status::ok;) {
    const int64_t n = neuron[order[i]];
    int64_t end = i + 1;
    while (end < B && end - i < most && neuron[order[end]] == n) ++end;
    status = run(n, Samples{order.data() + i, end - i});
    i = end;
  }
  return status;
}

}  // namespace dsts::cpu
