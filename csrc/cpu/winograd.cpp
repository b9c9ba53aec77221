// Gated convolution by Winograd's minimal filtering, in four stages:
//
//   input    x, any layout -> V: gather, scale and transform of the listed channels, once for a round of units
//   filter   weights -> U, a slice of channels of some outputs
//   product  M += V * U, point by point
//   output   M -> out: inverse transform of both operators, sum, epilogue
//
// Of the last three a task does all for its units and outputs, in memory of its thread that stays in its
// caches. Filters are transformed anew at every call: that costs 8 to 16% of the product, where keeping them
// would take four times the memory, for all neurons, and be read from memory at every call instead. Results
// do not depend on the number of threads: every output is one task's, summed slice by slice.
#include "cpu/winograd.h"

#include "cpu/winograd_filter.h"
#include "cpu/winograd_input.h"
#include "cpu/winograd_output.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

// The whole call: how it is cut up, and its memory.
struct Run {
  const Winograd& a;
  const Geometry g;
  Blocking spatial, temporal;
  int64_t units, round_units, task_units, task_outputs;
  int threads;

  explicit Run(const Winograd& w)
      : a(w),
        g(w.epilogue.out, w.tiles),
        spatial(w.spatial, inputs_of(g.tile_h) * inputs_of(g.tile_w), g.tile_t * g.tiles_x),
        temporal(w.temporal, inputs_of(g.tile_t), g.tile_h * g.W) {
    const int64_t O = a.epilogue.out.C;
    units = a.samples.count * g.units_a_sample();
    const int64_t spatial_rows = spatial.points * spatial.unit_rows,
                  temporal_rows = temporal.points * temporal.unit_rows;
    const int64_t v =
        spatial_rows * spatial.slices * spatial.ld + temporal_rows * temporal.slices * temporal.ld;
    const int64_t enough =
        min64(kRoundFloats, max64(kCachedFloats, kEnoughPositions / (g.tile_t * g.tile_h * g.W) * v));
    round_units = min64(units, max64(1, enough / v));
    const int64_t macs = round_units * (spatial_rows * spatial.K + temporal_rows * temporal.K) * O;
    threads = macs / kMacsAnElement < kSerialElements ? 1 : a.threads;
    // Outputs in even tasks, at least one a thread.
    const int64_t blocks = ceil_div(O, kBlock),
                  tasks = max64(ceil_div(O, kTaskOutputs), min64(threads, blocks));
    task_outputs = ceil_div(blocks, tasks) * kBlock;
    task_units = min64(round_units, max64(1, kTaskFloats / ((spatial_rows + temporal_rows) * task_outputs)));
    const int64_t unit_blocks = ceil_div(threads, ceil_div(O, task_outputs));
    task_units = min64(task_units, ceil_div(round_units, unit_blocks));
    spatial.resize(round_units, task_units, task_outputs / kBlock);
    temporal.resize(round_units, task_units, task_outputs / kBlock);
  }

  int64_t u_floats() const { return max64(spatial.u_floats(), temporal.u_floats()); }
  int64_t worker_floats() const { return u_floats() + spatial.m_floats() + temporal.m_floats(); }
  int64_t floats() const {
    return spatial.v_floats() + temporal.v_floats() + threads * worker_floats() + kBlock;
  }

