// Frozen layers, and a whole frozen module, in one call: tap sums, scores, choice, groups of samples by neuron,
// and for each group one fast convolution (two where mixing does not fold). Put together from kernels, so
// compiled once. Python's dsts_kernels/ops/frozen_layer.py says what a layer computes.
#pragma once

#include <vector>

#include "cpu/winograd.h"

namespace dsts::cpu {

// A layer's weights, as Python's FrozenWeights and FrozenOptions; filters are packed in blocks (packing.py).
struct FrozenLayer {
  const float* scoring;     // [N, C, taps], or with one more tap: see Route
  const int32_t* channels;  // [N, C]: what a neuron's spatial operator reads, then its temporal one
  const int64_t* starts;    // [N + 1]: neuron n has starts[n + 1] - starts[n] spatial channels
  void* filters;            // flat
  const float* bias;        // [N, O]
  void* mixing;             // [N, packed], or null where it is folded
  DType dtype;              // of filters, mixing and features: float32 or half
  int64_t N, C, O;
  int taps;                // of scoring: 1 or 9, without the one more
  bool centered;           // whether it is there
  int mixing_taps;         // 9, spatial, or 3, temporal
  int64_t score_elements;  // of a position that a mean is over; 0: scores are sums
  bool relu;
  std::vector<int64_t> first;  // [N + 1]: where each neuron's filters begin, and the end

  // Whether scoring may have so many taps in all; if so, sets `taps` and `centered`.
  bool takes_taps(int64_t all);
  // Fills `first` in, from the sizes and `starts`.
  void place();
  int64_t mixing_elements() const;  // of a neuron's packed kernel
};

// What layers are run on, and where their results go. Layer l has row l of neuron and scores.
struct FrozenCall {
  Features x;         // [B, C, T, H, W], any strides
  const float* sums;  // tap sums of x [B, C, taps] where they are known, or null
  Features skip;      // added to the last layer's result, or absent
  Features y;         // [B, O, T, H, W], any strides
  float* next_sums;   // [B, O, next_taps], or null
  int next_taps;
  int64_t* neuron;  // [layers, B], or null: nobody asks
  float* scores;    // [layers, B, N], or null with it
  int threads;
  double* stage_seconds;  // see Winograd
};

// Layers one after the other, all of one N and each of the channels that the last one has outputs.
Status frozen_layers(const FrozenLayer* const* layers, int count, const FrozenCall& call);

// The tiles of lowest cost for `batch` samples of t frames of h by w.
TileSizes tile_sizes(int64_t batch, int64_t t, int64_t h, int64_t w);

}  // namespace dsts::cpu
