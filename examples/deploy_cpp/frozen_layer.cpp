// The op dsts_kernels::frozen_layer for libtorch, so that programs without Python run exported frozen modules with our
// kernels. What dsts_kernels/backends/grouped.py and winograd.py do in Python is done here: scores, choice, groups of
// samples by neuron, one native call for each. It takes what freeze() packs for a CPU (float32 and half types);
// schema, shapes and results are those of dsts_kernels/ops/frozen_layer.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>
#include <map>
#include <optional>
#include <string_view>
#include <vector>

#include "cpu/tap_sums.h"
#include "cpu/winograd.h"
#include "cpu/winograd_tiles.h"

namespace {

using at::Tensor;
namespace cpu = dsts::cpu;

constexpr int64_t kBlock = 16;            // outputs of a packed block: packing.BLOCK
constexpr int64_t kCallPositions = 4096;  // groups.CALL_POSITIONS
constexpr int64_t kFilterRows = 12;       // winograd.FILTER_ROWS

dsts::DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return dsts::kFloat32;
    case at::kBFloat16:
      return dsts::kBFloat16;
    case at::kHalf:
      return dsts::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "frozen_layer: ", name, " has dtype ", t.scalar_type(),
                       "; wanted float32, bfloat16 or float16: float64 runs with deploy.standard()");
  }
}

cpu::Features features_of(const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(t.dim() == 5, "frozen_layer: ", name, " has ", t.dim(), " dimensions; wanted 5");
  const auto n = t.sizes(), s = t.strides();
  return {t.data_ptr(), n[0], n[1], n[2], n[3], n[4], {s[0], s[1], s[2], s[3], s[4]}, dtype_of(name, t)};
}

// Channels-last memory (B, T, H, W, channels) as features (B, channels, T, H, W).
Tensor empty_features(const Tensor& x, int64_t batch, int64_t channels, at::ScalarType dtype) {
  return at::empty({batch, x.size(2), x.size(3), x.size(4), channels}, x.options().dtype(dtype))
      .permute({0, 4, 1, 2, 3});
}

void check(cpu::Status status) {
  TORCH_CHECK(status == cpu::Status::ok, "frozen_layer: a kernel had no memory");
}

template <class Tiles>
int64_t inputs_of(int tile) {
  for (int i = 0; i < Tiles::kCount; ++i)
    if (Tiles::sizes[i] == tile) return Tiles::inputs[i];
  return 0;
}

// The tile of lowest cost, the larger of equals: winograd.tile_sizes.
cpu::TileSizes tile_sizes(int64_t batch, const Tensor& x) {
  using cpu::SpatialTiles;
  using cpu::TemporalTiles;
  const int64_t t = x.size(2), h = x.size(3), w = x.size(4);
  const auto tiles = [](int64_t size, int64_t tile) { return (size + tile - 1) / tile; };
  const auto fits = [](int64_t size, int tile) { return (tile == 1) == (size == 1); };
  cpu::TileSizes best{};
  int64_t least = -1;
  for (const int i : SpatialTiles::sizes)
    for (const int j : SpatialTiles::sizes) {
      if (!fits(h, i) || !fits(w, j)) continue;
      const int64_t points = inputs_of<SpatialTiles>(i) * inputs_of<SpatialTiles>(j);
      const int64_t cost = points * (batch * t * tiles(h, i) * tiles(w, j) + kFilterRows);
      if (least < 0 || cost < least || (cost == least && i * j > best.h * best.w))
        least = cost, best.h = i, best.w = j;
    }
  least = -1;
  for (const int k : TemporalTiles::sizes) {
    if (!fits(t, k)) continue;
    const int64_t cost = inputs_of<TemporalTiles>(k) * (batch * h * w * tiles(t, k) + kFilterRows);
    if (least < 0 || cost <= least) least = cost, best.t = k;
  }
  return best;
}

