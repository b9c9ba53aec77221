// The CUDA kernels for Python, as dsts_kernels._C.cuda. Tensors come as addresses, sizes and strides in
// elements, all by keyword; a call launches on the given device and stream and returns. What addresses point
// at is the caller's responsibility. Names stand beside the parameters that they are of, in the same order.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstddef>

#include "cuda/arguments.h"
#include "cuda/grids.h"
#include "cuda/kernels.h"

namespace py = pybind11;
using namespace py::literals;

namespace dsts::cuda {

namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;

void bind_semhash(py::module_& m) {
  m.def(
      "semhash",
      [](Address grad, Address logits, Address noise, Address neuron, Address hard, Address out, int batch,
         int neurons, int channels, bool backward, int dtype, const Target& target) {
        const char* kernel = "semhash";
        check_dtype(kernel, "dtype", dtype);
        check_sizes(kernel, {{"batch", batch}, {"neurons", neurons}, {"channels", channels}});
        check_given(kernel, {{"logits", logits}, {"out", out}});
        if (backward) check_given(kernel, {{"grad", grad}});
        const OnDevice guard(target.device);
        semhash({pointer<void>(grad), pointer<void>(logits), pointer<void>(noise), pointer<int64>(neuron),
                 pointer<unsigned char>(hard), pointer<void>(out), batch, neurons, channels},
                backward, dtype, pointer<void>(target.stream));
      },
      Unlocked(), py::kw_only(), "grad"_a, "logits"_a, "noise"_a, "neuron"_a, "hard"_a, "out"_a, "batch"_a,
      "neurons"_a, "channels"_a, "backward"_a, "dtype"_a, "target"_a);
}

void bind_tap_sums(py::module_& m) {
  m.def(
      "tap_sums",
      [](Address x, const Sizes3& size, const Strides5& x_strides, Address sums, int batch, int channels,
         int parts, int taps, bool vector, int dtype, const Target& target) {
        const char* kernel = "tap_sums";
        check_dtype(kernel, "dtype", dtype), check_taps(kernel, taps);
        check_sizes(kernel, {{"batch", batch}, {"channels", channels}, {"parts", parts}});
        check_given(kernel, {{"x", x}, {"sums", sums}});
        const OnDevice guard(target.device);
        tap_sums({pointer<void>(x), pointer<float>(sums), extent(kernel, size), strides(x_strides), batch,
                  channels, parts, vector},
                 taps, dtype, pointer<void>(target.stream));
      },
      Unlocked(), py::kw_only(), "x"_a, "size"_a, "x_strides"_a, "sums"_a, "batch"_a, "channels"_a, "parts"_a,
      "taps"_a, "vector"_a, "dtype"_a, "target"_a);
}

void bind_lists(py::module_& m) {
  m.def(
      "group_samples",
      [](Address neuron, Address slots, Address neuron_of, Address slot_of, Address groups, Address members,
         int batch, int neurons, int num_slots, const Target& target) {
        const char* kernel = "group_samples";
        check_sizes(kernel, {{"batch", batch}, {"neurons", neurons}, {"num_slots", num_slots}});
        check_given(kernel, {{"neuron", neuron},
                             {"slots", slots},
                             {"neuron_of", neuron_of},
                             {"slot_of", slot_of},
                             {"groups", groups},
                             {"members", members}});
        const OnDevice guard(target.device);
        group_samples(
            {pointer<int64>(neuron), pointer<int>(slots), pointer<int>(neuron_of), pointer<int>(slot_of),
             pointer<int>(groups), pointer<int>(members), batch, neurons, num_slots},
            pointer<void>(target.stream));
      },
      Unlocked(), py::kw_only(), "neuron"_a, "slots"_a, "neuron_of"_a, "slot_of"_a, "groups"_a, "members"_a,
      "batch"_a, "neurons"_a, "num_slots"_a, "target"_a);
  m.def(
      "list_channels",
      [](Address gate, Address slots, Address neuron_of, Address groups, Address members, Address order,
         Address plans, Address listed, int num_lists, int channels, int k_block, bool by_slot,
         const Target& target) {
        const char* kernel = "list_channels";
        check_sizes(kernel, {{"num_lists", num_lists}, {"channels", channels}, {"k_block", k_block}});
        check_given(kernel, {{"gate", gate},
                             {"slots", slots},
                             {"neuron_of", neuron_of},
                             {"groups", groups},
                             {"members", members},
                             {"order", order},
                             {"plans", plans}});
        if (by_slot) check_given(kernel, {{"listed", listed}});
        const OnDevice guard(target.device);
        list_channels({pointer<float>(gate), pointer<int>(slots), pointer<int>(neuron_of),
                       pointer<int>(groups), pointer<int>(members), pointer<int>(order), pointer<Plan>(plans),
                       pointer<signed char>(listed), num_lists, channels, k_block, by_slot},
                      pointer<void>(target.stream));
      },
      Unlocked(), py::kw_only(), "gate"_a, "slots"_a, "neuron_of"_a, "groups"_a, "members"_a, "order"_a,
      "plans"_a, "listed"_a, "num_lists"_a, "channels"_a, "k_block"_a, "by_slot"_a, "target"_a);
}

GatherParams gather_params(const char* kernel, Address x, Address panel, const Sizes3& size,
                           const Strides5& x_strides, int batch, int channels, int pitch, int splits,
                           int whole_positions, int dtype) {
  check_dtype(kernel, "dtype", dtype);
  check_sizes(kernel, {{"batch", batch}, {"channels", channels}, {"pitch", pitch}, {"splits", splits}});
  check_given(kernel, {{"x", x}, {"panel", panel}});
  const int vector = kVectorBytes / element_bytes(dtype), most = kGatherBytes / kVectorBytes;
  if (whole_positions != 0 && (x_strides[1] != 1 || channels % vector != 0))
    fail(kernel, "whole_positions is ", whole_positions,
         "; wanted 0 where channels are no whole 16 bytes side by side");
  if (whole_positions < 0 || static_cast<int64>(whole_positions) * (channels / vector) > most)
    fail(kernel, "whole_positions is ", whole_positions, "; wanted at most ", kGatherBytes, " bytes of them");
  return {pointer<void>(x),
          pointer<void>(panel),
          extent(kernel, size),
          strides(x_strides),
          batch,
          channels,
          pitch,
          splits,
          whole_positions,
          fast_divmod(std::max(1, channels / vector))};
}

void bind_gather_panel(py::module_& m) {
  m.def(
      "gather_panel",
      [](Address x, Address panel, const Sizes3& size, const Strides5& x_strides, int batch, int channels,
         int pitch, int splits, int whole_positions, Address order, Address slots, Address plans,
         Address gate, Address neuron, int neurons, int dtype, const Target& target) {
        const char* kernel = "gather_panel";
        const GatherParams gather = gather_params(kernel, x, panel, size, x_strides, batch, channels, pitch,
                                                  splits, whole_positions, dtype);
        check_sizes(kernel, {{"neurons", neurons}});
        check_given(kernel, {{"order", order}, {"plans", plans}, {"gate", gate}, {"neuron", neuron}});
        const OnDevice guard(target.device);
        gather_panel({gather, pointer<int>(order), pointer<int>(slots), pointer<Plan>(plans),
                      pointer<float>(gate), pointer<int64>(neuron), neurons},
                     dtype, pointer<void>(target.stream));
      },
      Unlocked(), py::kw_only(), "x"_a, "panel"_a, "size"_a, "x_strides"_a, "batch"_a, "channels"_a,
      "pitch"_a, "splits"_a, "whole_positions"_a, "order"_a, "slots"_a, "plans"_a, "gate"_a, "neuron"_a,
      "neurons"_a, "dtype"_a, "target"_a);
}

void bind_route_and_gather(py::module_& m) {
  m.def(
      "route_and_gather",
      [](Address x, Address panel, const Sizes3& size, const Strides5& x_strides, int batch, int channels,
         int pitch, int splits, int whole_positions, Address sums, Address scoring, Address channels_of,
         Address starts, Address plan, Address neuron, Address scores, Address arrival_counters,
         float divisor, int neurons, int parts, int taps, int num_arrival_counters, int dtype,
         const Target& target) {
        const char* kernel = "route_and_gather";
        const GatherParams gather = gather_params(kernel, x, panel, size, x_strides, batch, channels, pitch,
                                                  splits, whole_positions, dtype);
        check_taps(kernel, taps);
        check_sizes(kernel,
                    {{"neurons", neurons}, {"parts", parts}, {"num_arrival_counters", num_arrival_counters}});
        check_given(kernel, {{"sums", sums},
                             {"scoring", scoring},
                             {"channels_of", channels_of},
                             {"starts", starts},
                             {"plan", plan},
                             {"neuron", neuron},
                             {"scores", scores},
                             {"arrival_counters", arrival_counters}});
        const OnDevice guard(target.device);
        route_and_gather(
            {gather, pointer<float>(sums), pointer<float>(scoring), pointer<int>(channels_of),
             pointer<int64>(starts), pointer<Plan>(plan), pointer<int64>(neuron), pointer<float>(scores),
             pointer<int>(arrival_counters), divisor, neurons, parts, taps, num_arrival_counters},
            dtype, pointer<void>(target.stream));
      },
      Unlocked(), py::kw_only(), "x"_a, "panel"_a, "size"_a, "x_strides"_a, "batch"_a, "channels"_a,
      "pitch"_a, "splits"_a, "whole_positions"_a, "sums"_a, "scoring"_a, "channels_of"_a, "starts"_a,
      "plan"_a, "neuron"_a, "scores"_a, "arrival_counters"_a, "divisor"_a, "neurons"_a, "parts"_a, "taps"_a,
      "num_arrival_counters"_a, "dtype"_a, "target"_a);
}

void check_filters(const char* kernel, int outputs, int channels, int taps, int first_tap, int all_taps,
                   bool by_channel, int pitch) {
  check_sizes(kernel, {{"outputs", outputs},
                       {"channels", channels},
                       {"taps", taps},
                       {"all_taps", all_taps},
                       {"pitch", pitch}});
  if (first_tap < 0 || first_tap + taps > all_taps)
    fail(kernel, "first_tap is ", first_tap, "; wanted ", taps, " taps from it on to lie within all_taps (",
         all_taps, ")");
  const int row = by_channel ? outputs : channels;
  if (pitch < row) fail(kernel, "pitch is ", pitch, "; wanted at least a row (", row, ")");
}

void bind_filters(py::module_& m) {
  m.def(
      "pack_filters",
      [](Address weight, Address filters, Address neuron_of, int outputs, int channels, int taps,
         int first_tap, int all_taps, bool by_channel, int pitch, int slots, int weight_dtype, int dtype,
         const Target& target) {
        const char* kernel = "pack_filters";
        check_dtype(kernel, "weight_dtype", weight_dtype), check_dtype(kernel, "dtype", dtype);
        if (weight_dtype != dtype && weight_dtype != kFloat32)
          fail(kernel, "weight_dtype is ", weight_dtype, "; wanted dtype (", dtype, ") or 0 (float32)");
        check_sizes(kernel, {{"slots", slots}});
        check_filters(kernel, outputs, channels, taps, first_tap, all_taps, by_channel, pitch);
        check_given(kernel, {{"weight", weight}, {"filters", filters}, {"neuron_of", neuron_of}});
        const OnDevice guard(target.device);
        pack_filters(
            {pointer<void>(weight), pointer<void>(filters), pointer<int>(neuron_of), nullptr, outputs,
             channels, taps, first_tap, all_taps, by_channel, pitch, 0, fast_divmod(taps), false},
            slots, weight_dtype, dtype, pointer<void>(target.stream));
      },
      Unlocked(), py::kw_only(), "weight"_a, "filters"_a, "neuron_of"_a, "outputs"_a, "channels"_a, "taps"_a,
      "first_tap"_a, "all_taps"_a, "by_channel"_a, "pitch"_a, "slots"_a, "weight_dtype"_a, "dtype"_a,
      "target"_a);
  m.def(
      "unpack_filters",
      [](Address filters, Address weight, Address slot_of, Address listed, int reader, int outputs,
         int channels, int taps, int first_tap, int all_taps, bool by_channel, int pitch, int neurons,
         int dtype, const Target& target) {
        const char* kernel = "unpack_filters";
        const int both = kReadBySpatial + kReadByTemporal;
        check_dtype(kernel, "dtype", dtype), check_sizes(kernel, {{"neurons", neurons}});
        if (listed && (reader < 1 || reader > both))
          fail(kernel, "reader is ", reader, "; wanted ", kReadBySpatial, ", ", kReadByTemporal, " or ",
               both);
        check_filters(kernel, outputs, channels, taps, first_tap, all_taps, by_channel, pitch);
        check_given(kernel, {{"filters", filters}, {"weight", weight}, {"slot_of", slot_of}});
        const OnDevice guard(target.device);
        unpack_filters({pointer<void>(filters), pointer<void>(weight), pointer<int>(slot_of),
                        pointer<signed char>(listed), outputs, channels, taps, first_tap, all_taps,
                        by_channel, pitch, reader, fast_divmod(taps), false},
                       neurons, dtype, pointer<void>(target.stream));
      },
      Unlocked(), py::kw_only(), "filters"_a, "weight"_a, "slot_of"_a, "listed"_a, "reader"_a, "outputs"_a,
      "channels"_a, "taps"_a, "first_tap"_a, "all_taps"_a, "by_channel"_a, "pitch"_a, "neurons"_a, "dtype"_a,
      "target"_a);
}

// Whole waves leave one to two tiles a CTA, for which schedule.h has memory.
void check_grid(const char* kernel, int64 tiles, int num_ctas, int waves) {
  check_sizes(kernel, {{"num_ctas", num_ctas}});
  if (num_ctas > kMaxCtas) fail(kernel, "num_ctas is ", num_ctas, "; wanted at most ", kMaxCtas);
  if (waves < 0) fail(kernel, "waves is ", waves, "; wanted 0 or more");
  const int64 rest = tiles - static_cast<int64>(waves) * num_ctas;
  if (rest < 1 || rest > 2 * num_ctas)
    fail(kernel, waves, " waves of ", num_ctas, " CTAs leave ", rest, " tiles over; wanted 1 to 2 a CTA");
}

void bind_conv(py::module_& m) {
  m.def(
      "conv",
      [](Address panel, Address filters, Address order, Address plan, Address index, Address bias,
         Address skip, Address out, Address tile_sums, Address sums, Address workspace,
         Address arrival_counters, const Sizes3& size, const Strides5& out_strides, int batch, int width,
         int pitch, int k_channels, int slots, int outputs, int filter_pitch, const Sizes3& sides,
         bool with_temporal, int sign, const std::string& form, bool index_64, bool relu, int sum_taps,
         int num_ctas, int waves, bool vector_out, int dtype, bool tf32, const Target& target) {
        const char* kernel = "conv";
        check_dtype(kernel, "dtype", dtype);
        check_sizes(kernel, {{"batch", batch},
                             {"width", width},
                             {"pitch", pitch},
                             {"outputs", outputs},
                             {"filter_pitch", filter_pitch}});
        check_given(kernel, {{"panel", panel},
                             {"filters", filters},
                             {"out", out},
                             {"workspace", workspace},
                             {"arrival_counters", arrival_counters}});
        if (!plan) check_given(kernel, {{"index", index}});
        const bool by_output = form == "listed" || form == "transposed";
        if (!by_output && form != "packed" && form != "stored")
          fail(kernel, "form is '", form, "'; wanted 'packed', 'stored', 'listed' or 'transposed'");
        if (sum_taps != 0) {
          if (sum_taps != 1 && sum_taps != kMaxSumTaps)
            fail(kernel, "sum_taps is ", sum_taps, "; wanted 0, 1 or ", kMaxSumTaps);
          check_given(kernel, {{"tile_sums", tile_sums}, {"sums", sums}});
        }
        const int taps = taps_of(kernel, sides);
        const Extent e = extent(kernel, size);
        check_grid(kernel, static_cast<int64>(batch) * tiles_of(e.positions) * tiles_of(outputs), num_ctas,
                   waves);
        ConvParams p{};
        p.panel = pointer<void>(panel), p.filters = pointer<void>(filters);
        p.order = pointer<int>(order), p.plan = pointer<Plan>(plan), p.index = pointer<void>(index);
        p.bias = pointer<float>(bias), p.skip = pointer<void>(skip), p.out = pointer<void>(out);
        p.tile_sums = pointer<float>(tile_sums), p.sums = pointer<float>(sums);
        p.workspace = pointer<float>(workspace), p.arrival_counters = pointer<int>(arrival_counters);
        p.extent = e, p.out_strides = strides(out_strides), p.batch = batch, p.width = width;
        p.pitch = pitch, p.k_channels = k_channels, p.slots = slots, p.outputs = outputs;
        p.filter_pitch = filter_pitch, p.kt = sides[0], p.kh = sides[1], p.kw = sides[2];
        p.spatial_taps = taps, p.temporal_taps = with_temporal ? kTemporalTaps : 0, p.sign = sign;
        p.index_64 = index_64, p.packed = form == "packed", p.relu = relu, p.sum_taps = sum_taps;
        p.num_ctas = num_ctas, p.waves = waves, p.vector_out = vector_out;
        const OnDevice guard(target.device);
        conv(p, by_output, dtype, tf32, target.capability, pointer<void>(target.stream));
      },
      Unlocked(), py::kw_only(), "panel"_a, "filters"_a, "order"_a, "plan"_a, "index"_a, "bias"_a, "skip"_a,
      "out"_a, "tile_sums"_a, "sums"_a, "workspace"_a, "arrival_counters"_a, "size"_a, "out_strides"_a,
      "batch"_a, "width"_a, "pitch"_a, "k_channels"_a, "slots"_a, "outputs"_a, "filter_pitch"_a, "kernel"_a,
      "with_temporal"_a, "sign"_a, "form"_a, "index_64"_a, "relu"_a, "sum_taps"_a, "num_ctas"_a, "waves"_a,
      "vector_out"_a, "dtype"_a, "tf32"_a, "target"_a);
}

void bind_gradients(py::module_& m) {
  m.def(
      "data_gradient",
      [](Address grad, Address filters, Address order, Address plans, Address gate, Address x, Address dx,
         Address dgate, const Sizes3& size, const Strides5& x_strides, int batch, int channels, int outputs,
         int pitch, bool listed, int dtype, bool tf32, const Target& target) {
        const char* kernel = "data_gradient";
        check_dtype(kernel, "dtype", dtype);
        check_sizes(kernel,
                    {{"batch", batch}, {"channels", channels}, {"outputs", outputs}, {"pitch", pitch}});
        check_given(kernel, {{"grad", grad},
                             {"filters", filters},
                             {"order", order},
                             {"plans", plans},
                             {"gate", gate},
                             {"x", x},
                             {"dx or dgate", dx ? dx : dgate}});
        if (listed && dgate) fail(kernel, "dgate is given with listed; dgate needs every channel");
        const OnDevice guard(target.device);
        data_gradient({pointer<void>(grad), pointer<void>(filters), pointer<int>(order), pointer<Plan>(plans),
                       pointer<float>(gate), pointer<void>(x), pointer<void>(dx), pointer<float>(dgate),
                       extent(kernel, size), strides(x_strides), batch, channels, outputs, pitch, listed},
                      dtype, tf32, target.capability, pointer<void>(target.stream));
      },
      Unlocked(), py::kw_only(), "grad"_a, "filters"_a, "order"_a, "plans"_a, "gate"_a, "x"_a, "dx"_a,
      "dgate"_a, "size"_a, "x_strides"_a, "batch"_a, "channels"_a, "outputs"_a, "pitch"_a, "listed"_a,
      "dtype"_a, "tf32"_a, "target"_a);
  m.def(
      "weight_gradient",
      [](Address left, Address right, Address order, Address plans, Address neuron_of, Address groups,
         Address members, Address out, const Sizes3& size, int left_pitch, int right_pitch, int rows,
         int columns, int slots, const Sizes3& sides, bool with_temporal, int sign, bool by_neuron,
         bool out_float, int dtype, bool tf32, const Target& target) {
        const char* kernel = "weight_gradient";
        check_dtype(kernel, "dtype", dtype);
        check_sizes(kernel, {{"left_pitch", left_pitch},
                             {"right_pitch", right_pitch},
                             {"rows", rows},
                             {"columns", columns},
                             {"slots", slots}});
        check_given(kernel, {{"left", left},
                             {"right", right},
                             {"neuron_of", neuron_of},
                             {"groups", groups},
                             {"members", members},
                             {"out", out}});
        WeightGradientParams p{};
        p.left = pointer<void>(left), p.right = pointer<void>(right);
        p.order = pointer<int>(order), p.plans = pointer<Plan>(plans);
        p.neuron_of = pointer<int>(neuron_of), p.groups = pointer<int>(groups);
        p.members = pointer<int>(members), p.out = pointer<void>(out), p.extent = extent(kernel, size);
        p.left_pitch = left_pitch, p.right_pitch = right_pitch, p.rows = rows, p.columns = columns;
        p.slots = slots, p.kt = sides[0], p.kh = sides[1], p.kw = sides[2];
        p.spatial_taps = taps_of(kernel, sides), p.temporal_taps = with_temporal ? kTemporalTaps : 0;
        p.sign = sign, p.by_neuron = by_neuron, p.out_float = out_float;
        const OnDevice guard(target.device);
        weight_gradient(p, dtype, tf32, target.capability, pointer<void>(target.stream));
      },
      Unlocked(), py::kw_only(), "left"_a, "right"_a, "order"_a, "plans"_a, "neuron_of"_a, "groups"_a,
      "members"_a, "out"_a, "size"_a, "left_pitch"_a, "right_pitch"_a, "rows"_a, "columns"_a, "slots"_a,
      "kernel"_a, "with_temporal"_a, "sign"_a, "by_neuron"_a, "out_float"_a, "dtype"_a, "tf32"_a, "target"_a);
}

// Sizes and codes that Python counts with too; tests hold its own to these.
void bind_tables(py::module_& m) {
  m.attr("TILE") = kTile, m.attr("K_BLOCK_BYTES") = kKBlockBytes;
  m.attr("MIN_K_BLOCKS") = kMinKBlocks, m.attr("MAX_CTAS") = kMaxCtas, m.attr("MAX_NEURONS") = kMaxNeurons;
  m.attr("GATHER_POSITIONS") = kGatherPositions, m.attr("GATHER_BYTES") = kGatherBytes;
  py::dict smem, dtypes, plan;
  for (const int capability : {0, 75, 80}) smem[py::int_(capability)] = product_smem_kib(capability);
  m.attr("PRODUCT_SMEM_KIB") = smem;
#define CODE(code, name, T) dtypes[name] = code;
  DSTS_DTYPES(CODE)
#undef CODE
  m.attr("DTYPES") = dtypes;
#define FIELD(name) plan[#name] = offsetof(Plan, name) / sizeof(int);
  FIELD(filters)
  FIELD(spatial_blocks)
  FIELD(temporal_blocks)
  FIELD(spatial_channels)
  FIELD(temporal_start)
  FIELD(row)
#undef FIELD
  m.attr("PLAN") = plan;
}

}  // namespace

void bind(py::module_& m) {
  py::class_<Target>(m, "Target", "Where a call goes.")
      .def(py::init(
               [](int device, int capability, Address stream) { return Target{device, capability, stream}; }),
           "device"_a, "capability"_a, "stream"_a);
  bind_tables(m);
  bind_semhash(m), bind_tap_sums(m), bind_lists(m);
  bind_gather_panel(m), bind_route_and_gather(m);
  bind_filters(m), bind_conv(m), bind_gradients(m);
}

}  // namespace dsts::cuda
