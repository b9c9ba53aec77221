#include "cpu/live_layer.h"

#include <new>

#include "cpu/by_neuron.h"
#include "cpu/frozen_layer.h"
#include "cpu/semhash.h"

namespace dsts::cpu {

namespace {

// A neuron's filter [O, C, taps] on its listed channels.
Operator listed(void* weights, int64_t neuron, int64_t O, int64_t C, int64_t taps,
                const std::vector<int32_t>& list, DType dtype) {
  Operator op{};
  op.weight = static_cast<char*>(weights) + neuron * O * C * taps * bytes_of(dtype);
  op.dtype = dtype, op.k_channels = int64_t(list.size());
  op.channels = op.k_list = list.data();
  op.stride_o = C * taps, op.stride_k = taps, op.stride_tap = 1;
  return op;
}

// Channels whose hard gate is open, and those whose gate is closed.
void lists_of(const void* gate, int64_t C, DType dtype, std::vector<int32_t>& open,
              std::vector<int32_t>& closed) {
  open.clear(), closed.clear();
  for (int64_t c = 0; c < C; ++c) {  // the gate is 0 or 1, and 0 has no bit set
    const bool is_open = bytes_of(dtype) == 4 ? static_cast<const uint32_t*>(gate)[c] != 0
                                              : static_cast<const uint16_t*>(gate)[c] != 0;
    (is_open ? open : closed).push_back(int32_t(c));
  }
}

}  // namespace

Status live_layer(const LiveLayer& a) try {
  const Features& x = a.x;
  const int64_t C = x.C, O = a.z.C, positions = x.T * x.H * x.W;
  Status status =
      choose_neurons(x, nullptr, a.scoring, a.N, a.taps, false, a.divisor, a.scores, a.neuron, a.threads);
  if (status != Status::ok) return status;
  status = semhash_forward({a.logits, a.neuron, nullptr, nullptr, a.gate, x.B, a.N, C, x.dtype, a.threads});
  if (status != Status::ok || x.B * positions == 0) return status;
  std::vector<int32_t> open, closed;
  return by_neuron(a.neuron, x.B, positions, [&](int64_t n, Samples samples) {
    const int64_t first = samples.index ? samples.index[0] : 0;
    lists_of(static_cast<const char*>(a.gate) + first * C * bytes_of(x.dtype), C, x.dtype, open, closed);
    Winograd w{};
    w.x = x, w.samples = samples;
    if (!open.empty()) w.spatial = listed(a.spatial, n, O, C, 9, open, x.dtype);
    if (!closed.empty()) w.temporal = listed(a.temporal, n, O, C, 3, closed, x.dtype);
    w.temporal.complement = true;
    w.tiles = tile_sizes(samples.count, x.T, x.H, x.W);
    w.epilogue.out = a.z, w.epilogue.samples = samples, w.epilogue.taps = 1;
    w.threads = a.threads, w.stage_seconds = a.stage_seconds;
    return winograd(w);
  });
} catch (const std::bad_alloc&) {
  return Status::no_memory;
}

}  // namespace dsts::cpu
