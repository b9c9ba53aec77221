// What each CUDA kernel is given, one struct by value, of addresses, sizes and strides; and its launcher. Read
// by the kernels, by the bindings and by benchmarks/compiled/bare, so it knows neither torch nor the standard
// library.
// Sizes are in elements; rows of panels and of filters by tap are padded to whole 16 bytes, so a `pitch`
// apart, with zeros where they are summed over.
//
// A *list* is one order of a sample's (or slot's) channels: those that only the spatial operator reads, those
// that both read, those that only the temporal one reads. A *slot* numbers the neurons that a batch chose.
//
// Shapes: B samples, N neurons, S slots, C channels, O outputs, K channels of a reduction, T, H, W frames,
// rows and columns, L lists (B, or S by slot).
#pragma once

#include "cuda/tiles.h"

namespace dsts::cuda {

using int64 = long long;

// One list's reduction, as Plan of dsts_kernels/backends/gpu/lists.py.
struct Plan {
  int filters;           // first K block of packed filters, else their slot: -1 without one
  int spatial_blocks;    // K blocks of the spatial operator
  int temporal_blocks;   // and of the temporal one
  int spatial_channels;  // that the spatial operator reads: the list's first
  int temporal_start;    // where in the list those of the temporal one start: to its end
  int row;               // of the list among all, and of the bias
};
static_assert(sizeof(Plan) == 6 * sizeof(int), "a plan is six ints side by side in an int32 tensor");

// n / divisor for 0 <= n < 2^31 by a multiplication (Granlund and Montgomery, 1994).
struct FastDivmod {
  unsigned divisor, magic, shift;
};

DSTS_BOTH_SIDES constexpr FastDivmod fast_divmod(int divisor) {
  unsigned shift = 0;
  while ((1ull << shift) < static_cast<unsigned>(divisor)) ++shift;
  const unsigned long long one = 1, magic = ((one << 32) * ((one << shift) - divisor)) / divisor + 1;
  return {static_cast<unsigned>(divisor), static_cast<unsigned>(magic), shift};
}

// Frames, rows and columns of features.
struct Extent {
  int t, h, w, positions;
  FastDivmod w_divmod, h_divmod;
};

DSTS_BOTH_SIDES constexpr Extent extent_of(int t, int h, int w) {
  return {t, h, w, t * h * w, fast_divmod(w), fast_divmod(h)};
}

struct Strides {
  int64 b, c, t, h, w;
};

struct SemhashParams {
  const void* grad;           // [B, C], backward only
  const void* logits;         // [N, C]
  const void* noise;          // [B, C], or null
  const int64* neuron;        // [B], or null: row b of logits for sample b
  const unsigned char* hard;  // [B], or null: all hard
  void* out;                  // gate [B, C], or dlogits [N, C]
  int batch, neurons, channels;
};

struct TapSumsParams {
  const void* x;  // [B, C, T, H, W] by x_strides
  float* sums;    // [B, parts, C, taps]
  Extent extent;
  Strides x_strides;
  int batch, channels, parts;
  int vector;  // 16 bytes at a time along the side that lies at stride 1
};

struct GroupParams {
  const int64* neuron;  // [B]
  int* slots;           // [B], of each sample's neuron; -1 where that is out of range
  int* neuron_of;       // [S], -1 where no neuron has the slot
  int* slot_of;         // [N], -1 where no sample chose the neuron
  int* groups;          // [S, 2]: first member of a slot, how many
  int* members;         // [B], samples sorted by neuron
  int batch, neurons, num_slots;
};

constexpr int kReadBySpatial = 1, kReadByTemporal = 2;

struct ListParams {
  const float* gate;     // [B, C]
  const int* slots;      // [B]
  const int* neuron_of;  // [S]
  const int* groups;     // [S, 2]
  const int* members;    // [B]
  int* order;            // [L, C]
  Plan* plans;           // [L]
  signed char* listed;   // [L, C], by slot only: kReadBySpatial, kReadByTemporal or their sum
  int num_lists, channels, k_block, by_slot;
};

// What a panel is gathered from, and how.
struct GatherParams {
  const void* x;  // [B, C, T, H, W] by x_strides
  void* panel;    // [B, T, H, W, pitch]
  Extent extent;
  Strides x_strides;
  int batch, channels, pitch;
  int splits;                 // CTAs that share a sample's positions, or its lists' K blocks
  int whole_positions;        // that a CTA takes at a time with all channels, x_strides.w apart; or 0
  int turned;                 // positions lie side by side: 16 bytes of a channel at a time
  FastDivmod vectors_divmod;  // 16 bytes of a position that is taken whole
};

// Training: by lists of samples, or of slots where `slots` is given.
struct GatherPanelParams {
  GatherParams gather;
  const int* order;     // [L, C]
  const int* slots;     // [B], or null: list b for sample b
  const Plan* plans;    // [L]
  const float* gate;    // [B, C]
  const int64* neuron;  // [B]
  int neurons;
};

// Frozen: the choice of the neuron, whose lists are taken, and what the convolution that follows needs.
struct RouteParams {
  GatherParams gather;
  const float* sums;       // [B, parts, C * taps]
  const float* scoring;    // [N, C * taps]
  const int* channels_of;  // [N, C]: lists of neurons
  const int64* starts;     // [N + 1]: where in a table of spatial channels each neuron's start
  Plan* plan;              // [B]
  int64* neuron;           // [B]
  float* scores;           // [B, N]
  int* arrival_counters;   // [num_arrival_counters], zeroed here
  float divisor;
  int neurons, parts, taps, num_arrival_counters;
};

struct FilterParams {
  const void* from;           // pack: weight [N, O, C, taps]; unpack: filters [S * all_taps, O or C, pitch]
  void* to;                   // the other of the two
  const int* index;           // pack: neuron_of [S]; unpack: slot_of [N]
  const signed char* listed;  // unpack: [S, C], or null
  int outputs, channels, taps, first_tap, all_taps, by_channel;
  int pitch;   // of rows by tap
  int reader;  // kReadBySpatial, kReadByTemporal or both: channels that are not so `listed` get zeros
  FastDivmod taps_divmod;
  int vector;  // what is not padded here, parameters and gradients, goes 16 bytes at a time
};

struct ConvParams {
  const void* panel;      // [B, T, H, W, pitch]
  const void* filters;    // one of the four forms of conv.cu
  const int* order;       // [L, k_channels]: lists, for listed filters
  const Plan* plan;       // [B], or null: one operator on all columns, filters by `index`
  const void* index;      // [B] int64 or int32: the neuron, where there is no plan
  const float* bias;      // [N, O], or null
  const void* skip;       // [B, O, T, H, W] by out_strides, or null
  void* out;              // [B, O, T, H, W] by out_strides
  float* tile_sums;       // [B, tiles of positions, O, sum_taps], or null
  float* sums;            // [B, O, sum_taps], or null
  float* workspace;       // [2 * num_ctas, kTile * kTile]: parts of tiles that several CTAs share
  int* arrival_counters;  // [num_ctas + B * tiles of outputs], zeros
  Extent extent;
  Strides out_strides;
  int batch, width, pitch, k_channels, slots, outputs, filter_pitch;
  // Of the spatial operator, or of a mixing kernel in its place; the temporal one is 3x1x1 or absent.
  int kt, kh, kw, spatial_taps, temporal_taps, sign;
  int index_64, packed, relu, sum_taps;
  int num_ctas, waves, idle_percent;  // see schedule.h
  int vector_out;                     // 16 bytes at a time
};

struct DataGradientParams {
  const void* grad;     // [B, T, H, W, pitch]
  const void* filters;  // [S * 12, C, pitch]
  const int* order;     // [B, C]
  const Plan* plans;    // [B]
  const float* gate;    // [B, C]
  const void* x;        // [B, C, T, H, W] by x_strides
  void* dx;             // the same, or null where not wanted
  float* dgate;         // [B, tiles of positions, C], or null where not wanted
  Extent extent;
  Strides x_strides;
  int batch, channels, outputs, pitch, listed;
};

struct WeightGradientParams {
  const void* left;      // [B, T, H, W, left_pitch]: rows of the result, shifted by a tap
  const void* right;     // [B, T, H, W, right_pitch]: its columns
  const int* order;      // [S, rows], or null: every row, in order
  const Plan* plans;     // [S], with `order`
  const int* neuron_of;  // [S]
  const int* groups;     // [S, 2]
  const int* members;    // [B]
  void* out;             // [S or N, taps, rows, columns]
  Extent extent;
  int left_pitch, right_pitch, rows, columns, slots;
  int kt, kh, kw, spatial_taps, temporal_taps, sign;  // as in ConvParams
  int by_neuron, out_float;
};

#ifndef __CUDACC_RTC__
// Launchers, one for each kernel. `dtype` is that of the features; nothing is allocated, nothing waits.
void semhash(const SemhashParams&, bool backward, int dtype, void* stream);
void tap_sums(const TapSumsParams&, int taps, int dtype, void* stream);
void group_samples(const GroupParams&, void* stream);
void list_channels(const ListParams&, void* stream);
void gather_panel(const GatherPanelParams&, int dtype, void* stream);
void route_and_gather(const RouteParams&, int dtype, void* stream);
void pack_filters(const FilterParams&, int slots, int from_dtype, int to_dtype, void* stream);
void unpack_filters(const FilterParams&, int neurons, int dtype, void* stream);

// `tf32` multiplies float32 in tensor cores (sm_80 and later), else it is exact.
void conv(const ConvParams&, bool by_output, int dtype, bool tf32, int capability, void* stream);
void data_gradient(const DataGradientParams&, int dtype, bool tf32, int capability, void* stream);
void weight_gradient(const WeightGradientParams&, int dtype, bool tf32, int capability, void* stream);
#endif

}  // namespace dsts::cuda
