// The CUDA kernels for Python, as dsts_kernels._C.cuda. Tensors come as addresses, sizes and strides in
// elements; a call launches on the given device and stream and returns. What addresses point at is the
// caller's responsibility.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace py = pybind11;
using namespace py::literals;

namespace dsts::cuda {

namespace {

using Address = std::uintptr_t;  // 0 is null
using Sizes3 = std::array<int, 3>;
using Strides5 = std::array<int64, 5>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Where a call goes: device, its compute capability times ten, stream.
struct Target {
  int device, capability;
  Address stream;
};

// The device is current while a launch is made, and the one before is current again afterwards.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice"), moved_ = true;
  }
  ~OnDevice() {
    if (moved_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool moved_ = false;
};

void require(bool ok, const char* kernel, const std::string& reason) {
  if (!ok) throw std::invalid_argument(std::string("cuda.") + kernel + ": " + reason);
}

void check_dtype(const char* kernel, int dtype) {
  require(dtype == kFloat32 || dtype == kBFloat16 || dtype == kFloat16, kernel,
          "dtype is " + std::to_string(dtype) + "; wanted 0 (float32), 2 (bfloat16) or 3 (float16)");
}

template <class... N>
void check_sizes(const char* kernel, N... sizes) {
  for (const int64 n : {static_cast<int64>(sizes)...})
    require(n >= 1, kernel, "a size is " + std::to_string(n) + "; wanted 1 or more");
}

template <class... A>
void check_given(const char* kernel, A... addresses) {
  for (const Address address : {addresses...})
    require(address != 0, kernel, "an address that must be given is null");
}

Extent extent(const char* kernel, const Sizes3& s) {
  check_sizes(kernel, s[0], s[1], s[2]);
  require(static_cast<int64>(s[0]) * s[1] * s[2] < (1ll << 31) - kTile, kernel, "too many positions");
  return extent_of(s[0], s[1], s[2]);
}

// Taps of a kernel that convolutions take: 1x1x1, 1x3x3, 3x1x1 and the like.
int taps_of(const char* kernel, const Sizes3& sides) {
  bool ok = true;
  for (const int side : sides) ok &= side == 1 || side == 3;
  const int taps = sides[0] * sides[1] * sides[2];
  require(ok && taps <= 9, kernel,
          "the kernel is " + std::to_string(sides[0]) + "x" + std::to_string(sides[1]) + "x" +
              std::to_string(sides[2]) + "; wanted sides of 1 or 3 and at most 9 taps");
  return taps;
}

Strides strides(const Strides5& s) { return {s[0], s[1], s[2], s[3], s[4]}; }

void semhash_py(Address grad, Address logits, Address noise, Address neuron, Address hard, Address out,
                int batch, int neurons, int channels, bool backward, int dtype, const Target& to) {
  check_dtype("semhash", dtype), check_sizes("semhash", batch, neurons, channels);
  check_given("semhash", logits, out);
  require(!backward || grad, "semhash", "grad is null");
  const OnDevice guard(to.device);
  semhash({pointer<void>(grad), pointer<void>(logits), pointer<void>(noise), pointer<int64>(neuron),
           pointer<unsigned char>(hard), pointer<void>(out), batch, neurons, channels},
          backward, dtype, pointer<void>(to.stream));
}

void tap_sums_py(Address x, const Sizes3& size, const Strides5& x_strides, Address sums, int batch,
                 int channels, int parts, int taps, bool vector, int dtype, const Target& to) {
  check_dtype("tap_sums", dtype), check_sizes("tap_sums", batch, channels, parts),
      check_given("tap_sums", x, sums);
  require(taps == 1 || taps == 9, "tap_sums", "taps is " + std::to_string(taps) + "; wanted 1 or 9");
  const OnDevice guard(to.device);
  tap_sums({pointer<void>(x), pointer<float>(sums), extent("tap_sums", size), strides(x_strides), batch,
            channels, parts, vector},
           taps, dtype, pointer<void>(to.stream));
}

void group_samples_py(Address neuron, Address slots, Address neuron_of, Address slot_of, Address groups,
                      Address members, int batch, int neurons, int slot_count, const Target& to) {
  check_sizes("group_samples", batch, neurons, slot_count);
  check_given("group_samples", neuron, slots, neuron_of, slot_of, groups, members);
  const OnDevice guard(to.device);
  group_samples({pointer<int64>(neuron), pointer<int>(slots), pointer<int>(neuron_of), pointer<int>(slot_of),
                 pointer<int>(groups), pointer<int>(members), batch, neurons, slot_count},
                pointer<void>(to.stream));
}

void list_channels_py(Address gate, Address slots, Address neuron_of, Address groups, Address members,
                      Address order, Address plans, Address listed, int rows, int channels, int block,
                      bool by_slot, const Target& to) {
  check_sizes("list_channels", rows, channels, block);
  check_given("list_channels", gate, slots, neuron_of, groups, members, order, plans);
  require(!by_slot || listed, "list_channels", "listed is null");
  const OnDevice guard(to.device);
  list_channels({pointer<float>(gate), pointer<int>(slots), pointer<int>(neuron_of), pointer<int>(groups),
                 pointer<int>(members), pointer<int>(order), pointer<int>(plans),
                 pointer<signed char>(listed), rows, channels, block, by_slot},
                pointer<void>(to.stream));
}

// How many rows of features a block takes whole at a time: such rows are 16 bytes at a time and fit.
void by_rows(const char* kernel, GatherParams& p, int rows, int dtype) {
  const int vector = dtype == kFloat32 ? 4 : 8;
  require(rows == 0 || (p.x_strides.c == 1 && p.channels % vector == 0), kernel,
          "rows is " + std::to_string(rows) + "; wanted 0 where channels are no whole 16 bytes side by side");
  require(rows >= 0 && rows * (p.channels / vector) <= kRowsBytes / 16, kernel,
          "rows is " + std::to_string(rows) + "; wanted at most " + std::to_string(kRowsBytes) +
              " bytes of them");
  p.rows = rows, p.by_vectors = divide_by(std::max(1, p.channels / vector));
}

void gather_panel_py(Address x, const Sizes3& size, const Strides5& x_strides, Address panel, int batch,
                     int channels, int pitch, int shares, int rows, Address order, Address slots,
                     Address plans, Address gate, Address neuron, int neurons, int dtype, const Target& to) {
  check_dtype("gather_panel", dtype), check_sizes("gather_panel", batch, channels, pitch, shares, neurons);
  check_given("gather_panel", x, panel, order, plans, gate, neuron);
  GatherParams p{};
  p.x = pointer<void>(x), p.extent = extent("gather_panel", size), p.x_strides = strides(x_strides);
  p.panel = pointer<void>(panel), p.batch = batch, p.channels = channels, p.pitch = pitch, p.shares = shares;
  by_rows("gather_panel", p, rows, dtype);
  p.order = pointer<int>(order), p.slots = pointer<int>(slots), p.plans = pointer<int>(plans);
  p.gate = pointer<float>(gate), p.neuron = pointer<int64>(neuron), p.neurons = neurons;
  const OnDevice guard(to.device);
  gather_panel(p, dtype, pointer<void>(to.stream));
}

void route_and_gather_py(Address x, const Sizes3& size, const Strides5& x_strides, Address panel, int batch,
                         int channels, int pitch, int shares, int rows, Address sums, Address scoring,
                         Address channels_of, Address starts, Address plan, Address chosen, Address scores,
                         Address flags, float divisor, int neurons, int parts, int taps, int flag_count,
                         int dtype, const Target& to) {
  check_dtype("route_and_gather", dtype);
  check_sizes("route_and_gather", batch, channels, pitch, shares, neurons, parts, taps, flag_count);
  require(taps == 1 || taps == 9, "route_and_gather", "taps is " + std::to_string(taps) + "; wanted 1 or 9");
  check_given("route_and_gather", x, panel, sums, scoring, channels_of, starts, plan, chosen, scores, flags);
  GatherParams p{};
  p.x = pointer<void>(x), p.extent = extent("route_and_gather", size), p.x_strides = strides(x_strides);
  p.panel = pointer<void>(panel), p.batch = batch, p.channels = channels, p.pitch = pitch, p.shares = shares;
  by_rows("route_and_gather", p, rows, dtype);
  p.sums = pointer<float>(sums), p.scoring = pointer<float>(scoring),
  p.channels_of = pointer<int>(channels_of);
  p.starts = pointer<int64>(starts), p.plan = pointer<int>(plan), p.chosen = pointer<int64>(chosen);
  p.scores = pointer<float>(scores), p.flags = pointer<int>(flags), p.divisor = divisor, p.neurons = neurons;
  p.parts = parts, p.taps = taps, p.flag_count = flag_count;
  const OnDevice guard(to.device);
  route_and_gather(p, dtype, pointer<void>(to.stream));
}

FilterParams filter_params(const char* kernel, Address from, Address into, Address index, Address listed,
                           int outputs, int channels, int taps, int first_tap, int all_taps, bool by_channel,
                           int pitch, int bit) {
  check_sizes(kernel, outputs, channels, taps, all_taps, pitch);
  check_given(kernel, from, into, index);
  require(first_tap >= 0 && first_tap + taps <= all_taps, kernel, "the taps do not lie within all_taps");
  require(pitch >= (by_channel ? outputs : channels), kernel, "pitch is less than a row");
  return {pointer<void>(from),
          pointer<void>(into),
          pointer<int>(index),
          pointer<signed char>(listed),
          outputs,
          channels,
          taps,
          first_tap,
          all_taps,
          by_channel,
          pitch,
          bit,
          divide_by(taps),
          0};
}

void pack_filters_py(Address from, Address into, Address neuron_of, int outputs, int channels, int taps,
                     int first_tap, int all_taps, bool by_channel, int pitch, int slots, int from_dtype,
                     int dtype, const Target& to) {
  check_dtype("pack_filters", from_dtype), check_dtype("pack_filters", dtype),
      check_sizes("pack_filters", slots);
  require(from_dtype == dtype || from_dtype == kFloat32, "pack_filters",
          "from_dtype is neither dtype nor float32");
  const FilterParams p = filter_params("pack_filters", from, into, neuron_of, 0, outputs, channels, taps,
                                       first_tap, all_taps, by_channel, pitch, 0);
  const OnDevice guard(to.device);
  pack_filters(p, slots, from_dtype, dtype, pointer<void>(to.stream));
}

void unpack_filters_py(Address from, Address into, Address slot_of, Address listed, int bit, int outputs,
                       int channels, int taps, int first_tap, int all_taps, bool by_channel, int pitch,
                       int neurons, int dtype, const Target& to) {
  check_dtype("unpack_filters", dtype), check_sizes("unpack_filters", neurons);
  require(bit >= 1 && bit <= 3, "unpack_filters", "bit is " + std::to_string(bit) + "; wanted 1, 2 or 3");
  const FilterParams p = filter_params("unpack_filters", from, into, slot_of, listed, outputs, channels, taps,
                                       first_tap, all_taps, by_channel, pitch, bit);
  const OnDevice guard(to.device);
  unpack_filters(p, neurons, dtype, pointer<void>(to.stream));
}

// Addresses of a convolution: panel, filters, order, plan, index, bias, skip, out, part_sums, sums, partial,
// flags.
using ConvAddresses = std::array<Address, 12>;

void conv_py(const ConvAddresses& a, const Sizes3& size, const Strides5& out_strides, int batch, int width,
             int pitch, int rows, int slots, int outputs, int filter_pitch, const Sizes3& kernel, bool second,
             int sign, const std::string& form, bool index_wide, bool relu, int sum_taps, int programs,
             int waves, bool vector_out, int dtype, bool tf32, const Target& to) {
  check_dtype("conv", dtype),
      check_sizes("conv", batch, width, pitch, outputs, filter_pitch, programs, waves + 1);
  check_given("conv", a[0], a[1], a[7], a[10], a[11], a[3] ? a[3] : a[4]);
  require(form == "packed" || form == "stored" || form == "listed" || form == "transposed", "conv",
          "form is '" + form + "'; wanted 'packed', 'rows', 'listed' or 'columns'");
  require(sum_taps == 0 || ((sum_taps == 1 || sum_taps == 9) && a[8] && a[9]), "conv",
          "sum_taps is " + std::to_string(sum_taps) + "; wanted 0, or 1 or 9 with part_sums and sums");
  const int taps = taps_of("conv", kernel), most = 8 * 128;
  require(programs <= most, "conv",
          "programs is " + std::to_string(programs) + "; wanted at most " + std::to_string(most));
  ConvParams p{};
  p.panel = pointer<void>(a[0]), p.filters = pointer<void>(a[1]), p.order = pointer<int>(a[2]);
  p.plan = pointer<int>(a[3]), p.index = pointer<void>(a[4]), p.bias = pointer<float>(a[5]);
  p.skip = pointer<void>(a[6]), p.out = pointer<void>(a[7]), p.part_sums = pointer<float>(a[8]);
  p.sums = pointer<float>(a[9]), p.partial = pointer<float>(a[10]), p.flags = pointer<int>(a[11]);
  p.extent = extent("conv", size), p.out_strides = strides(out_strides);
  const auto tiles_of = [](int64 n) { return (n + kTile - 1) / kTile; };
  const int64 tiles = batch * tiles_of(p.extent.positions) * tiles_of(outputs);
  const int64 shared_tiles = tiles - static_cast<int64>(waves) * programs;
  require(shared_tiles >= 1 && shared_tiles <= 2 * programs, "conv",
          std::to_string(waves) + " waves of " + std::to_string(programs) + " programs leave " +
              std::to_string(shared_tiles) + " tiles over; wanted 1 to 2 a program");
  p.batch = batch, p.width = width, p.pitch = pitch, p.rows = rows, p.slots = slots, p.outputs = outputs;
  p.filter_pitch = filter_pitch, p.kt = kernel[0], p.kh = kernel[1], p.kw = kernel[2];
  p.taps_1 = taps, p.taps_2 = second ? 3 : 0, p.sign = sign, p.index_wide = index_wide;
  p.packed = form == "packed", p.relu = relu, p.sum_taps = sum_taps, p.programs = programs, p.waves = waves;
  p.vector_out = vector_out;
  const OnDevice guard(to.device);
  conv(p, form == "listed" || form == "transposed", dtype, tf32, to.capability, pointer<void>(to.stream));
}

void data_gradient_py(Address grad, Address filters, Address order, Address plans, Address gate, Address x,
                      Address dx, Address dgate, const Sizes3& size, const Strides5& x_strides, int batch,
                      int channels, int outputs, int pitch, bool listed, int dtype, bool tf32,
                      const Target& to) {
  check_dtype("data_gradient", dtype), check_sizes("data_gradient", batch, channels, outputs, pitch);
  check_given("data_gradient", grad, filters, order, plans, gate, x, dx ? dx : dgate);
  require(!(listed && dgate), "data_gradient", "dgate needs every channel, listed or not");
  const OnDevice guard(to.device);
  data_gradient({pointer<void>(grad), pointer<void>(filters), pointer<int>(order), pointer<int>(plans),
                 pointer<float>(gate), pointer<void>(x), pointer<void>(dx), pointer<float>(dgate),
                 extent("data_gradient", size), strides(x_strides), batch, channels, outputs, pitch, listed},
                dtype, tf32, to.capability, pointer<void>(to.stream));
}

void weight_gradient_py(Address left, Address right, Address order, Address plans, Address neuron_of,
                        Address groups, Address members, Address out, const Sizes3& size, int left_pitch,
                        int right_pitch, int rows, int columns, int slots, const Sizes3& kernel, bool second,
                        int sign, bool by_neuron, bool out_float, int dtype, bool tf32, const Target& to) {
  check_dtype("weight_gradient", dtype);
  check_sizes("weight_gradient", left_pitch, right_pitch, rows, columns, slots);
  check_given("weight_gradient", left, right, neuron_of, groups, members, out);
  const int taps = taps_of("weight_gradient", kernel);
  const OnDevice guard(to.device);
  weight_gradient({pointer<void>(left),
                   pointer<void>(right),
                   pointer<int>(order),
                   pointer<int>(plans),
                   pointer<int>(neuron_of),
                   pointer<int>(groups),
                   pointer<int>(members),
                   pointer<void>(out),
                   extent("weight_gradient", size),
                   left_pitch,
                   right_pitch,
                   rows,
                   columns,
                   slots,
                   kernel[0],
                   kernel[1],
                   kernel[2],
                   taps,
                   second ? 3 : 0,
                   sign,
                   by_neuron,
                   out_float},
                  dtype, tf32, to.capability, pointer<void>(to.stream));
}

}  // namespace

void bind(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  py::class_<Target>(m, "Target", "Where a call goes.")
      .def(py::init(
               [](int device, int capability, Address stream) { return Target{device, capability, stream}; }),
           "device"_a, "capability"_a, "stream"_a);
  m.attr("TILE") = kTile, m.attr("GATHER") = kGather, m.attr("LEAST") = kLeast;
  m.attr("ROWS_BYTES") = kRowsBytes;
  m.def("semhash", &semhash_py, unlocked);
  m.def("tap_sums", &tap_sums_py, unlocked);
  m.def("group_samples", &group_samples_py, unlocked);
  m.def("list_channels", &list_channels_py, unlocked);
  m.def("gather_panel", &gather_panel_py, unlocked);
  m.def("route_and_gather", &route_and_gather_py, unlocked);
  m.def("pack_filters", &pack_filters_py, unlocked);
  m.def("unpack_filters", &unpack_filters_py, unlocked);
  m.def("conv", &conv_py, unlocked);
  m.def("data_gradient", &data_gradient_py, unlocked);
  m.def("weight_gradient", &weight_gradient_py, unlocked);
}

}  // namespace dsts::cuda
