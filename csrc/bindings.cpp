// dsts_kernels._C: the native kernels for Python, those for the CPU bound here. Tensors come as addresses,
// sizes and strides, so the module knows nothing of torch. Arguments are checked here, before anything is
// written; what they point at is the caller's responsibility. The interpreter lock is released while a kernel
// runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "build_flags.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using namespace py::literals;
using namespace dsts::cpu;

namespace dsts::cuda {
void bind(py::module_& m);
}

namespace {

using Address = std::uintptr_t;  // 0 is null
using Strides5 = std::array<int64_t, 5>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void require(bool ok, const char* op, const std::string& reason) {
  if (!ok) throw std::invalid_argument(std::string(op) + ": " + reason);
}

bool is_half(int dtype) { return dtype == kBFloat16 || dtype == kFloat16; }

// Checks of one call; `op` prefixes every message.
struct Check {
  const char* op;

  void dtype(const char* name, int code) const {
    require(code >= 0 && code <= 3, op,
            std::string(name) + " is " + std::to_string(code) +
                "; wanted 0 (float32), 1 (float64), 2 (bfloat16) or 3 (float16)");
  }
  // `wide` must be `narrow`, or float32 beside a half type.
  void dtype_pair(const char* narrow_name, int narrow, const char* wide_name, int wide) const {
    dtype(narrow_name, narrow);
    dtype(wide_name, wide);
    require(wide == narrow || (wide == kFloat32 && is_half(narrow)), op,
            std::string(wide_name) + " is " + std::to_string(wide) + "; wanted " + narrow_name + " (" +
                std::to_string(narrow) + ")" + (is_half(narrow) ? " or 0 (float32)" : ""));
  }
  void float_dtype(const char* name, int code) const {
    dtype(name, code);
    require(code != kFloat64, op, std::string(name) + " is 1 (float64); wanted float32 or a half type");
  }
  void size(const char* name, int64_t n) const {
    require(n >= 0, op, std::string(name) + " is " + std::to_string(n) + "; wanted a size >= 0");
  }
  void threads(int n) const { require(n >= 1, op, "threads is " + std::to_string(n) + "; wanted 1 or more"); }
  void taps(int n) const {
    require(n == 1 || n == 9, op, "taps is " + std::to_string(n) + "; wanted 1 or 9");
  }
  Strides strides(const char* name, const Strides5& s) const {
    for (int64_t v : s)
      require(v >= 0, op, std::string(name) + " holds " + std::to_string(v) + "; wanted strides >= 0");
    return {s[0], s[1], s[2], s[3], s[4]};
  }
  void given(const char* name, Address address, int64_t elements) const {
    require(address != 0 || elements == 0, op, std::string(name) + " is null");
  }
};

void raise_for(Status status, const char* op) {
  if (status == Status::bad_neuron)
    throw std::out_of_range(std::string(op) + ": a neuron index is outside 0..N-1");
  if (status == Status::no_memory) throw std::bad_alloc();
}

void semhash_forward(Address logits, Address neuron, Address noise, Address hard, Address gate, int64_t B,
                     int64_t N, int64_t C, int dtype, int threads) {
  const Check check{"semhash_forward"};
  check.size("B", B), check.size("N", N), check.size("C", C);
  check.dtype("dtype", dtype), check.threads(threads);
  require(neuron || N == B || B == 0, check.op, "without neuron, N must equal B");
  check.given("logits", logits, N * C), check.given("gate", gate, B * C);
  raise_for(kernels().semhash_forward({pointer<void>(logits), pointer<int64_t>(neuron), pointer<void>(noise),
                                       pointer<uint8_t>(hard), pointer<void>(gate), B, N, C, dtype, threads}),
            check.op);
}

void semhash_backward(Address grad, Address logits, Address neuron, Address noise, Address dlogits, int64_t B,
                      int64_t N, int64_t C, int dtype, int threads) {
  const Check check{"semhash_backward"};
  check.size("B", B), check.size("N", N), check.size("C", C);
  check.dtype("dtype", dtype), check.threads(threads);
  require(neuron || N == B || B == 0, check.op, "without neuron, N must equal B");
  check.given("grad", grad, B * C), check.given("logits", logits, N * C),
      check.given("dlogits", dlogits, N * C);
  raise_for(
      kernels().semhash_backward({pointer<void>(grad), pointer<void>(logits), pointer<int64_t>(neuron),
                                  pointer<void>(noise), pointer<void>(dlogits), B, N, C, dtype, threads}),
      check.op);
}

void tap_sums(Address x, const Strides5& x_strides, Address out, int64_t B, int64_t C, int64_t T, int64_t H,
              int64_t W, int taps, int dtype, int threads) {
  const Check check{"tap_sums"};
  check.size("B", B), check.size("C", C), check.size("T", T), check.size("H", H), check.size("W", W);
  check.taps(taps), check.dtype("dtype", dtype), check.threads(threads);
  check.given("x", x, B * C * T * H * W), check.given("out", out, B * C);
  raise_for(kernels().tap_sums({pointer<void>(x), check.strides("x_strides", x_strides), pointer<void>(out),
                                B, C, T, H, W, taps, dtype, threads}),
            check.op);
}

void gather_panel(Address src, const Strides5& src_strides, Address samples, int64_t nb, Address channels,
                  int64_t nc, Address scale, int64_t scale_stride_b, bool complement, Address out,
                  const Strides5& out_strides, int64_t width, int64_t T, int64_t H, int64_t W, int src_dtype,
                  int out_dtype, int threads) {
  const Check check{"gather_panel"};
  check.size("nb", nb), check.size("nc", nc), check.size("scale_stride_b", scale_stride_b);
  check.size("width", width), check.size("T", T), check.size("H", H), check.size("W", W);
  require(nc <= width, check.op,
          "nc is " + std::to_string(nc) + "; wanted at most width (" + std::to_string(width) + ")");
  check.dtype_pair("src_dtype", src_dtype, "out_dtype", out_dtype), check.threads(threads);
  check.given("src", src, nb * nc * T * H * W), check.given("out", out, nb * width * T * H * W);
  raise_for(kernels().gather_panel({pointer<void>(src), check.strides("src_strides", src_strides),
                                    pointer<int64_t>(samples), nb, pointer<int32_t>(channels), nc,
                                    pointer<void>(scale), scale_stride_b, complement, pointer<void>(out),
                                    check.strides("out_strides", out_strides), width, T, H, W, src_dtype,
                                    out_dtype, threads}),
            check.op);
}

void epilogue(Address zs, Address zt, Address bias, int64_t bias_stride_b, bool relu, Address skip,
              const Strides5& skip_strides, Address out, const Strides5& out_strides, Address samples,
              int64_t nb, Address sums, int taps, int64_t O, int64_t T, int64_t H, int64_t W, int in_dtype,
              int out_dtype, int threads) {
  const Check check{"epilogue"};
  check.size("bias_stride_b", bias_stride_b), check.size("nb", nb), check.size("O", O);
  check.size("T", T), check.size("H", H), check.size("W", W), check.taps(taps);
  check.dtype_pair("out_dtype", out_dtype, "in_dtype", in_dtype), check.threads(threads);
  check.given("out", out, nb * O * T * H * W);
  raise_for(kernels().epilogue({pointer<void>(zs),
                                pointer<void>(zt),
                                pointer<void>(bias),
                                bias_stride_b,
                                relu,
                                pointer<void>(skip),
                                check.strides("skip_strides", skip_strides),
                                pointer<void>(out),
                                check.strides("out_strides", out_strides),
                                pointer<int64_t>(samples),
                                nb,
                                pointer<void>(sums),
                                taps,
                                O,
                                T,
                                H,
                                W,
                                in_dtype,
                                out_dtype,
                                threads}),
            check.op);
}

void gate_merge(Address dxs, Address pos_s, int64_t ns, Address dxt, Address pos_t, int64_t nt, Address gate,
                int64_t gate_stride_b, Address x, const Strides5& x_strides, Address dx,
                const Strides5& dx_strides, Address dgate, Address samples, int64_t nb, int64_t C, int64_t T,
                int64_t H, int64_t W, int panel_dtype, int dtype, int threads) {
  const Check check{"gate_merge"};
  check.size("ns", ns), check.size("nt", nt), check.size("gate_stride_b", gate_stride_b),
      check.size("nb", nb);
  check.size("C", C), check.size("T", T), check.size("H", H), check.size("W", W);
  check.dtype_pair("dtype", dtype, "panel_dtype", panel_dtype), check.threads(threads);
  const int64_t P = T * H * W;
  check.given("dxs", dxs, nb * ns * P), check.given("dxt", dxt, nb * nt * P),
      check.given("gate", gate, nb * C);
  require(pos_s || ns == C || ns == 0, check.op, "without pos_s, ns must be C or 0");
  require(pos_t || nt == C || nt == 0, check.op, "without pos_t, nt must be C or 0");
  require(x || !dgate || nb * C * P == 0, check.op, "dgate needs x");
  raise_for(kernels().gate_merge({pointer<void>(dxs),
                                  pointer<int32_t>(pos_s),
                                  ns,
                                  pointer<void>(dxt),
                                  pointer<int32_t>(pos_t),
                                  nt,
                                  pointer<void>(gate),
                                  gate_stride_b,
                                  pointer<void>(x),
                                  check.strides("x_strides", x_strides),
                                  pointer<void>(dx),
                                  check.strides("dx_strides", dx_strides),
                                  pointer<void>(dgate),
                                  pointer<int64_t>(samples),
                                  nb,
                                  C,
                                  T,
                                  H,
                                  W,
                                  panel_dtype,
                                  dtype,
                                  threads}),
            check.op);
}

// channels, count, scale, scale_stride_b, complement, weight, rows, columns, stride_o, stride_k, stride_tap,
// blocked
using OperatorArgs = std::array<int64_t, 12>;

WinogradOperator winograd_operator(const Check& check, const char* name, const OperatorArgs& v) {
  const auto address = [&](int i) { return static_cast<Address>(v[i]); };
  check.size(name, v[1]);
  check.given(name, address(5), v[1]);
  return {pointer<int32_t>(address(0)),
          v[1],
          pointer<void>(address(2)),
          v[3],
          v[4] != 0,
          pointer<void>(address(5)),
          pointer<int32_t>(address(6)),
          pointer<int32_t>(address(7)),
          v[8],
          v[9],
          v[10],
          v[11] != 0};
}

// What both fast convolutions share: features, operators, tiles and sizes. The rest of `out` is the caller's.
Winograd winograd_arguments(const Check& check, Address x, const Strides5& x_strides, Address x_samples,
                            const OperatorArgs& spatial, const OperatorArgs& temporal,
                            const std::array<int, 3>& tiles, int64_t nb, int64_t O,
                            const std::array<int64_t, 3>& sizes, int x_dtype, int weight_dtype, int threads,
                            Address seconds) {
  check.size("nb", nb), check.size("O", O), check.threads(threads);
  const char* names[3] = {"T", "H", "W"};
  for (int i = 0; i < 3; ++i) {
    check.size(names[i], sizes[i]);
    require((tiles[i] == 1 && sizes[i] <= 1) || tiles[i] == 2 || tiles[i] == 4 || (i == 0 && tiles[i] == 8),
            check.op,
            "a tile is " + std::to_string(tiles[i]) + " for a size of " + std::to_string(sizes[i]) +
                "; wanted 1 for a size of 1, 2, 4, or 8 in time");
  }
  check.float_dtype("x_dtype", x_dtype), check.float_dtype("weight_dtype", weight_dtype);
  Winograd a{};
  a.x = pointer<void>(x), a.x_strides = check.strides("x_strides", x_strides);
  a.samples = pointer<int64_t>(x_samples);
  a.spatial = winograd_operator(check, "spatial", spatial);
  a.temporal = winograd_operator(check, "temporal", temporal);
  a.tile_t = tiles[0], a.tile_h = tiles[1], a.tile_w = tiles[2];
  a.x_dtype = x_dtype, a.weight_dtype = weight_dtype, a.seconds = pointer<double>(seconds);
  a.out.nb = nb, a.out.O = O, a.out.T = sizes[0], a.out.H = sizes[1], a.out.W = sizes[2];
  a.out.threads = threads, a.out.taps = 1;
  require(a.spatial.count + a.temporal.count > 0, check.op, "both operators have no channels");
  check.given("x", x, nb * sizes[0] * sizes[1] * sizes[2]);
  return a;
}

void winograd(Address x, const Strides5& x_strides, Address x_samples, const OperatorArgs& spatial,
              const OperatorArgs& temporal, const std::array<int, 3>& tiles, Address bias, bool relu,
              Address skip, const Strides5& skip_strides, Address out, const Strides5& out_strides,
              Address samples, int64_t nb, Address sums, int taps, int64_t O,
              const std::array<int64_t, 3>& sizes, int x_dtype, int weight_dtype, int out_dtype, int threads,
              Address seconds) {
  const Check check{"winograd"};
  check.taps(taps), check.float_dtype("out_dtype", out_dtype);
  Winograd a = winograd_arguments(check, x, x_strides, x_samples, spatial, temporal, tiles, nb, O, sizes,
                                  x_dtype, weight_dtype, threads, seconds);
  a.out.bias = pointer<void>(bias), a.out.relu = relu;
  a.out.skip = pointer<void>(skip), a.out.skip_strides = check.strides("skip_strides", skip_strides);
  a.out.out = pointer<void>(out), a.out.out_strides = check.strides("out_strides", out_strides);
  a.out.samples = pointer<int64_t>(samples), a.out.sums = pointer<void>(sums), a.out.taps = taps;
  a.out.in_dtype = kFloat32, a.out.out_dtype = out_dtype;
  check.given("out", out, nb * O * sizes[0] * sizes[1] * sizes[2]);
  raise_for(kernels().winograd(a), check.op);
}

void winograd_gradient(Address x, const Strides5& x_strides, Address samples, const OperatorArgs& spatial,
                       const OperatorArgs& temporal, const std::array<int, 3>& tiles, Address grad,
                       const Strides5& grad_strides, int64_t nb, int64_t O,
                       const std::array<int64_t, 3>& sizes, int x_dtype, int weight_dtype, int grad_dtype,
                       bool add, int threads, Address seconds) {
  const Check check{"winograd_gradient"};
  check.float_dtype("grad_dtype", grad_dtype);
  const Winograd forward = winograd_arguments(check, x, x_strides, samples, spatial, temporal, tiles, nb, O,
                                              sizes, x_dtype, weight_dtype, threads, seconds);
  check.given("grad", grad, nb * O * sizes[0] * sizes[1] * sizes[2]);
  for (const WinogradOperator& op : {forward.spatial, forward.temporal})
    require(op.count == 0 || (op.stride_tap == 1 && !op.blocked), check.op,
            "stride_tap is " + std::to_string(op.stride_tap) + "; wanted 1, and a filter without blocks");
  raise_for(kernels().winograd_gradient(
                {forward, pointer<void>(grad), check.strides("grad_strides", grad_strides), grad_dtype, add}),
            check.op);
}

std::vector<std::string> supported_isas() {
  int n = 0;
  const Kernels* const* tables = supported_kernels(&n);
  std::vector<std::string> names;
  for (int i = 0; i < n; ++i) names.emplace_back(tables[i]->isa);
  return names;
}

void set_isa(const std::string& name) {
  if (name == "auto") return set_kernels(nullptr);
  int n = 0;
  const Kernels* const* tables = supported_kernels(&n);
  std::string wanted = "auto";
  for (int i = 0; i < n; ++i) {
    if (name == tables[i]->isa) return set_kernels(tables[i]);
    wanted += std::string(", ") + tables[i]->isa;
  }
  throw std::invalid_argument("set_isa: name is '" + name + "'; this build on this machine supports " +
                              wanted);
}

py::dict build_info() {
  std::vector<std::string> isas{"portable"};
#ifdef DSTS_HAVE_AVX2
  isas.emplace_back("avx2");
#endif
#ifdef DSTS_HAVE_AVX512
  isas.emplace_back("avx512");
#endif
#ifdef _OPENMP
  const bool openmp = true;
#else
  const bool openmp = false;
#endif
#ifdef DSTS_HAVE_CUDA
  const py::object cuda =
      py::dict("version"_a = DSTS_CUDA_VERSION, "targets"_a = std::vector<int>{DSTS_CUDA_TARGETS});
#else
  const py::object cuda = py::none();
#endif
  return py::dict("compiler"_a = DSTS_COMPILER, "version"_a = DSTS_COMPILER_VERSION, "isas"_a = isas,
                  "openmp"_a = openmp, "cuda"_a = cuda, "flags"_a = DSTS_FLAGS);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Native kernels of dsts_kernels. dtype codes: 0 float32, 1 float64, 2 bfloat16, 3 float16; address 0 "
      "is "
      "null.";
  const py::call_guard<py::gil_scoped_release> unlocked;

  m.def("semhash_forward", &semhash_forward, unlocked, "logits"_a, "neuron"_a, "noise"_a, "hard"_a, "gate"_a,
        "B"_a, "N"_a, "C"_a, "dtype"_a, "threads"_a);
  m.def("semhash_backward", &semhash_backward, unlocked, "grad"_a, "logits"_a, "neuron"_a, "noise"_a,
        "dlogits"_a, "B"_a, "N"_a, "C"_a, "dtype"_a, "threads"_a);
  m.def("tap_sums", &tap_sums, unlocked, "x"_a, "x_strides"_a, "out"_a, "B"_a, "C"_a, "T"_a, "H"_a, "W"_a,
        "taps"_a, "dtype"_a, "threads"_a);
  m.def("gather_panel", &gather_panel, unlocked, "src"_a, "src_strides"_a, "samples"_a, "nb"_a, "channels"_a,
        "nc"_a, "scale"_a, "scale_stride_b"_a, "complement"_a, "out"_a, "out_strides"_a, "width"_a, "T"_a,
        "H"_a, "W"_a, "src_dtype"_a, "out_dtype"_a, "threads"_a);
  m.def("epilogue", &epilogue, unlocked, "zs"_a, "zt"_a, "bias"_a, "bias_stride_b"_a, "relu"_a, "skip"_a,
        "skip_strides"_a, "out"_a, "out_strides"_a, "samples"_a, "nb"_a, "sums"_a, "taps"_a, "O"_a, "T"_a,
        "H"_a, "W"_a, "in_dtype"_a, "out_dtype"_a, "threads"_a);
  m.def("gate_merge", &gate_merge, unlocked, "dxs"_a, "pos_s"_a, "ns"_a, "dxt"_a, "pos_t"_a, "nt"_a, "gate"_a,
        "gate_stride_b"_a, "x"_a, "x_strides"_a, "dx"_a, "dx_strides"_a, "dgate"_a, "samples"_a, "nb"_a,
        "C"_a, "T"_a, "H"_a, "W"_a, "panel_dtype"_a, "dtype"_a, "threads"_a);

  m.def("winograd", &winograd, unlocked, "x"_a, "x_strides"_a, "x_samples"_a, "spatial"_a, "temporal"_a,
        "tiles"_a, "bias"_a, "relu"_a, "skip"_a, "skip_strides"_a, "out"_a, "out_strides"_a, "samples"_a,
        "nb"_a, "sums"_a, "taps"_a, "O"_a, "sizes"_a, "x_dtype"_a, "weight_dtype"_a, "out_dtype"_a,
        "threads"_a, "seconds"_a);
  m.def("winograd_gradient", &winograd_gradient, unlocked, "x"_a, "x_strides"_a, "samples"_a, "spatial"_a,
        "temporal"_a, "tiles"_a, "grad"_a, "grad_strides"_a, "nb"_a, "O"_a, "sizes"_a, "x_dtype"_a,
        "weight_dtype"_a, "grad_dtype"_a, "add"_a, "threads"_a, "seconds"_a);

  m.def("supported_isas", &supported_isas,
        "Instruction sets in this build that this machine can run, the best last.");
  m.def("get_isa", [] { return kernels().isa; }, "The instruction set in use.");
  m.def("set_isa", &set_isa, "name"_a, "Use one of supported_isas(), or 'auto' for the best.");
  m.def("build_info", &build_info,
        "Compiler, its version and flags, instruction sets, OpenMP; CUDA toolkit and targets, or None.");
#ifdef DSTS_HAVE_CUDA
  py::module_ cuda = m.def_submodule("cuda", "CUDA kernels: see csrc/cuda/bindings.cpp.");
  dsts::cuda::bind(cuda);
#endif
}
