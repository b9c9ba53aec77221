// The CPU kernels for Python: tensors, and records of them, in; kernels run without the interpreter lock, on
// the instruction set in use. A wrong argument raises before anything is written.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/arguments.h"
#include "cpu/epilogue.h"
#include "cpu/gate_merge.h"
#include "cpu/gather_panel.h"
#include "cpu/run.h"
#include "cpu/semhash.h"
#include "cpu/tap_sums.h"
#include "cpu/units.h"
#include "cpu/winograd.h"
#include "cpu/winograd_tiles.h"
#include "cpu/winograd_weight_gradient.h"

namespace py = pybind11;
using namespace py::literals;

namespace dsts::cpu {

namespace {

// Logits (N, C), neuron (B,) or None, noise (B, C) or None: what both directions of the gate read.
struct Logits {
  Tensor logits, neuron, noise;

  Logits(const Arguments& check, py::handle logits_, py::handle neuron_, py::handle noise_,
         const Tensor& gate)
      : logits(check.dense("logits", logits_, 2)),
        neuron(check.integers("neuron", neuron_, 1, kInt64, true)),
        noise(check.dense("noise", noise_, 2, true)) {
    const int64_t batch = gate.sizes[0];
    check.size_is("logits", "C", logits.sizes[1], gate.sizes[1]);
    check.dtype_is("logits", logits.dtype(), gate.dtype());
    check.require(neuron.given() || logits.sizes[0] == batch || batch == 0,
                  "neuron is None; wanted N equal to B then");
    if (neuron.given()) check.size_is("neuron", "B", neuron.sizes[0], batch);
    if (noise.given()) {
      check.size_is("noise", "B", noise.sizes[0], batch),
          check.size_is("noise", "C", noise.sizes[1], gate.sizes[1]);
      check.dtype_is("noise", noise.dtype(), gate.dtype());
    }
  }
};

void semhash_forward_py(py::handle logits, py::handle neuron, py::handle noise, py::handle hard,
                        py::handle gate, int threads) {
  const Arguments check("semhash_forward");
  const Tensor out = check.dense("gate", gate, 2), hards = check.integers("hard", hard, 1, kBool, true);
  const Logits in(check, logits, neuron, noise, out);
  if (hards.given()) check.size_is("hard", "B", hards.sizes[0], out.sizes[0]);
  run(check, cpu::semhash_forward,
      {in.logits.data, static_cast<const int64_t*>(in.neuron.data), in.noise.data,
       static_cast<const uint8_t*>(hards.data), out.data, out.sizes[0], in.logits.sizes[0], out.sizes[1],
       out.dtype(), check.threads(threads)});
}

void semhash_backward_py(py::handle grad, py::handle logits, py::handle neuron, py::handle noise,
                         py::handle dlogits, int threads) {
  const Arguments check("semhash_backward");
  const Tensor gate = check.dense("grad", grad, 2), out = check.dense("dlogits", dlogits, 2);
  const Logits in(check, logits, neuron, noise, gate);
  check.size_is("dlogits", "N", out.sizes[0], in.logits.sizes[0]);
  check.size_is("dlogits", "C", out.sizes[1], gate.sizes[1]);
  check.dtype_is("dlogits", out.dtype(), gate.dtype());
  run(check, cpu::semhash_backward,
      {gate.data, in.logits.data, static_cast<const int64_t*>(in.neuron.data), in.noise.data, out.data,
       gate.sizes[0], out.sizes[0], out.sizes[1], out.dtype(), check.threads(threads)});
}

int taps_of(const Arguments& check, int64_t taps) {
  check.require(taps == 1 || taps == 9, "taps is ", taps, "; wanted 1 or 9");
  return static_cast<int>(taps);
}

void tap_sums_py(py::handle x, py::handle out, int threads) {
  const Arguments check("tap_sums");
  const Features in = check.features("x", x);
  const Tensor sums = check.dense("out", out, 3);
  check.size_is("out", "B", sums.sizes[0], in.B), check.size_is("out", "C", sums.sizes[1], in.C);
  check.dtype_is("out", sums.dtype(), accumulate_dtype(in.dtype));
  run(check, cpu::tap_sums, {in, sums.data, taps_of(check, sums.sizes[2]), check.threads(threads)});
}

// A tensor (B, C) by sample and channel of x, in its dtype, whose channels are neighbours.
Tensor by_channel(const Arguments& check, const char* name, py::handle value, const Features& x,
                  bool optional = false) {
  const Tensor t = check.tensor(name, value, 2, optional);
  if (!t.given()) return t;
  check.dtype_is(name, t.dtype(), x.dtype);
  check.size_is(name, "B", t.sizes[0], x.B), check.size_is(name, "C", t.sizes[1], x.C);
  check.require(t.strides[1] == 1 || t.sizes[1] <= 1, name, " has gaps; wanted channels side by side");
  return t;
}

void gather_panel_py(py::handle src, py::handle samples, py::handle channels, py::handle scale,
                     bool complement, py::handle out, int threads) {
  const Arguments check("gather_panel");
  GatherPanel a{};
  a.src = check.features("src", src), a.out = check.features("out", out);
  a.samples = check.samples("samples", samples, a.src.B);
  const Tensor list = check.integers("channels", channels, 1, kInt32, true);
  a.num_channels = list.given() ? list.sizes[0] : a.src.C;
  a.channels = check.list("channels", channels, 0, a.num_channels, a.src.C);
  const Tensor scales = by_channel(check, "scale", scale, a.src, true);
  a.scale = scales.data, a.scale_stride_b = scales.strides[0], a.complement = complement;
  a.threads = check.threads(threads);
  check.dtype_pair("src", a.src.dtype, "out", a.out.dtype);
  check.size_is("out", "B", a.out.B, a.samples.count), check.same_grid("out", a.out, a.src);
  check.require(a.num_channels <= a.out.C, "channels lists ", a.num_channels, "; wanted at most the ",
                a.out.C, " of out");
  run(check, cpu::gather_panel, a);
}

constexpr std::array<const char*, 6> kEpilogueFields{"out", "samples", "bias", "relu", "skip", "sums"};

Epilogue epilogue_of(const Arguments& check, py::handle value) {
  static FieldNames names(kEpilogueFields);
  const auto [out, samples, bias, relu, skip, sums] =
      names.read<kEpilogueFields.size()>(check, "epilogue", value);
  Epilogue e{};
  e.out = check.features("out", out), e.samples = check.samples("samples", samples, e.out.B);
  e.relu = check.boolean("relu", relu), e.taps = 1;
  const DType sum_dtype = accumulate_dtype(e.out.dtype);
  if (!bias.is_none()) {
    const Tensor t = check.dense("bias", bias, 1);
    check.dtype_is("bias", t.dtype(), sum_dtype), check.size_is("bias", "O", t.sizes[0], e.out.C);
    e.bias = t.data;
  }
  if (!skip.is_none()) {
    e.skip = check.features("skip", skip);
    check.dtype_is("skip", e.skip.dtype, e.out.dtype);
    check.size_is("skip", "B", e.skip.B, e.out.B), check.size_is("skip", "O", e.skip.C, e.out.C);
    check.same_grid("skip", e.skip, e.out);
  }
  if (!sums.is_none()) {
    const Tensor t = check.tensor("sums", sums, 3);
    e.sums = t.data, e.sums_stride_b = t.strides[0], e.taps = taps_of(check, t.sizes[2]);
    check.dtype_is("sums", t.dtype(), sum_dtype);
    check.size_is("sums", "B", t.sizes[0], e.out.B), check.size_is("sums", "O", t.sizes[1], e.out.C);
    check.require((t.sizes[1] <= 1 || t.strides[1] == e.taps) && (e.taps == 1 || t.strides[2] == 1),
                  "sums has gaps; wanted each sample's sums dense");
  }
  return e;
}

// A dense channels-last panel (nb, T, H, W, width), as it goes with features of `grid`.
Tensor panel_of(const Arguments& check, const char* name, py::handle value, int64_t batch,
                const Features& grid) {
  const Tensor t = check.dense(name, value, 5, true);
  if (!t.given()) return t;
  check.size_is(name, "B", t.sizes[0], batch), check.size_is(name, "T", t.sizes[1], grid.T);
  check.size_is(name, "H", t.sizes[2], grid.H), check.size_is(name, "W", t.sizes[3], grid.W);
  return t;
}

// The dtype of two panels, of which one may be absent; `otherwise` where both are.
DType panel_dtype(const Arguments& check, const Tensor& spatial, const Tensor& temporal, DType otherwise) {
  if (spatial.given() && temporal.given()) check.dtype_is("temporal", temporal.dtype(), spatial.dtype());
  return spatial.given() ? spatial.dtype() : temporal.given() ? temporal.dtype() : otherwise;
}

void epilogue_py(py::handle spatial, py::handle temporal, py::handle epilogue, int threads) {
  const Arguments check("epilogue");
  PanelEpilogue a{};
  a.epilogue = epilogue_of(check, epilogue);
  const Features& out = a.epilogue.out;
  const Tensor panels[2] = {panel_of(check, "spatial", spatial, a.epilogue.samples.count, out),
                            panel_of(check, "temporal", temporal, a.epilogue.samples.count, out)};
  for (int i = 0; i < 2; ++i)
    if (panels[i].given()) check.size_is(i ? "temporal" : "spatial", "O", panels[i].sizes[4], out.C);
  a.spatial = panels[0].data, a.temporal = panels[1].data, a.threads = check.threads(threads);
  a.panel_dtype = panel_dtype(check, panels[0], panels[1], out.dtype);
  check.dtype_pair("out", out.dtype, "a panel", a.panel_dtype);
  run(check, cpu::epilogue, a);
}

constexpr std::array<const char*, 2> kGradientPanelFields{"panel", "channels"};

// A panel of some channels of x, and the memory for its column of every channel.
struct ListedPanel {
  Tensor panel;
  std::vector<int32_t> columns;  // [C], -1 for none; empty: all channels, or none, are in the panel

