// A live layer in evaluation for Python.
#include <pybind11/pybind11.h>

#include "cpu/live_layer.h"
#include "cpu/run.h"

namespace py = pybind11;
using namespace py::literals;

namespace dsts::cpu {

namespace {

// One neuron's filters [O, C, *kernel] for every neuron, of so many taps in all.
void* filters_of(const Arguments& check, const char* name, py::handle value, const LiveLayer& a,
                 int64_t taps) {
  const Tensor t = check.dense(name, value, 6);
  check.dtype_is(name, t.dtype(), a.x.dtype);
  check.size_is(name, "N", t.sizes[0], a.N), check.size_is(name, "O", t.sizes[1], a.z.C);
  check.size_is(name, "C", t.sizes[2], a.x.C);
  check.size_is(name, "taps", t.sizes[3] * t.sizes[4] * t.sizes[5], taps);
  return t.data;
}

void live_layer_py(py::handle x, py::handle scoring, double divisor, py::handle logits, py::handle spatial,
                   py::handle temporal, py::handle z, py::handle neuron, py::handle scores, py::handle gate,
                   int threads, py::handle stage_seconds) {
  const Arguments check("live_layer");
  LiveLayer a{};
  a.x = check.features("x", x), a.z = check.features("z", z), a.divisor = divisor;
  check.float_or_half("x", a.x.dtype), check.dtype_is("z", a.z.dtype, a.x.dtype);
  check.same_grid("z", a.z, a.x), check.size_is("z", "B", a.z.B, a.x.B);
  const Tensor s = check.dense("scoring", scoring, 3), l = check.dense("logits", logits, 2),
               g = check.dense("gate", gate, 2), v = check.dense("scores", scores, 2),
               n = check.integers("neuron", neuron, 1, kInt64);
  a.N = l.sizes[0], a.taps = int(s.sizes[2]), a.threads = check.threads(threads);
  check.require(a.N >= 1 && a.x.C >= 1, "logits and x have no neurons or channels");
  check.require(s.sizes[2] == 1 || s.sizes[2] == 9, "scoring has ", s.sizes[2], " taps; wanted 1 or 9");
  check.size_is("scoring", "N", s.sizes[0], a.N), check.size_is("scoring", "C", s.sizes[1], a.x.C);
  check.size_is("logits", "C", l.sizes[1], a.x.C);
  check.size_is("gate", "B", g.sizes[0], a.x.B), check.size_is("gate", "C", g.sizes[1], a.x.C);
  check.size_is("scores", "B", v.sizes[0], a.x.B), check.size_is("scores", "N", v.sizes[1], a.N);
  check.size_is("neuron", "B", n.sizes[0], a.x.B);
  check.dtype_is("scoring", s.dtype(), kFloat32), check.dtype_is("scores", v.dtype(), kFloat32);
  check.dtype_is("logits", l.dtype(), a.x.dtype), check.dtype_is("gate", g.dtype(), a.x.dtype);
  a.scoring = static_cast<const float*>(s.data), a.logits = l.data, a.gate = g.data;
  a.spatial = filters_of(check, "spatial", spatial, a, 9),
  a.temporal = filters_of(check, "temporal", temporal, a, 3);
  a.neuron = static_cast<int64_t*>(n.data), a.scores = static_cast<float*>(v.data);
  a.stage_seconds = stage_seconds_of(check, stage_seconds);
  run(check, live_layer, a);
}

}  // namespace

void bind_live(py::module_& m) {
  m.def("live_layer", &live_layer_py, "x"_a, "scoring"_a, "divisor"_a, "logits"_a, "spatial"_a, "temporal"_a,
        "z"_a, "neuron"_a, "scores"_a, "gate"_a, "threads"_a, "stage_seconds"_a);
}

}  // namespace dsts::cpu
