// What each CUDA kernel is given: one struct by value, of addresses, sizes and strides. Read by the kernels,
// by their launchers and by benchmarks/compiled/bare, so it knows neither torch nor the standard library.
// Sizes are in elements; rows of panels and of filters by tap are padded to whole 16 bytes, so a `pitch`
// apart, with zeros where they are summed over.
//
// A *list row* is one order of a sample's (or slot's) channels: those that only the first operator reads,
// those that both read, those that only the second reads. A *plan* is six ints a row: first K block or slot
// of its filters, K blocks of either operator, channels of the first, where the second one's list starts, row
// of its list and bias. A *slot* numbers the neurons that a batch chose.
#pragma once

namespace dsts::cuda {

using int64 = long long;

constexpr int kFloat32 = 0, kBFloat16 = 2, kFloat16 = 3;  // dtype codes, those of the CPU kernels
constexpr int kPlan = 6;
constexpr int kTile = 128;         // positions and outputs of a tile of a product
constexpr int kBlockBytes = 128;   // of a K block: 64 channels of a half type, 32 of float32
constexpr int kGather = 64;        // positions of a block that gathers
constexpr int kRowsBytes = 16384;  // of whole rows of features that such a block holds
constexpr int kLeast = 8;          // K blocks: what a program of a shared tile takes at least

// n / divisor for 0 <= n < 2^31 by a multiplication (Granlund and Montgomery, 1994).
struct Divide {
  unsigned divisor, magic, shift;
};

// Frames, rows and columns of features.
struct Extent {
  int t, h, w, positions;
  Divide by_w, by_h;
};

struct Strides {
  int64 b, c, t, h, w;
};

struct SemhashParams {
  const void *grad, *logits, *noise;  // grad: backward only; noise may be null
  const int64* neuron;                // null: row b of logits for sample b
  const unsigned char* hard;          // null: all hard
  void* out;                          // gate (B, C), or dlogits (N, C)
  int batch, neurons, channels;
};

struct TapSumsParams {
  const void* x;
  float* sums;  // (B, parts, C, taps)
  Extent extent;
  Strides x_strides;
  int batch, channels, parts;
  int vector;  // 16 bytes at a time along the side that lies at stride 1
};

struct GroupParams {
  const int64* neuron;                                  // (B,)
  int *slots, *neuron_of, *slot_of, *groups, *members;  // (B,), (S,), (N,), (S, 2), (B,)
  int batch, neurons, slot_count;
};

struct ListParams {
  const float* gate;  // (B, C)
  const int *slots, *neuron_of, *groups, *members;
  int *order, *plans;   // (rows, C), (rows, 6)
  signed char* listed;  // (rows, C), by slot only
  int rows, channels, block, by_slot;
};

struct GatherParams {
  const void* x;
  Extent extent;
  Strides x_strides;
  void* panel;  // (B, T, H, W, pitch)
  int batch, channels, pitch, shares;
  int rows;           // of features that a block takes whole at a time, positions x_strides.w apart; or 0
  Divide by_vectors;  // 16 bytes of a row
  // Training: lists of samples, or of slots where `slots` is given.
  const int *order, *slots, *plans;
  const float* gate;
  const int64* neuron;
  // Frozen: the choice of the neuron, and what the convolution that follows needs.
  const float *sums, *scoring;  // (B, parts, C * taps), (N, C * taps)
  const int* channels_of;       // (N, C)
  const int64* starts;          // (N + 1,)
  int* plan;                    // (B, 6)
  int64* chosen;                // (B,)
  float* scores;                // (B, N)
  int* flags;                   // zeroed
  float divisor;
  int neurons, parts, taps, flag_count;
};

struct FilterParams {
  const void* from;
  void* to;
  const int* index;           // pack: neuron_of (S,); unpack: slot_of (N,)
  const signed char* listed;  // unpack: (S, C), or null
  int outputs, channels, taps, first_tap, all_taps, by_channel, pitch, bit;  // pitch: of rows by tap
  Divide by_taps;
  int vector;  // what is not padded here, parameters and gradients by tap, goes 16 bytes at a time
};

struct ConvParams {
  const void* panel;    // (B, T, H, W, pitch)
  const void* filters;  // one of the four forms of conv.cu
  const int* order;     // listed filters: list rows (., rows)
  const int* plan;      // (B, 6), or null: one operator on all columns, filters by `index`
  const void* index;    // (B,) int64, or int32
  const float* bias;    // (., outputs) or null
  const void* skip;     // null, or as `out`
  void* out;
  float *part_sums, *sums;  // tap sums by tile, and of a sample; null without
  float* partial;           // two tiles a program
  int* flags;               // zeros: one a program, then one for every sample and block of outputs
  Extent extent;
  Strides out_strides;
  int batch, width, pitch, rows, slots, outputs, filter_pitch;
  int kt, kh, kw, taps_1, taps_2, sign;  // of the first operator; the second is 3x1x1 or absent
  int index_wide, packed, relu, sum_taps;
  int programs, waves, vector_out;  // vector: 16 bytes at a time
};

struct DataGradientParams {
  const void* grad;     // (B, T, H, W, pitch)
  const void* filters;  // (slots, 12, C, pitch)
  const int *order, *plans;
  const float* gate;  // (B, C)
  const void* x;
  void* dx;      // null where not wanted
  float* dgate;  // (B, tiles, C), null where not wanted
  Extent extent;
  Strides x_strides;  // of x and dx
  int batch, channels, outputs, pitch, listed;
};

struct WeightGradientParams {
  const void *left, *right;  // panels (B, T, H, W, .): rows of the result, shifted by a tap, and its columns
  const int *order, *plans;  // null: every row, in order
  const int *neuron_of, *groups, *members;
  void* out;  // (slots or N, taps, rows, columns)
  Extent extent;
  int left_pitch, right_pitch, rows, columns, slots;
  int kt, kh, kw, taps_1, taps_2, sign;
  int by_neuron, out_float;
};

}  // namespace dsts::cuda
