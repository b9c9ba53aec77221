// The CUDA kernels for Python, as dsts_kernels._C.cuda. Tensors come as addresses, sizes and strides in
// elements, all by keyword; a call launches on the given device and stream and returns. What addresses point
// at is the caller's responsibility. The fields of a kernel's parameters stand in the order of params.h, each
// with the name of its argument.
#include <algorithm>
#include <cstddef>

#include "cuda/arguments.h"
#include "cuda/grids.h"

namespace dsts::cuda {

using namespace py::literals;

namespace {

void semhash_call(Call& a) {
  SemhashParams p{};
  p.grad = a.optional<void>("grad");
  p.logits = a.given<void>("logits"), p.noise = a.optional<void>("noise");
  p.neuron = a.optional<int64>("neuron"), p.hard = a.optional<unsigned char>("hard");
  p.out = a.given<void>("out");
  p.batch = a.size("batch"), p.neurons = a.size("neurons"), p.channels = a.size("channels");
  const bool backward = a.flag("backward");
  if (backward && !p.grad) a.fail("grad is null; wanted an address");
  const int dtype = a.dtype("dtype");
  a.launch([&](const Target&, void* stream) { semhash(p, backward, dtype, stream); });
}

void tap_sums_call(Call& a) {
  TapSumsParams p{};
  p.x = a.given<void>("x"), p.sums = a.given<float>("sums");
  p.extent = a.extent("size"), p.x_strides = a.strides("x_strides");
  p.batch = a.size("batch"), p.channels = a.size("channels"), p.parts = a.size("parts");
  const int taps = a.taps("taps");
  p.vector = a.flag("vector");
  const int dtype = a.dtype("dtype");
  a.launch([&](const Target&, void* stream) { tap_sums(p, taps, dtype, stream); });
}

void group_samples_call(Call& a) {
  GroupParams p{};
  p.neuron = a.given<int64>("neuron"), p.slots = a.given<int>("slots");
  p.neuron_of = a.given<int>("neuron_of"), p.slot_of = a.given<int>("slot_of");
  p.groups = a.given<int>("groups"), p.members = a.given<int>("members");
  p.batch = a.size("batch"), p.neurons = a.size("neurons"), p.num_slots = a.size("num_slots");
  a.launch([&](const Target&, void* stream) { group_samples(p, stream); });
}

void list_channels_call(Call& a) {
  ListParams p{};
  p.gate = a.given<float>("gate"), p.slots = a.given<int>("slots");
  p.neuron_of = a.given<int>("neuron_of"), p.groups = a.given<int>("groups");
  p.members = a.given<int>("members"), p.order = a.given<int>("order"), p.plans = a.given<Plan>("plans");
  p.listed = a.optional<signed char>("listed");
  p.num_lists = a.size("num_lists"), p.channels = a.size("channels"), p.k_block = a.size("k_block");
  p.by_slot = a.flag("by_slot");
  if (p.by_slot && !p.listed) a.fail("listed is null; wanted an address");
  a.launch([&](const Target&, void* stream) { list_channels(p, stream); });
}

// What both gathers are given, and the dtype.
GatherParams gather_params(Call& a, int* dtype) {
  GatherParams p{};
  p.x = a.given<void>("x"), p.panel = a.given<void>("panel");
  p.extent = a.extent("size"), p.x_strides = a.strides("x_strides");
  p.batch = a.size("batch"), p.channels = a.size("channels"), p.pitch = a.size("pitch");
  p.splits = a.size("splits"), p.whole_positions = a.number("whole_positions");
  *dtype = a.dtype("dtype");
  const int vector = kVectorBytes / element_bytes(*dtype), most = kGatherBytes / kVectorBytes;
  if (p.whole_positions != 0 && (p.x_strides.c != 1 || p.channels % vector != 0))
    a.fail("whole_positions is ", p.whole_positions,
           "; wanted 0 where channels are no whole 16 bytes side by side");
  if (p.whole_positions < 0 || static_cast<int64>(p.whole_positions) * (p.channels / vector) > most)
    a.fail("whole_positions is ", p.whole_positions, "; wanted at most ", kGatherBytes, " bytes of them");
  p.turned = a.number("turned");
  const bool apart =
      (p.batch == 1 || p.x_strides.b % vector == 0) && (p.channels == 1 || p.x_strides.c % vector == 0);
  if (p.turned != 0 && (p.turned != 1 || p.whole_positions != 0 || p.x_strides.w != 1 ||
                        p.extent.positions % vector != 0 || !apart))
    a.fail("turned is ", p.turned,
           "; wanted 0 where positions are no whole 16 bytes side by side, else 0 or 1");
  p.vectors_divmod = fast_divmod(std::max(1, p.channels / vector));
  return p;
}

void gather_panel_call(Call& a) {
  int dtype;
  GatherPanelParams p{};
  p.gather = gather_params(a, &dtype);
  p.order = a.given<int>("order"), p.slots = a.optional<int>("slots"), p.plans = a.given<Plan>("plans");
  p.gate = a.given<float>("gate"), p.neuron = a.given<int64>("neuron"), p.neurons = a.size("neurons");
  a.launch([&](const Target&, void* stream) { gather_panel(p, dtype, stream); });
}

void route_and_gather_call(Call& a) {
  int dtype;
  RouteParams p{};
  p.gather = gather_params(a, &dtype);
  p.sums = a.given<float>("sums"), p.scoring = a.given<float>("scoring");
  p.channels_of = a.given<int>("channels_of"), p.starts = a.given<int64>("starts");
  p.plan = a.given<Plan>("plan"), p.neuron = a.given<int64>("neuron"), p.scores = a.given<float>("scores");
  p.arrival_counters = a.given<int>("arrival_counters"), p.divisor = a.real("divisor");
  p.neurons = a.size("neurons"), p.parts = a.size("parts"), p.taps = a.size("taps");
  if (p.taps != 1 && p.taps != 2 && p.taps != kMaxSumTaps && p.taps != kMaxSumTaps + 1)
    a.fail("taps is ", p.taps, "; wanted 1 or ", kMaxSumTaps, ", or one more with a centre of scores");
  p.num_arrival_counters = a.size("num_arrival_counters");
  a.launch([&](const Target&, void* stream) { route_and_gather(p, dtype, stream); });
}

// The sides of FilterParams that both ways have in common.
void set_filters(Call& a, FilterParams* p) {
  p->outputs = a.size("outputs"), p->channels = a.size("channels"), p->taps = a.size("taps");
  p->first_tap = a.number("first_tap"), p->all_taps = a.size("all_taps");
  p->by_channel = a.flag("by_channel"), p->pitch = a.size("pitch");
  p->taps_divmod = fast_divmod(p->taps);
  if (p->first_tap < 0 || p->first_tap + p->taps > p->all_taps)
    a.fail("first_tap is ", p->first_tap, "; wanted ", p->taps, " taps from it on to lie within all_taps (",
           p->all_taps, ")");
  const int row = p->by_channel ? p->outputs : p->channels;
  if (p->pitch < row) a.fail("pitch is ", p->pitch, "; wanted at least a row (", row, ")");
}

void pack_filters_call(Call& a) {
  FilterParams p{};
  p.from = a.given<void>("weight"), p.to = a.given<void>("filters"), p.index = a.given<int>("neuron_of");
  set_filters(a, &p);
  const int slots = a.size("slots"), from = a.dtype("weight_dtype"), to = a.dtype("dtype");
  if (from != to && from != kFloat32)
    a.fail("weight_dtype is ", from, "; wanted dtype (", to, ") or 0 (float32)");
  a.launch([&](const Target&, void* stream) { pack_filters(p, slots, from, to, stream); });
}

void unpack_filters_call(Call& a) {
  constexpr int both = kReadBySpatial + kReadByTemporal;
  FilterParams p{};
  p.from = a.given<void>("filters"), p.to = a.given<void>("weight"), p.index = a.given<int>("slot_of");
  p.listed = a.optional<signed char>("listed"), p.reader = a.number("reader");
  if (p.listed && (p.reader < 1 || p.reader > both))
    a.fail("reader is ", p.reader, "; wanted ", kReadBySpatial, ", ", kReadByTemporal, " or ", both);
  set_filters(a, &p);
  const int neurons = a.size("neurons"), dtype = a.dtype("dtype");
  a.launch([&](const Target&, void* stream) { unpack_filters(p, neurons, dtype, stream); });
}

// Whole waves leave one to two tiles a CTA, for which schedule.h has memory.
void check_grid(const Call& a, const ConvParams& p) {
  if (p.num_ctas > kMaxCtas) a.fail("num_ctas is ", p.num_ctas, "; wanted at most ", kMaxCtas);
  if (p.waves < 0) a.fail("waves is ", p.waves, "; wanted 0 or more");
  if (p.idle_percent < kAlwaysShare || p.idle_percent > 100)
    a.fail("idle_percent is ", p.idle_percent, "; wanted ", kAlwaysShare, " to 100");
  const int64 tiles = static_cast<int64>(p.batch) * tiles_of(p.extent.positions) * tiles_of(p.outputs);
  const int64 rest = tiles - static_cast<int64>(p.waves) * p.num_ctas;
  if (rest < 1 || rest > 2 * p.num_ctas)
    a.fail(p.waves, " waves of ", p.num_ctas, " CTAs leave ", rest, " tiles over; wanted 1 to 2 a CTA");
}

// Sides and taps of both operators, of ConvParams and of WeightGradientParams.
template <class Params>
void set_taps(Call& a, Params* p) {
  const auto sides = a.sides("kernel");
  p->kt = sides[0], p->kh = sides[1], p->kw = sides[2];
  p->spatial_taps = sides[0] * sides[1] * sides[2];
  p->temporal_taps = a.flag("with_temporal") ? kTemporalTaps : 0;
  p->sign = a.number("sign");
}

void conv_call(Call& a) {
  ConvParams p{};
  p.panel = a.given<void>("panel"), p.filters = a.given<void>("filters"), p.order = a.optional<int>("order");
  p.plan = a.optional<Plan>("plan");
  p.index = p.plan ? a.optional<void>("index") : a.given<void>("index");
  p.bias = a.optional<float>("bias"), p.skip = a.optional<void>("skip"), p.out = a.given<void>("out");
  p.tile_sums = a.optional<float>("tile_sums"), p.sums = a.optional<float>("sums");
  p.workspace = a.given<float>("workspace"), p.arrival_counters = a.given<int>("arrival_counters");
  p.extent = a.extent("size"), p.out_strides = a.strides("out_strides");
  p.batch = a.size("batch"), p.width = a.size("width"), p.pitch = a.size("pitch");
  p.k_channels = a.number("k_channels"), p.slots = a.number("slots"), p.outputs = a.size("outputs");
  p.filter_pitch = a.size("filter_pitch");
  set_taps(a, &p);
  const std::string form = a.word("form");
  const bool by_output = form == "listed" || form == "transposed";
  p.packed = form == "packed";
  if (!by_output && !p.packed && form != "stored")
    a.fail("form is '", form, "'; wanted 'packed', 'stored', 'listed' or 'transposed'");
  p.index_64 = a.flag("index_64"), p.relu = a.flag("relu"), p.sum_taps = a.number("sum_taps");
  if (p.sum_taps != 0 && p.sum_taps != 1 && p.sum_taps != kMaxSumTaps)
    a.fail("sum_taps is ", p.sum_taps, "; wanted 0, 1 or ", kMaxSumTaps);
  if (p.sum_taps != 0 && !p.tile_sums) a.fail("tile_sums is null; wanted an address with sum_taps");
  if (p.sum_taps != 0 && !p.sums) a.fail("sums is null; wanted an address with sum_taps");
  p.num_ctas = a.size("num_ctas"), p.waves = a.number("waves"), p.idle_percent = a.number("idle_percent");
  p.vector_out = a.flag("vector_out");
  check_grid(a, p);
  const int dtype = a.dtype("dtype");
  const bool tf32 = a.flag("tf32");
  a.launch([&](const Target& to, void* stream) { conv(p, by_output, dtype, tf32, to.capability, stream); });
}

void data_gradient_call(Call& a) {
  DataGradientParams p{};
  p.grad = a.given<void>("grad"), p.filters = a.given<void>("filters"), p.order = a.given<int>("order");
  p.plans = a.given<Plan>("plans"), p.gate = a.given<float>("gate"), p.x = a.given<void>("x");
  p.dx = a.optional<void>("dx");
  p.dgate = p.dx ? a.optional<float>("dgate") : a.given<float>("dgate");
  p.extent = a.extent("size"), p.x_strides = a.strides("x_strides");
  p.batch = a.size("batch"), p.channels = a.size("channels"), p.outputs = a.size("outputs");
  p.pitch = a.size("pitch"), p.listed = a.flag("listed");
  if (p.listed && p.dgate) a.fail("dgate is given with listed; dgate needs every channel");
  const int dtype = a.dtype("dtype");
  const bool tf32 = a.flag("tf32");
  a.launch([&](const Target& to, void* stream) { data_gradient(p, dtype, tf32, to.capability, stream); });
}

void weight_gradient_call(Call& a) {
  WeightGradientParams p{};
  p.left = a.given<void>("left"), p.right = a.given<void>("right");
  p.order = a.optional<int>("order"), p.plans = a.optional<Plan>("plans");
  p.neuron_of = a.given<int>("neuron_of"), p.groups = a.given<int>("groups");
  p.members = a.given<int>("members"), p.out = a.given<void>("out");
  p.extent = a.extent("size"), p.left_pitch = a.size("left_pitch"), p.right_pitch = a.size("right_pitch");
  p.rows = a.size("rows"), p.columns = a.size("columns"), p.slots = a.size("slots");
  set_taps(a, &p);
  p.by_neuron = a.flag("by_neuron"), p.out_float = a.flag("out_float");
  const int dtype = a.dtype("dtype");
  const bool tf32 = a.flag("tf32");
  a.launch([&](const Target& to, void* stream) { weight_gradient(p, dtype, tf32, to.capability, stream); });
}

// Sizes and codes that Python counts with too; tests hold Python's to these.
void define_tables(py::module_& m) {
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
  py::class_<Target>(m, "Target", "Where a call goes.", py::module_local())
      .def(py::init([](int device, int capability, std::uintptr_t stream) {
             return Target{device, capability, stream};
           }),
           "device"_a, "capability"_a, "stream"_a);
  define_tables(m);
  Function<semhash_call>::define(m, "semhash");
  Function<tap_sums_call>::define(m, "tap_sums");
  Function<group_samples_call>::define(m, "group_samples");
  Function<list_channels_call>::define(m, "list_channels");
  Function<gather_panel_call>::define(m, "gather_panel");
  Function<route_and_gather_call>::define(m, "route_and_gather");
  Function<pack_filters_call>::define(m, "pack_filters");
  Function<unpack_filters_call>::define(m, "unpack_filters");
  Function<conv_call>::define(m, "conv");
  Function<data_gradient_call>::define(m, "data_gradient");
  Function<weight_gradient_call>::define(m, "weight_gradient");
}

}  // namespace dsts::cuda
