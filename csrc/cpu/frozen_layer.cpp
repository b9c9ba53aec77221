// Nothing is computed here but which samples share a call.
#include "cpu/frozen_layer.h"

#include <algorithm>
#include <memory>
#include <new>

#include "cpu/by_neuron.h"
#include "cpu/winograd_tiles.h"

namespace dsts::cpu {

namespace {

constexpr int64_t kBlockOutputs = 16;  // of a packed filter: packing.BLOCK
// What a point of a tile costs besides its product: its filter's transform, in rows of the product. On a 2-core
// AVX-512 machine the transform of 46 points took 1.25 ms where the product of 7168 rows in all took 16.
constexpr int64_t kFilterRows = 12;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t padded(int64_t outputs) { return ceil_div(outputs, kBlockOutputs) * kBlockOutputs; }

template <class Tiles>
int64_t points_of(int tile) {
  for (int i = 0; i < Tiles::kCount; ++i)
    if (Tiles::sizes[i] == tile) return Tiles::inputs[i];
  return 0;
}

// A filter packed in blocks at `element`, over `count` channels listed from `channels` on (null: 0, 1, ...).
Operator packed(void* flat, int64_t element, DType dtype, int64_t count, const int32_t* channels) {
  Operator op{};
  op.weight = static_cast<char*>(flat) + element * bytes_of(dtype);
  op.dtype = dtype, op.k_channels = count, op.channels = channels, op.blocked = true;
  return op;
}

// Channels-last features [batch, channels, T, H, W] in memory that is already there.
Features features_at(void* data, int64_t batch, int64_t channels, const Features& grid, DType dtype) {
  const int64_t w = channels, h = w * grid.W, t = h * grid.H;
  return {data, batch, channels, grid.T, grid.H, grid.W, {t * grid.T, 1, t, h, w}, dtype};
}

// Memory that is not cleared; throws std::bad_alloc.
std::unique_ptr<char[]> memory(size_t bytes) {
  return std::unique_ptr<char[]>(new char[std::max<size_t>(bytes, 1)]);
}

// A neuron's operators on some of the samples, which the epilogue names.
Status run_neuron(const FrozenLayer& layer, const Features& x, int64_t n, Epilogue epilogue,
                  const FrozenCall& call) {
  const int64_t split = layer.starts[n + 1] - layer.starts[n], count = epilogue.samples.count;
  const int32_t* list = layer.channels + n * layer.C;
  Winograd a{};
  a.x = x, a.samples = epilogue.samples, a.threads = call.threads, a.stage_seconds = call.stage_seconds;
  if (split > 0) a.spatial = packed(layer.filters, layer.first[n], layer.dtype, split, list);
  if (split < layer.C)
    a.temporal = packed(layer.filters, layer.first[n] + padded(layer.O) * 9 * split, layer.dtype,
                        layer.C - split, list + split);
  a.tiles = tile_sizes(count, x.T, x.H, x.W);
  epilogue.bias = layer.bias + n * layer.O;
  if (!layer.mixing) {
    a.epilogue = epilogue;
    return winograd(a);
  }
  const auto z = memory(size_t(count * x.T * x.H * x.W * layer.O) * sizeof(float));
  a.epilogue.out = features_at(z.get(), count, layer.O, x, kFloat32);
  a.epilogue.samples = {nullptr, count}, a.epilogue.taps = 1;
  const Status status = winograd(a);
  if (status != Status::ok) return status;
  Winograd mix{};
  mix.x = a.epilogue.out, mix.samples = {nullptr, count}, mix.tiles = a.tiles;
  mix.threads = call.threads, mix.stage_seconds = call.stage_seconds;
  (layer.mixing_taps == 3 ? mix.temporal : mix.spatial) =
      packed(layer.mixing, n * layer.mixing_elements(), layer.dtype, layer.O, nullptr);
  mix.epilogue = epilogue;
  return winograd(mix);
}

// One layer: `sums` are those of x, taken where they are null.
Status run_layer(const FrozenLayer& layer, const Features& x, const float* sums, Epilogue epilogue,
                 int64_t* neuron, float* scores, const FrozenCall& call) {
  const int64_t positions = x.T * x.H * x.W;
  const double divisor = std::max<double>(1, double(layer.score_elements) * double(positions));
  const Status status = choose_neurons(x, sums, layer.scoring, layer.N, layer.taps, layer.centered, divisor,
                                       scores, neuron, call.threads);
  if (status != Status::ok || x.B * layer.O * positions == 0) return status;
  return by_neuron(neuron, x.B, positions, [&](int64_t n, Samples samples) {
    epilogue.samples = samples;
    return run_neuron(layer, x, n, epilogue, call);
  });
}

}  // namespace

TileSizes tile_sizes(int64_t batch, int64_t t, int64_t h, int64_t w) {
  const auto fits = [](int64_t size, int tile) { return (tile == 1) == (size == 1); };
  TileSizes best{};
  int64_t least = -1;
  for (const int i : SpatialTiles::sizes)
    for (const int j : SpatialTiles::sizes) {
      if (!fits(h, i) || !fits(w, j)) continue;
      const int64_t points = points_of<SpatialTiles>(i) * points_of<SpatialTiles>(j);
      const int64_t cost = points * (batch * t * ceil_div(h, i) * ceil_div(w, j) + kFilterRows);
      if (least < 0 || cost < least || (cost == least && i * j > best.h * best.w))
        least = cost, best.h = i, best.w = j;
    }
  least = -1;
  for (const int k : TemporalTiles::sizes) {
    if (!fits(t, k)) continue;
    const int64_t cost = points_of<TemporalTiles>(k) * (batch * h * w * ceil_div(t, k) + kFilterRows);
    if (least < 0 || cost <= least) least = cost, best.t = k;
  }
  return best;
}

bool FrozenLayer::takes_taps(int64_t all) {
  taps = all > 2 ? 9 : 1, centered = all == taps + 1;
  return centered || all == taps;
}

void FrozenLayer::place() {
  first.assign(1, 0);
  for (int64_t n = 0; n < N; ++n) {
    const int64_t split = starts[n + 1] - starts[n];
    first.push_back(first.back() + padded(O) * (9 * split + 3 * (C - split)));
  }
}

int64_t FrozenLayer::mixing_elements() const { return padded(O) * mixing_taps * O; }

Status frozen_layers(const FrozenLayer* const* layers, int count, const FrozenCall& call) try {
  const int64_t B = call.x.B;
  const Features& grid = call.x;
  Features x = call.x;
  const float* sums = call.sums;
  // Features between layers, and their sums, in two pieces of memory that take turns.
  std::unique_ptr<char[]> between[2];
  int64_t widest = 0;  // of those features
  for (int l = 0; l + 1 < count; ++l) widest = std::max(widest, layers[l]->O);
  std::vector<float> between_sums[2], scores(call.neuron ? 0 : size_t(B * layers[0]->N));
  std::vector<int64_t> neuron(call.neuron ? 0 : size_t(B));
  for (int l = 0; l < count; ++l) {
    const FrozenLayer& layer = *layers[l];
    const bool last = l + 1 == count;
    Epilogue epilogue{};
    epilogue.relu = layer.relu;
    epilogue.taps = last ? call.next_taps : layers[l + 1]->taps;
    if (last) {
      epilogue.out = call.y, epilogue.skip = call.skip, epilogue.sums = call.next_sums;
    } else {
      if (l < 2)
        between[l % 2] = memory(size_t(B * widest * grid.T * grid.H * grid.W * bytes_of(call.x.dtype)));
      between_sums[l % 2].resize(size_t(B * layer.O * epilogue.taps));
      epilogue.out = features_at(between[l % 2].get(), B, layer.O, grid, call.x.dtype);
      epilogue.sums = between_sums[l % 2].data();
    }
    epilogue.sums_stride_b = layer.O * epilogue.taps;
    epilogue.taps = epilogue.sums ? epilogue.taps : 1;
    const Status status =
        run_layer(layer, x, sums, epilogue, call.neuron ? call.neuron + l * B : neuron.data(),
                  call.neuron ? call.scores + l * B * layer.N : scores.data(), call);
    if (status != Status::ok) return status;
    if (last) break;
    x = epilogue.out, sums = between_sums[l % 2].data();
  }
  return Status::ok;
} catch (const std::bad_alloc&) {
  return Status::no_memory;
}

}  // namespace dsts::cpu
