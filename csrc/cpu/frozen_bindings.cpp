// Frozen layers for Python: weights are read and checked once, when a layer is prepared; a call reads features only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "cpu/frozen_layer.h"
#include "cpu/run.h"

namespace py = pybind11;
using namespace py::literals;

namespace dsts::cpu {

namespace {

// A layer that keeps the memory of its weights alive. It does not see where other memory is put in place of it.
struct Prepared {
  FrozenLayer layer;
  std::array<py::object, 6> weights;

  Prepared(py::object scoring, py::object channels, py::object starts, py::object filters, py::object bias,
           py::object mixing, int64_t score_elements, const std::array<int64_t, 3>& mixing_kernel, bool relu)
      : weights{scoring, channels, starts, filters, bias, mixing} {
    const Arguments check("FrozenLayer");
    const Tensor s = check.dense("scoring", scoring, 3), b = check.dense("bias", bias, 2),
                 f = check.dense("filters", filters, 1),
                 list = check.integers("channels", channels, 2, kInt32),
                 at = check.integers("starts", starts, 1, kInt64);
    layer.N = s.sizes[0], layer.C = s.sizes[1], layer.O = b.sizes[1];
    check.require(layer.takes_taps(s.sizes[2]), "scoring has ", s.sizes[2],
                  " taps; wanted 1 or 9, or 2 or 10 with a centre");
    check.require(layer.N >= 1 && layer.C >= 1 && layer.O >= 1,
                  "scoring and bias have no neurons or channels");
    check.dtype_is("scoring", s.dtype(), kFloat32), check.dtype_is("bias", b.dtype(), kFloat32);
    check.float_or_half("filters", f.dtype());
    check.size_is("bias", "N", b.sizes[0], layer.N), check.size_is("channels", "N", list.sizes[0], layer.N);
    check.size_is("channels", "C", list.sizes[1], layer.C),
        check.size_is("starts", "N + 1", at.sizes[0], layer.N + 1);
    layer.scoring = static_cast<const float*>(s.data), layer.bias = static_cast<const float*>(b.data);
    layer.channels = static_cast<const int32_t*>(list.data),
    layer.starts = static_cast<const int64_t*>(at.data);
    layer.filters = f.data, layer.dtype = f.dtype();
    for (int64_t n = 0; n < layer.N; ++n) {
      const int64_t split = layer.starts[n + 1] - layer.starts[n];
      check.require(split >= 0 && split <= layer.C, "starts gives a neuron ", split,
                    " spatial channels; wanted 0 to ", layer.C);
    }
    for (int64_t k = 0; k < layer.N * layer.C; ++k)
      if (layer.channels[k] < 0 || layer.channels[k] >= layer.C)
        check.require(false, "channels lists channel ", layer.channels[k], "; wanted 0 <= channel < ",
                      layer.C);
    layer.place();
    check.size_is("filters", "elements", f.sizes[0], layer.first.back());
    layer.score_elements = score_elements, layer.relu = relu, layer.mixing = nullptr, layer.mixing_taps = 0;
    check.require(score_elements >= 0, "score_elements is ", score_elements, "; wanted 0 or more");
    if (mixing.is_none()) return;
    const Tensor m = check.dense("mixing", mixing, 2);
    const bool temporal = mixing_kernel == std::array<int64_t, 3>{3, 1, 1};
    check.require(temporal || mixing_kernel == std::array<int64_t, 3>{1, 3, 3},
                  "mixing_kernel is none of (1, 3, 3) and (3, 1, 1), which do not fold");
    check.dtype_is("mixing", m.dtype(), layer.dtype);
    layer.mixing = m.data, layer.mixing_taps = temporal ? 3 : 9;
    check.size_is("mixing", "N", m.sizes[0], layer.N);
    check.size_is("mixing", "elements", m.sizes[1], layer.mixing_elements());
  }
};

void same_features(const Arguments& check, const char* name, const Features& f, const Features& x,
                   int64_t O) {
  check.dtype_is(name, f.dtype, x.dtype), check.same_grid(name, f, x);
  check.size_is(name, "B", f.B, x.B), check.size_is(name, "O", f.C, O);
}

void frozen_layers_py(const std::vector<const Prepared*>& layers, py::handle x, py::handle sums,
                      py::handle skip, py::handle y, py::handle next_sums, py::handle neuron,
                      py::handle scores, int threads, py::handle stage_seconds) {
  const Arguments check("frozen_layers");
  const int64_t L = int64_t(layers.size());
  check.require(L >= 1, "layers is empty; wanted one at least");
  for (const Prepared* prepared : layers) check.require(prepared, "layers has a None; wanted frozen layers");
  FrozenCall call{};
  call.x = check.features("x", x), call.y = check.features("y", y),
  call.skip = check.features("skip", skip, true);
  const FrozenLayer& first = layers.front()->layer;
  const int64_t B = call.x.B, N = first.N, O = layers.back()->layer.O;
  std::vector<const FrozenLayer*> list;
  int64_t channels = call.x.C;
  for (const Prepared* prepared : layers) {
    const FrozenLayer& layer = prepared->layer;
    check.size_is("layers", "C", layer.C, channels), check.size_is("layers", "N", layer.N, N);
    check.dtype_is("x", call.x.dtype, layer.dtype);
    channels = layer.O, list.push_back(&layer);
  }
  same_features(check, "y", call.y, call.x, O);
  if (call.skip.data) same_features(check, "skip", call.skip, call.x, O);
  const Tensor given = check.dense("sums", sums, 3, true),
               next = check.dense("next_sums", next_sums, 3, true);
  if (given.given()) {
    check.dtype_is("sums", given.dtype(), kFloat32), check.size_is("sums", "B", given.sizes[0], B);
    check.size_is("sums", "C", given.sizes[1], call.x.C),
        check.size_is("sums", "taps", given.sizes[2], first.taps);
  }
  if (next.given() && next.sizes[2] > 0) {
    check.dtype_is("next_sums", next.dtype(), kFloat32), check.size_is("next_sums", "B", next.sizes[0], B);
    check.size_is("next_sums", "O", next.sizes[1], O);
    check.require(next.sizes[2] == 1 || next.sizes[2] == 9, "next_sums has ", next.sizes[2],
                  " taps; wanted 1 or 9");
    call.next_taps = int(next.sizes[2]), call.next_sums = static_cast<float*>(next.data);
  }
  const Tensor chosen = check.integers("neuron", neuron, 2, kInt64, true),
               found = check.dense("scores", scores, 3, true);
  check.require(chosen.given() == found.given(), "neuron or scores is None; wanted both, or both None");
  if (chosen.given()) {
    check.dtype_is("scores", found.dtype(), kFloat32);
    check.size_is("neuron", "L", chosen.sizes[0], L), check.size_is("neuron", "B", chosen.sizes[1], B);
    check.size_is("scores", "L", found.sizes[0], L), check.size_is("scores", "B", found.sizes[1], B);
    check.size_is("scores", "N", found.sizes[2], N);
  }
  call.sums = static_cast<const float*>(given.data), call.neuron = static_cast<int64_t*>(chosen.data);
  call.scores = static_cast<float*>(found.data), call.threads = check.threads(threads);
  call.stage_seconds = stage_seconds_of(check, stage_seconds);
  run_unlocked(check, [&] { return frozen_layers(list.data(), int(L), call); });
}

std::array<int, 3> tile_sizes_py(int64_t batch, int64_t t, int64_t h, int64_t w) {
  const TileSizes tiles = tile_sizes(batch, t, h, w);
  return {tiles.t, tiles.h, tiles.w};
}

}  // namespace

void bind_frozen(py::module_& m) {
  py::class_<Prepared>(m, "FrozenLayer",
                       "A frozen layer's weights, read and checked: what frozen_layers takes.")
      .def(py::init<py::object, py::object, py::object, py::object, py::object, py::object, int64_t,
                    const std::array<int64_t, 3>&, bool>(),
           "scoring"_a, "channels"_a, "starts"_a, "filters"_a, "bias"_a, "mixing"_a, "score_elements"_a,
           "mixing_kernel"_a, "relu"_a);
  m.def("frozen_layers", &frozen_layers_py, "layers"_a, "x"_a, "sums"_a, "skip"_a, "y"_a, "next_sums"_a,
        "neuron"_a, "scores"_a, "threads"_a, "stage_seconds"_a);
  m.def("tile_sizes", &tile_sizes_py, "batch"_a, "t"_a, "h"_a, "w"_a,
        "Tiles (t, h, w) of lowest cost for so many samples of a fast convolution.");
}

}  // namespace dsts::cpu