// A packed filter of `taps` at element `start`, over `count` channels listed from `channels` on (null: 0, 1, ...).
cpu::Operator packed(const Tensor& flat, int64_t start, int64_t count, const int32_t* channels) {
  cpu::Operator op{};
  op.weight = static_cast<char*>(flat.data_ptr()) + start * flat.element_size();
  op.dtype = dtype_of("filters", flat), op.k_channels = count, op.channels = channels, op.blocked = true;
  return op;
}

// What the packed tensors of a layer hold.
struct Layer {
  const Tensor &channels, &starts, &filters, &bias;
  const std::optional<Tensor>& mixing;
  at::IntArrayRef mixing_kernel;

  int64_t neurons() const { return bias.size(0); }
  int64_t outputs() const { return bias.size(1); }
  int64_t inputs() const { return channels.size(1); }

  // Elements before each neuron's filters: its spatial panel, then its temporal one.
  std::vector<int64_t> filter_starts() const {
    const int64_t rows = (outputs() + kBlock - 1) / kBlock * kBlock, *at = starts.const_data_ptr<int64_t>();
    std::vector<int64_t> first{0};
    for (int64_t n = 0; n < neurons(); ++n) {
      const int64_t spatial = at[n + 1] - at[n];
      first.push_back(first.back() + rows * (9 * spatial + 3 * (inputs() - spatial)));
    }
    return first;
  }

  void check(const Tensor& x, const Tensor& scoring, std::string_view packing) const {
    TORCH_CHECK_VALUE(packing == "blocked", "frozen_layer: got filters packed as ", packing,
                      "; wanted blocked, as freeze() packs for a CPU that dsts_kernels has kernels for");
    TORCH_CHECK_VALUE(x.dim() == 5 && x.size(1) == inputs(), "frozen_layer: x has shape ", x.sizes(),
                      "; wanted (B, ", inputs(), ", T, H, W)");
    TORCH_CHECK_TYPE(x.scalar_type() == filters.scalar_type(), "frozen_layer: x has dtype ", x.scalar_type(),
                     "; wanted ", filters.scalar_type(), ", which the filters have");
    for (const Tensor& t : {scoring, channels, starts, filters, bias})
      TORCH_CHECK_VALUE(t.is_contiguous(), "frozen_layer: a weight has gaps; wanted dense ones");
    TORCH_CHECK_VALUE(filters.numel() == filter_starts().back(), "frozen_layer: filters has ",
                      filters.numel(), " elements; wanted ", filter_starts().back());
    TORCH_CHECK_VALUE(!mixing || (mixing->is_contiguous() && mixing_kernel.size() == 3),
                      "frozen_layer: mixing has gaps, or its kernel is not of three sizes");
  }
};