  template <int kTaps>
  void multiply(const Blocking& m, int64_t first_row, int64_t rows, int64_t o0, int64_t outputs, float* U,
                float* M, Stopwatch& watch) const {
    const int64_t blocks = ceil_div(outputs, kBlock), ldm = blocks * kBlock;
    for (int64_t slice = 0; slice < m.slices; ++slice) {
      with_float(m.op.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        filter_slice<T, kTaps>(g, m, end_of<T>(m.op, a.epilogue.out.C, kTaps), slice, o0, outputs, U);
      });
      watch.lap(1);
      const int64_t K = m.channels(slice);
      for (int64_t p = 0; p < m.points; ++p) {
        const Left A{m.v_at(slice * m.width, first_row) + p * m.v_point, m.ld};
        const Right B{U + p * m.u_point, kBlock, K * kBlock};
        slice ? product<Kind::add>(rows, A, B, K, blocks, M + p * m.m_point, ldm)
              : product<Kind::plain>(rows, A, B, K, blocks, M + p * m.m_point, ldm);
      }
      watch.lap(2);
    }
  }

  // Units [first, last) of the round, outputs from o0 on.
  void task(const Unit* list, int64_t first, int64_t last, int64_t o0, float* memory, float* unit_sums,
            Stopwatch watch) const {
    const int64_t O = a.epilogue.out.C, outputs = min64(task_outputs, O - o0),
                  ldm = ceil_div(outputs, kBlock) * kBlock;
    float *U = memory, *spatial_M = U + u_floats(), *temporal_M = spatial_M + spatial.m_floats();
    const int64_t spatial_row = list[first].spatial_row, temporal_row = list[first].temporal_row;
    multiply<9>(spatial, spatial_row, list[last].spatial_row - spatial_row, o0, outputs, U, spatial_M, watch);
    multiply<3>(temporal, temporal_row, list[last].temporal_row - temporal_row, o0, outputs, U, temporal_M,
                watch);
    const Products spatial_products{spatial_M, spatial.m_point, ldm, spatial_row},
        temporal_products{temporal_M, temporal.m_point, ldm, temporal_row};
    const int64_t classes = class_count(a.epilogue.taps), lanes = piece_of(a.epilogue).lanes;
    for (int64_t j = first; j < last; ++j) {
      float* sums = unit_sums ? unit_sums + (list[j].number * classes) * O : nullptr;
      for (int64_t k = 0; sums && k < classes; ++k)
        memset(sums + k * O + o0, 0, size_t(outputs) * sizeof(float));
      for (int64_t lane = 0; lane < outputs; lane += lanes)
        with_float(a.epilogue.out.dtype, [&](auto tag) {
          output_rows<typename decltype(tag)::type>(
              a.epilogue, g, list[j], spatial.K ? &spatial_products : nullptr,
              temporal.K ? &temporal_products : nullptr, o0, lane, min64(lanes, outputs - lane), sums);
        });
    }
    watch.lap(3);
  }

  Status operator()() {
    const Epilogue& e = a.epilogue;
    const int64_t O = e.out.C, nb = a.samples.count, sum_parts = g.units_a_sample();
    Scratch<float> scratch(floats()), unit_sums(e.sums ? nb * sum_parts * class_count(e.taps) * O : 0);
    Scratch<Unit> list(round_units + 1);
    Scratch<double> seconds(threads * 4);
    if (!scratch.ok() || !unit_sums.ok() || !list.ok() || !seconds.ok()) return Status::no_memory;
    memset(seconds.data, 0, size_t(threads * 4) * sizeof(double));
    spatial.V = scratch.data + (64 - reinterpret_cast<uintptr_t>(scratch.data) % 64) % 64 / sizeof(float);
    temporal.V = spatial.V + spatial.v_floats();
    float* workers = temporal.V + temporal.v_floats();

    for (int64_t begin = 0; begin < units; begin += round_units) {
      const int64_t n = min64(round_units, units - begin);
      g.number_rows(list.data, begin, n);
      Stopwatch watch{a.stage_seconds};
      with_float(a.x.dtype, [&](auto tag) {
        input_stage<typename decltype(tag)::type>({a.x, a.samples}, g, list.data, n, spatial, temporal,
                                                  threads);
      });
      watch.lap(0);
      const int64_t unit_blocks = ceil_div(n, task_units), output_blocks = ceil_div(O, task_outputs);
      parallel_for(unit_blocks * output_blocks, kSerialElements, threads, [&](int64_t index) {
        const int64_t first = index % unit_blocks * task_units, o0 = index / unit_blocks * task_outputs;
        task(list.data, first, min64(n, first + task_units), o0, workers + worker() * worker_floats(),
             e.sums ? unit_sums.data : nullptr, {a.stage_seconds ? seconds.data + 4 * worker() : nullptr});
      });
    }
    if (e.sums) combine_sums(e, unit_sums.data, sum_parts, nb * O * g.T * g.H * g.W, a.threads);
    if (a.stage_seconds)
      for (int i = 0; i < threads * 4; ++i) a.stage_seconds[i % 4] += seconds.data[i] / threads;
    return Status::ok;
  }
};

}  // namespace

Status winograd(const Winograd& a) {
  const Features& out = a.epilogue.out;
  if (a.samples.count * out.C * out.T * out.H * out.W == 0) return Status::ok;
  return Run(a)();
}

}  // namespace dsts::cpu::DSTS_ISA
