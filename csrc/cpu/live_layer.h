// A layer on live weights in evaluation, but for mixing and norm, in one call: tap sums, scores, choice, hard gates,
// channel lists, and for each neuron one fast convolution. Put together from kernels, so compiled once.
#pragma once

#include "cpu/winograd.h"

namespace dsts::cpu {

struct LiveLayer {
  Features x;            // [B, C, T, H, W], any strides; float32 or half
  const float* scoring;  // [N, C, taps], collapsed
  int taps;
  double divisor;      // of scores
  const void* logits;  // [N, C]; these three in the dtype of x
  void* spatial;       // [N, O, C, 9]
  void* temporal;      // [N, O, C, 3]
  int64_t N;
  Features z;       // [B, O, T, H, W], any strides: takes the gated convolution
  int64_t* neuron;  // [B]
  float* scores;    // [B, N]
  void* gate;       // [B, C]: hard, in the dtype of x
  int threads;
  double* stage_seconds;  // see Winograd
};

Status live_layer(const LiveLayer& a);

}  // namespace dsts::cpu
