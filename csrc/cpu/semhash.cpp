// Improved SemHash gate, forward and backward. Small tensors (B x C, N x C): what matters is one pass, the
// accumulation order of the backward, and that nothing of one sample reaches another neuron's row.
#include "cpu/semhash.h"

#include "../semhash.h"
#include "cpu/scalar.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

constexpr int64_t kColumns = 256;

bool neurons_valid(const int64_t* neuron, int64_t B, int64_t N) {
  for (int64_t b = 0; neuron && b < B; ++b)
    if (neuron[b] < 0 || neuron[b] >= N) return false;
  return true;
}

template <class T>
void forward_row(const SemhashForward& a, int64_t b) {
  const int64_t row = a.neuron ? a.neuron[b] : b;
  const T* logits = static_cast<const T*>(a.logits) + row * a.C;
  const T* noise = a.noise ? static_cast<const T*>(a.noise) + b * a.C : nullptr;
  T* gate = static_cast<T*>(a.gate) + b * a.C;
  const bool hard = !a.hard || a.hard[b];
  for (int64_t c = 0; c < a.C; ++c) {
    const auto q = noise ? load(logits[c]) + load(noise[c]) : load(logits[c]);
    store(hard ? semhash_hard(q) : semhash_soft(q), gate + c);
  }
}

// One neuron's row, columns [c0, c0 + nc): the samples that chose it, in increasing order.
template <class T>
void backward_block(const SemhashBackward& a, int64_t n, int64_t c0, int64_t nc) {
  using A = acc_t<T>;
  A sum[kColumns] = {};
  const T* logits = static_cast<const T*>(a.logits) + n * a.C + c0;
  const int64_t first = a.neuron ? 0 : n, last = a.neuron ? a.B : min64(a.B, n + 1);
  for (int64_t b = first; b < last; ++b) {
    if (a.neuron && a.neuron[b] != n) continue;
    const T* grad = static_cast<const T*>(a.grad) + b * a.C + c0;
    const T* noise = a.noise ? static_cast<const T*>(a.noise) + b * a.C + c0 : nullptr;
    for (int64_t c = 0; c < nc; ++c) {
      const A slope = semhash_slope(noise ? load(logits[c]) + load(noise[c]) : load(logits[c]));
      // A saturated gate passes nothing on, not even 0 * Inf.
      if (slope != A(0)) sum[c] += load(grad[c]) * slope;
    }
  }
  T* out = static_cast<T*>(a.dlogits) + n * a.C + c0;
  for (int64_t c = 0; c < nc; ++c) store(sum[c], out + c);
}

}  // namespace

Status semhash_forward(const SemhashForward& a) {
  if (!neurons_valid(a.neuron, a.B, a.N)) return Status::bad_neuron;
  return with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(a.B, a.B * a.C, a.threads, [&](int64_t b) { forward_row<T>(a, b); });
    return Status::ok;
  });
}

Status semhash_backward(const SemhashBackward& a) {
  if (!neurons_valid(a.neuron, a.B, a.N)) return Status::bad_neuron;
  return with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t blocks = ceil_div(a.C, kColumns);
    parallel_for(a.N * blocks, (a.N + a.B) * a.C, a.threads, [&](int64_t task) {
      const int64_t c0 = task % blocks * kColumns;
      backward_block<T>(a, task / blocks, c0, min64(kColumns, a.C - c0));
    });
    return Status::ok;
  });
}

}  // namespace dsts::cpu::DSTS_ISA