// One neuron on some of the samples.
void run(const Tensor& x, int64_t neuron, int64_t first, std::vector<int64_t>& samples, const Layer& layer,
         cpu::Epilogue epilogue) {
  const int64_t C = layer.inputs(), O = layer.outputs(), count = samples.size();
  const int64_t* starts = layer.starts.const_data_ptr<int64_t>();
  const int64_t split = starts[neuron + 1] - starts[neuron], rows = (O + kBlock - 1) / kBlock * kBlock;
  const int32_t* list = layer.channels.const_data_ptr<int32_t>() + neuron * C;
  cpu::Winograd a{};
  a.x = features_of("x", x), a.samples = {samples.data(), count};
  if (split > 0) a.spatial = packed(layer.filters, first, split, list);
  if (split < C) a.temporal = packed(layer.filters, first + rows * 9 * split, C - split, list + split);
  a.tiles = tile_sizes(count, x), a.threads = at::get_num_threads();
  epilogue.samples = {samples.data(), count};
  epilogue.bias = layer.bias.const_data_ptr<float>() + neuron * O;
  if (!layer.mixing) {
    a.epilogue = epilogue;
    check(cpu::winograd(a));
    return;
  }
  const Tensor z = empty_features(x, count, O, at::kFloat), kernel = layer.mixing->select(0, neuron);
  a.epilogue.out = features_of("z", z), a.epilogue.samples = {nullptr, count}, a.epilogue.taps = 1;
  check(cpu::winograd(a));
  cpu::Winograd mix{};
  mix.x = a.epilogue.out, mix.samples = {nullptr, count}, mix.tiles = a.tiles, mix.threads = a.threads;
  (layer.mixing_kernel[0] > 1 ? mix.temporal : mix.spatial) = packed(kernel, 0, O, nullptr);
  mix.epilogue = epilogue;
  check(cpu::winograd(mix));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> frozen_layer(
    const Tensor& x, const std::optional<Tensor>& given_sums, const std::optional<Tensor>& skip,
    const Tensor& scoring, const Tensor& channels, const Tensor& starts, const Tensor& filters,
    const Tensor& bias, const std::optional<Tensor>& mixing, int64_t score_elements,
    at::IntArrayRef mixing_kernel, bool relu, std::string_view packing, int64_t next_taps,
    std::optional<std::string_view>) {
  const Layer layer{channels, starts, filters, bias, mixing, mixing_kernel};
  layer.check(x, scoring, packing);
  const int64_t B = x.size(0), O = layer.outputs(), taps = scoring.size(2) > 2 ? 9 : 1;
  const bool centered = scoring.size(2) != taps;  // one more tap holds what is added to each score
  const int64_t positions = x.size(2) * x.size(3) * x.size(4);
  Tensor sums = given_sums ? given_sums->contiguous() : at::empty({B, x.size(1), taps}, scoring.options());
  if (!given_sums)
    check(
        cpu::tap_sums({features_of("x", x), sums.data_ptr(), static_cast<int>(taps), at::get_num_threads()}));
  Tensor scores = at::linear(sums.flatten(1), (centered ? scoring.narrow(2, 0, taps) : scoring).flatten(1));
  if (score_elements * positions > 1) scores = scores.div(score_elements * positions);
  if (centered) scores = scores + scoring.select(1, 0).select(1, taps);
  const Tensor neuron = scores.argmax(1);

  Tensor y = skip ? at::empty_like(*skip) : empty_features(x, B, O, x.scalar_type());
  Tensor next_sums = at::empty({B, O, next_taps}, scores.options());
  cpu::Epilogue epilogue{};
  epilogue.out = features_of("y", y), epilogue.relu = relu,
  epilogue.taps = next_taps ? static_cast<int>(next_taps) : 1;
  if (skip) epilogue.skip = features_of("skip", *skip);
  if (next_taps) epilogue.sums = next_sums.data_ptr(), epilogue.sums_stride_b = O * next_taps;

  std::map<int64_t, std::vector<int64_t>> chosen;
  if (y.numel())
    for (int64_t b = 0; b < B; ++b) chosen[neuron.const_data_ptr<int64_t>()[b]].push_back(b);
  const std::vector<int64_t> first = layer.filter_starts();
  const int64_t most = std::max<int64_t>(1, kCallPositions / std::max<int64_t>(1, positions));
  for (const auto& [index, all] : chosen)
    for (size_t i = 0; i < all.size(); i += most) {
      std::vector<int64_t> samples(all.begin() + i, all.begin() + std::min(all.size(), i + most));
      run(x, index, first[index], samples, layer, epilogue);
    }
  return {y, next_sums, neuron, scores};
}

}  // namespace

TORCH_LIBRARY(dsts_kernels, m) {
  m.def(
      "frozen_layer(Tensor x, Tensor? sums, Tensor? skip, Tensor scoring, Tensor channels, Tensor starts, "
      "Tensor filters, Tensor bias, Tensor? mixing, int score_elements, int[] mixing_kernel, bool relu, str "
      "packing, "
      "int next_taps, str? backend=None) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(dsts_kernels, CPU, m) { m.impl("frozen_layer", &frozen_layer); }