  ListedPanel(const Arguments& check, const char* name, py::handle value, int64_t batch, const Features& x) {
    static FieldNames names(kGradientPanelFields);
    const auto [data, channels] = names.read<kGradientPanelFields.size()>(check, name, value);
    panel = panel_of(check, name, data, batch, x);
    const Tensor list = check.integers("channels", channels, 1, kInt32, true);
    if (!list.given()) {
      check.require(width() == x.C || width() == 0, name, " has ", width(),
                    " channels and no list; wanted all channels then");
      return;
    }
    check.size_is(name, "channels", list.sizes[0], width());
    columns.assign(x.C, -1);
    for (int64_t j = 0; j < width(); ++j) {
      const int32_t channel = static_cast<const int32_t*>(list.data)[j];
      check.require(channel >= 0 && channel < x.C, name, " lists channel ", channel,
                    "; wanted 0 <= channel < ", x.C);
      columns[channel] = static_cast<int32_t>(j);
    }
  }

  int64_t width() const { return panel.given() ? panel.sizes[4] : 0; }
  GradientPanel get() const { return {panel.data, columns.empty() ? nullptr : columns.data(), width()}; }
};

void gate_merge_py(py::handle spatial, py::handle temporal, py::handle samples, py::handle gate, py::handle x,
                   py::handle dx, py::handle dgate, int threads) {
  const Arguments check("gate_merge");
  GateMerge a{};
  a.x = check.features("x", x), a.dx = check.features("dx", dx, true);
  a.samples = check.samples("samples", samples, a.x.B);
  const ListedPanel spatial_panel(check, "spatial", spatial, a.samples.count, a.x);
  const ListedPanel temporal_panel(check, "temporal", temporal, a.samples.count, a.x);
  a.spatial = spatial_panel.get(), a.temporal = temporal_panel.get();
  a.panel_dtype = panel_dtype(check, spatial_panel.panel, temporal_panel.panel, a.x.dtype);
  check.dtype_pair("x", a.x.dtype, "a panel", a.panel_dtype);
  const Tensor gates = by_channel(check, "gate", gate, a.x), out = check.dense("dgate", dgate, 2, true);
  a.gate = gates.data, a.gate_stride_b = gates.strides[0], a.dgate = out.data,
  a.threads = check.threads(threads);
  if (out.given()) {
    check.dtype_is("dgate", out.dtype(), a.x.dtype);
    check.size_is("dgate", "B", out.sizes[0], a.x.B), check.size_is("dgate", "C", out.sizes[1], a.x.C);
  }
  if (a.dx.data) {
    check.dtype_is("dx", a.dx.dtype, a.x.dtype), check.same_grid("dx", a.dx, a.x);
    check.size_is("dx", "B", a.dx.B, a.x.B), check.size_is("dx", "C", a.dx.C, a.x.C);
  }
  run(check, cpu::gate_merge, a);
}

constexpr std::array<const char*, 11> kOperatorFields{
    "weight", "k_channels", "channels", "channels_start", "weight_start", "o_list",
    "k_list", "strides",    "scale",    "complement",     "blocked"};

// An operator on features x with O outputs; None is absent. How far its filters go is the caller's word: they
// lie in many ways, and their lists pick from them.
Operator operator_of(const Arguments& check, const char* name, py::handle value, int64_t O,
                     const Features& x) {
  static FieldNames names(kOperatorFields);
  Operator op{};
  if (value.is_none()) return op;
  const auto [weight, k_channels, channels, channels_start, weight_start, o_list, k_list, strides, scale,
              complement, blocked] = names.read<kOperatorFields.size()>(check, name, value);
  op.k_channels = check.integer("k_channels", k_channels, 0);
  const Tensor filter = check.tensor("weight", weight, kAnyDimensions);
  check.float_or_half("weight", filter.dtype());
  op.dtype = filter.dtype();
  op.weight = static_cast<char*>(filter.data) +
              check.integer("weight_start", weight_start, 0) * facts_of(op.dtype).bytes;
  op.channels = check.list("channels", channels, check.integer("channels_start", channels_start, 0),
                           op.k_channels, x.C);
  op.o_list = check.list("o_list", o_list, 0, O, kAnyChannel);
  op.k_list = check.list("k_list", k_list, 0, op.k_channels, kAnyChannel);
  const auto [stride_o, stride_k, stride_tap] = check.strides("strides", strides);
  op.stride_o = stride_o, op.stride_k = stride_k, op.stride_tap = stride_tap;
  const Tensor scales = by_channel(check, "scale", scale, x, true);
  op.scale = scales.data, op.scale_stride_b = scales.strides[0];
  op.complement = check.boolean("complement", complement), op.blocked = check.boolean("blocked", blocked);
  return op;
}

TileSizes tile_sizes_of(const Arguments& check, const std::array<int, 3>& tiles, const Features& grid) {
  const int64_t sizes[3] = {grid.T, grid.H, grid.W};
  for (int i = 0; i < 3; ++i) {
    const bool listed = i ? SpatialTiles::has(tiles[i]) : TemporalTiles::has(tiles[i]);
    check.require(listed && (tiles[i] > 1 || sizes[i] <= 1), "a tile is ", tiles[i], " for a size of ",
                  sizes[i], "; wanted one of winograd_tiles, and 1 for a size of 1 only");
  }
  return {tiles[0], tiles[1], tiles[2]};
}

void winograd_py(py::handle x, py::handle x_samples, py::handle spatial, py::handle temporal,
                 py::handle epilogue, const std::array<int, 3>& tiles, int threads,
                 py::handle stage_seconds) {
  const Arguments check("winograd");
  Winograd a{};
  a.x = check.features("x", x), a.samples = check.samples("x_samples", x_samples, a.x.B);
  a.epilogue = epilogue_of(check, epilogue);
  const Features& out = a.epilogue.out;
  check.float_or_half("x", a.x.dtype), check.float_or_half("out", out.dtype);
  check.same_grid("out", out, a.x);
  check.size_is("samples", "count", a.epilogue.samples.count, a.samples.count);
  a.spatial = operator_of(check, "spatial", spatial, out.C, a.x);
  a.temporal = operator_of(check, "temporal", temporal, out.C, a.x);
  check.require(a.spatial.k_channels + a.temporal.k_channels > 0, "both operators have no channels");
  a.tiles = tile_sizes_of(check, tiles, out), a.threads = check.threads(threads);
  a.stage_seconds = stage_seconds_of(check, stage_seconds);
  run(check, cpu::winograd, a);
}

void winograd_weight_gradient_py(py::handle x, py::handle grad, py::handle samples, py::handle spatial,
                                 py::handle temporal, bool add, const std::array<int, 3>& tiles, int threads,
                                 py::handle stage_seconds) {
  const Arguments check("winograd_weight_gradient");
  WinogradWeightGradient a{};
  a.x = check.features("x", x), a.grad = check.features("grad", grad);
  a.samples = check.samples("samples", samples, a.x.B);
  check.float_or_half("x", a.x.dtype), check.float_or_half("grad", a.grad.dtype);
  check.size_is("grad", "B", a.grad.B, a.x.B), check.same_grid("grad", a.grad, a.x);
  a.spatial = operator_of(check, "spatial", spatial, a.grad.C, a.x);
  a.temporal = operator_of(check, "temporal", temporal, a.grad.C, a.x);
  check.require(a.spatial.k_channels + a.temporal.k_channels > 0, "both operators have no channels");
  for (const Operator& op : {a.spatial, a.temporal})
    check.require(op.k_channels == 0 || (op.stride_tap == 1 && !op.blocked), "stride_tap is ", op.stride_tap,
                  "; wanted 1, and a filter without blocks");
  a.tiles = tile_sizes_of(check, tiles, a.grad), a.add = add, a.threads = check.threads(threads);
  a.stage_seconds = stage_seconds_of(check, stage_seconds);
  run(check, cpu::winograd_weight_gradient, a);
}

std::vector<std::string> isa_names() {
  int n = 0;
  const Isa* isas = supported_isas(&n);
  std::vector<std::string> names;
  for (int i = 0; i < n; ++i) names.emplace_back(name_of(isas[i]));
  return names;
}

void set_isa_py(const std::string& name) {
  int n = 0;
  const Isa* isas = supported_isas(&n);
  if (name == "auto") return set_isa(isas[n - 1]);
  std::string wanted = "auto";
  for (int i = 0; i < n; ++i) {
    if (name == name_of(isas[i])) return set_isa(isas[i]);
    wanted += std::string(", ") + name_of(isas[i]);
  }
  throw std::invalid_argument("set_isa: name is '" + name + "'; this build on this machine supports " +
                              wanted);
}

py::dict units_py() {
  const Units& found = units();
  py::dict answer;
  answer["amx_bf16"] = found.amx_bf16, answer["amx_fp16"] = found.amx_fp16,
  answer["amx_int8"] = found.amx_int8;
  answer["avx512_bf16"] = found.avx512_bf16, answer["avx512_vnni"] = found.avx512_vnni;
  answer["refused"] = found.refused == 0 ? "" : std::strerror(found.refused);
  return answer;
}

template <class Tiles>
py::dict points_by_tile() {
  py::dict points;
  for (int i = 0; i < Tiles::kCount; ++i) points[py::int_(Tiles::sizes[i])] = Tiles::inputs[i];
  return points;
}

}  // namespace

void bind(py::module_& m) {
  m.def("semhash_forward", &semhash_forward_py, "logits"_a, "neuron"_a, "noise"_a, "hard"_a, "gate"_a,
        "threads"_a);
  m.def("semhash_backward", &semhash_backward_py, "grad"_a, "logits"_a, "neuron"_a, "noise"_a, "dlogits"_a,
        "threads"_a);
  m.def("tap_sums", &tap_sums_py, "x"_a, "out"_a, "threads"_a);
  m.def("gather_panel", &gather_panel_py, "src"_a, "samples"_a, "channels"_a, "scale"_a, "complement"_a,
        "out"_a, "threads"_a);
  m.def("epilogue", &epilogue_py, "spatial"_a, "temporal"_a, "epilogue"_a, "threads"_a);
  m.def("gate_merge", &gate_merge_py, "spatial"_a, "temporal"_a, "samples"_a, "gate"_a, "x"_a, "dx"_a,
        "dgate"_a, "threads"_a);
  m.def("winograd", &winograd_py, "x"_a, "x_samples"_a, "spatial"_a, "temporal"_a, "epilogue"_a, "tiles"_a,
        "threads"_a, "stage_seconds"_a);
  m.def("winograd_weight_gradient", &winograd_weight_gradient_py, "x"_a, "grad"_a, "samples"_a, "spatial"_a,
        "temporal"_a, "add"_a, "tiles"_a, "threads"_a, "stage_seconds"_a);

  bind_frozen(m), bind_live(m);

  py::dict codes;
  for (const DTypeFacts& known : kDTypes) codes[known.name] = static_cast<int>(known.dtype);
  m.attr("dtypes") = codes;   // codes by name
  m.attr("winograd_tiles") =  // multiplications along one dimension, by tile size
      py::dict("spatial"_a = points_by_tile<SpatialTiles>(), "temporal"_a = points_by_tile<TemporalTiles>());

  m.def("supported_isas", &isa_names,
        "Instruction sets in this build that this machine can run, the best last.");
  m.def("get_isa", [] { return name_of(isa_in_use()); }, "The instruction set in use.");
  m.def("units", &units_py,
        "Which units multiply half types and int8 here, and why Linux refused tiles where it did.");
  m.def("set_isa", &set_isa_py, "name"_a, "Use one of supported_isas(), or 'auto' for the best.");
}

}  // namespace dsts::cpu
