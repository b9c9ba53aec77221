// A frozen layer's convolution with one neuron for every sample: operands with known values, and what must
// come out.
//
// A neuron's first `split` channels go through a spatial operator (1x3x3), the others through a temporal one
// (3x1x1). Panels hold
// each list in whole K blocks, filters K blocks of a neuron behind one another, (blocks, O, 64), as
// csrc/cuda/conv.cu says.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "cuda/params.h"

namespace bare {

using Half = uint16_t;  // bits

constexpr int kBlock = dsts::cuda::kKBlockBytes / 2;  // channels of a K block
constexpr Half kNaN = 0x7fff;

// Of a normal number or zero that is exact in half precision.
inline Half to_half(float v) {
  if (v == 0) return 0;
  int exponent;
  const int fraction = static_cast<int>(std::frexp(std::fabs(v), &exponent) * 2048);  // [1024, 2048)
  return static_cast<Half>((v < 0) << 15 | (exponent + 14) << 10 | (fraction & 1023));
}

inline double from_half(Half h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 31) return NAN;
  const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return h >> 15 ? -size : size;
}

// Multiples of 1/64 in [-1, 1), by a linear congruential generator: the same everywhere.
class Values {
 public:
  Half next() { return to_half(static_cast<float>(static_cast<int>(bits() >> 25) - 64) / 64); }
  unsigned bits() {
    return static_cast<unsigned>((state_ = state_ * 6364136223846793005u + 1442695040888963407u) >> 32);
  }

 private:
  uint64_t state_ = 1;
};

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Layer {
  int batch, channels, t, h, w;  // as many outputs as channels
  int width;                     // columns of the panel
  std::vector<int> split,
      first;  // by neuron, which is the sample: channels of the spatial operator, first K block
  std::vector<dsts::cuda::Plan> plan;  // [batch]
  std::vector<Half> panel, filters;
  std::vector<float> bias;

  int positions() const { return t * h * w; }
  static int taps(bool temporal) { return temporal ? dsts::cuda::kTemporalTaps : dsts::cuda::kSpatialTaps; }
  int spatial_blocks(int n) const { return ceil_div(split[n], kBlock); }
  int temporal_blocks(int n) const { return ceil_div(channels - split[n], kBlock); }

  Layer(int batch, int channels, int t, int h, int w)
      : batch(batch), channels(channels), t(t), h(h), w(w), width((ceil_div(channels, kBlock) + 1) * kBlock) {
    Values values;
    int blocks = 0;
    for (int n = 0; n < batch; ++n) {
      split.push_back(static_cast<int>(static_cast<int64_t>(channels) * (n + 1) / (batch + 1)));
      first.push_back(blocks);
      plan.push_back({blocks, spatial_blocks(n), temporal_blocks(n), split[n], split[n], n});
      blocks += taps(false) * spatial_blocks(n) + taps(true) * temporal_blocks(n);
    }
    panel.assign(static_cast<size_t>(batch) * positions() * width, kNaN);
    for (int n = 0; n < batch; ++n)
      for (int position = 0; position < positions(); ++position)
        for (int column = 0; column < (spatial_blocks(n) + temporal_blocks(n)) * kBlock; ++column)
          panel[(static_cast<size_t>(n) * positions() + position) * width + column] =
              listed(n, column) ? values.next() : Half{0};
    filters.assign(static_cast<size_t>(blocks) * channels * kBlock, 0);
    for (int n = 0; n < batch; ++n)
      for (int temporal = 0; temporal < 2; ++temporal)
        for (int c = 0; c < (temporal ? channels - split[n] : split[n]); ++c)
          for (int tap = 0; tap < taps(temporal); ++tap)
            for (int o = 0; o < channels; ++o) filters[filter_at(n, temporal, c, tap, o)] = values.next();
    for (int i = 0; i < batch * channels; ++i) bias.push_back(static_cast<float>(from_half(values.next())));
  }

  // Whether a column of sample n's panel holds a channel: the rest fills K blocks.
  bool listed(int n, int column) const {
    const int temporal_column = spatial_blocks(n) * kBlock;
    return column < temporal_column ? column < split[n] : column - temporal_column < channels - split[n];
  }

  size_t filter_at(int n, int temporal, int c, int tap, int o) const {
    const int block = c / kBlock;
    const int number =
        first[n] + (temporal ? taps(false) * spatial_blocks(n) : 0) + block * taps(temporal) + tap;
    return (static_cast<size_t>(number) * channels + o) * kBlock + c % kBlock;
  }

  // One output, before rounding, and the sum of its terms' sizes.
  double expected(int n, int position, int o, double* size) const {
    const int at_w = position % w, at_h = position / w % h, at_t = position / w / h;
    double sum = bias[static_cast<size_t>(n) * channels + o];
    *size = std::fabs(sum);
    for (int temporal = 0; temporal < 2; ++temporal)
      for (int tap = 0; tap < taps(temporal); ++tap) {
        const int from_t = at_t + (temporal ? tap - 1 : 0), from_h = at_h + (temporal ? 0 : tap / 3 - 1);
        const int from_w = at_w + (temporal ? 0 : tap % 3 - 1);
        if (from_t < 0 || from_t >= t || from_h < 0 || from_h >= h || from_w < 0 || from_w >= w) continue;
        const size_t row = static_cast<size_t>(n) * positions() + (from_t * h + from_h) * w + from_w;
        for (int c = 0; c < (temporal ? channels - split[n] : split[n]); ++c) {
          const double term =
              from_half(panel[row * width + (temporal ? spatial_blocks(n) * kBlock : 0) + c]) *
              from_half(filters[filter_at(n, temporal, c, tap, o)]);
          sum += term, *size += std::fabs(term);
        }
      }
    return sum < 0 ? 0 : sum;  // ReLU
  }

  // Useful work; multiplications with what fills K blocks and with what lies outside count for nothing, or
  // for all.
  double operations() const {
    double terms = 0;
    for (const int n : split) terms += 9.0 * n + 3.0 * (channels - n);
    return 2 * terms * channels * positions();
  }

  double bytes() const {  // each operand once
    return sizeof(Half) *
           (static_cast<double>(batch) * positions() * 2 * channels + static_cast<double>(filters.size()));
  }
};

}  // namespace bare
