// The op dsts_kernels::frozen_layer for libtorch, so that programs without Python run exported frozen modules with our
// kernels: tensors in and out here, the layer itself in csrc/cpu/frozen_layer.h. It takes what freeze() packs for a CPU
// (float32 and half types); schema, shapes and results are those of dsts_kernels/ops/frozen_layer.py.
#include "cpu/frozen_layer.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string_view>

namespace {

using at::Tensor;
namespace cpu = dsts::cpu;

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

// The packed tensors of a layer as its kernels take them, refused where they do not fit one another or x.
cpu::FrozenLayer layer_of(const Tensor& x, const Tensor& scoring, const Tensor& channels,
                          const Tensor& starts, const Tensor& filters, const Tensor& bias,
                          const std::optional<Tensor>& mixing, at::IntArrayRef mixing_kernel,
                          std::string_view packing) {
  cpu::FrozenLayer layer{};
  layer.N = bias.size(0), layer.O = bias.size(1), layer.C = channels.size(1);
  TORCH_CHECK_VALUE(
      packing == "blocked" || packing == "winograd", "frozen_layer: got filters packed as ", packing,
      "; wanted winograd or blocked, as freeze() packs for a CPU that dsts_kernels has kernels for");
  TORCH_CHECK_VALUE(layer.takes_taps(scoring.size(2)), "frozen_layer: scoring has ", scoring.size(2),
                    " taps; wanted 1 or 9, or 2 or 10 with a centre");
  TORCH_CHECK_VALUE(x.dim() == 5 && x.size(1) == layer.C, "frozen_layer: x has shape ", x.sizes(),
                    "; wanted (B, ", layer.C, ", T, H, W)");
  TORCH_CHECK_TYPE(x.scalar_type() == filters.scalar_type(), "frozen_layer: x has dtype ", x.scalar_type(),
                   "; wanted ", filters.scalar_type(), ", which the filters have");
  for (const Tensor& t : {scoring, channels, starts, filters, bias})
    TORCH_CHECK_VALUE(t.is_contiguous(), "frozen_layer: a weight has gaps; wanted dense ones");
  layer.scoring = scoring.const_data_ptr<float>(), layer.bias = bias.const_data_ptr<float>();
  layer.channels = channels.const_data_ptr<int32_t>(), layer.starts = starts.const_data_ptr<int64_t>();
  layer.filters = filters.data_ptr(), layer.dtype = dtype_of("filters", filters);
  layer.place();
  TORCH_CHECK_VALUE(filters.numel() == layer.first.back(), "frozen_layer: filters has ", filters.numel(),
                    " elements; wanted ", layer.first.back());
  if (!mixing) return layer;
  TORCH_CHECK_VALUE(mixing->is_contiguous() && mixing_kernel.size() == 3,
                    "frozen_layer: mixing has gaps, or its kernel is not of three sizes");
  layer.mixing = mixing->data_ptr(), layer.mixing_taps = mixing_kernel[0] > 1 ? 3 : 9;
  return layer;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> frozen_layer(
    const Tensor& x, const std::optional<Tensor>& given_sums, const std::optional<Tensor>& skip,
    const Tensor& scoring, const Tensor& channels, const Tensor& starts, const Tensor& filters,
    const Tensor& bias, const std::optional<Tensor>& mixing, int64_t score_elements,
    at::IntArrayRef mixing_kernel, bool relu, std::string_view packing, int64_t next_taps,
    std::optional<std::string_view>) {
  cpu::FrozenLayer layer =
      layer_of(x, scoring, channels, starts, filters, bias, mixing, mixing_kernel, packing);
  layer.score_elements = score_elements, layer.relu = relu;
  const int64_t B = x.size(0);
  const Tensor sums = given_sums ? given_sums->contiguous() : Tensor();
  Tensor y =
      skip ? at::empty_like(*skip)
           : at::empty({B, x.size(2), x.size(3), x.size(4), layer.O}, x.options()).permute({0, 4, 1, 2, 3});
  Tensor next_sums = at::empty({B, layer.O, next_taps}, scoring.options());
  Tensor neuron = at::empty({B}, x.options().dtype(at::kLong)),
         scores = at::empty({B, layer.N}, scoring.options());
  cpu::FrozenCall call{};
  call.x = features_of("x", x), call.y = features_of("y", y), call.threads = at::get_num_threads();
  if (given_sums) call.sums = sums.const_data_ptr<float>();
  if (skip) call.skip = features_of("skip", *skip);
  if (next_taps) call.next_sums = next_sums.data_ptr<float>(), call.next_taps = static_cast<int>(next_taps);
  call.neuron = neuron.data_ptr<int64_t>(), call.scores = scores.data_ptr<float>();
  const cpu::FrozenLayer* layers[] = {&layer};
  TORCH_CHECK(cpu::frozen_layers(layers, 1, call) == cpu::Status::ok, "frozen_layer: a kernel had no memory");
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
