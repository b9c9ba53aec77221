// Gated convolution by Winograd's minimal filtering, in four stages:
//
//   input    x, any layout -> V: gather, scale and transform of the listed channels, once for a chunk of
//   units filter   weights -> U, a slice of channels of some outputs product  M += V * U, point by point
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
  Operand spatial, temporal;
  int64_t units, chunk, task_units, task_outputs;
  int threads;

  explicit Run(const Winograd& w)
      : a(w),
        g(w),
        spatial(w.spatial, inputs_of(g.tile_h) * inputs_of(g.tile_w), g.tile_t * g.tiles_x),
        temporal(w.temporal, inputs_of(g.tile_t), g.tile_h * g.W) {
    const Epilogue& e = a.out;
    units = e.nb * g.units_a_sample();
    const int64_t rows_s = spatial.points * spatial.unit_rows, rows_t = temporal.points * temporal.unit_rows;
    const int64_t v = rows_s * spatial.slices * spatial.ld + rows_t * temporal.slices * temporal.ld;
    const int64_t enough =
        min64(kChunkFloats, max64(kCachedFloats, kEnoughPositions / (g.tile_t * g.tile_h * g.W) * v));
    chunk = min64(units, max64(1, enough / v));
    const int64_t macs = chunk * (rows_s * spatial.K + rows_t * temporal.K) * e.O;
    threads = macs / kMacsAnElement < kSerialElements ? 1 : e.threads;
    // Outputs in even tasks, at least one a thread.
    const int64_t blocks = ceil_div(e.O, kBlock),
                  tasks = max64(ceil_div(e.O, kTaskOutputs), min64(threads, blocks));
    task_outputs = ceil_div(blocks, tasks) * kBlock;
    task_units = min64(chunk, max64(1, kTaskFloats / ((rows_s + rows_t) * task_outputs)));
    const int64_t groups = ceil_div(threads, ceil_div(e.O, task_outputs));
    task_units = min64(task_units, ceil_div(chunk, groups));
    spatial.resize(chunk, task_units, task_outputs / kBlock);
    temporal.resize(chunk, task_units, task_outputs / kBlock);
  }

  int64_t u_floats() const { return max64(spatial.u_floats(), temporal.u_floats()); }
  int64_t worker_floats() const { return u_floats() + spatial.m_floats() + temporal.m_floats(); }
  int64_t floats() const {
    return spatial.v_floats() + temporal.v_floats() + threads * worker_floats() + kBlock;
  }

  template <int kTaps>
  void multiply(const Operand& m, int64_t first_row, int64_t rows, int64_t o0, int64_t outputs, float* U,
                float* M, Stopwatch& watch) const {
    const int64_t blocks = ceil_div(outputs, kBlock), ldm = blocks * kBlock;
    for (int64_t slice = 0; slice < m.slices; ++slice) {
      with_float(a.weight_dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        filter_slice<T, kTaps>(g, m, end_of<T>(m.op, a.out.O, kTaps), slice, o0, outputs, U);
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

  // Units [first, last) of the chunk, outputs from o0 on.
  void task(const Unit* list, int64_t first, int64_t last, int64_t o0, float* memory, float* partial,
            Stopwatch watch) const {
    const int64_t outputs = min64(task_outputs, a.out.O - o0), ldm = ceil_div(outputs, kBlock) * kBlock;
    float *U = memory, *M_s = U + u_floats(), *M_t = M_s + spatial.m_floats();
    const int64_t row_s = list[first].spatial_row, row_t = list[first].temporal_row;
    multiply<9>(spatial, row_s, list[last].spatial_row - row_s, o0, outputs, U, M_s, watch);
    multiply<3>(temporal, row_t, list[last].temporal_row - row_t, o0, outputs, U, M_t, watch);
    const Products products_s{M_s, spatial.m_point, ldm, row_s},
        products_t{M_t, temporal.m_point, ldm, row_t};
    const int64_t classes = class_count(a.out.taps), lanes = Piece(a).lanes;
    for (int64_t j = first; j < last; ++j) {
      float* sums = partial ? partial + (list[j].number * classes) * a.out.O : nullptr;
      for (int64_t k = 0; sums && k < classes; ++k)
        memset(sums + k * a.out.O + o0, 0, size_t(outputs) * sizeof(float));
      for (int64_t lane = 0; lane < outputs; lane += lanes)
        with_float(a.out.out_dtype, [&](auto tag) {
          output_rows<typename decltype(tag)::type>(a, g, list[j], spatial.K ? &products_s : nullptr,
                                                    temporal.K ? &products_t : nullptr, o0, lane,
                                                    min64(lanes, outputs - lane), sums);
        });
    }
    watch.lap(3);
  }

  Status operator()() {
    const Epilogue& e = a.out;
    const int64_t sum_chunks = g.units_a_sample();
    Scratch<float> scratch(floats()), partial(e.sums ? e.nb * sum_chunks * class_count(e.taps) * e.O : 0);
    Scratch<Unit> list(chunk + 1);
    Scratch<double> seconds(threads * 4);
    if (!scratch.ok() || !partial.ok() || !list.ok() || !seconds.ok()) return Status::no_memory;
    memset(seconds.data, 0, size_t(threads * 4) * sizeof(double));
    spatial.V = scratch.data + (64 - reinterpret_cast<uintptr_t>(scratch.data) % 64) % 64 / sizeof(float);
    temporal.V = spatial.V + spatial.v_floats();
    float* workers = temporal.V + temporal.v_floats();

    for (int64_t begin = 0; begin < units; begin += chunk) {
      const int64_t n = min64(chunk, units - begin);
      g.number_rows(list.data, begin, n);
      Stopwatch watch{a.seconds};
      with_float(a.x_dtype, [&](auto tag) {
        input_stage<typename decltype(tag)::type>(a, g, list.data, n, spatial, temporal, threads);
      });
      watch.lap(0);
      const int64_t groups = ceil_div(n, task_units), parts = ceil_div(e.O, task_outputs);
      parallel_for(groups * parts, kSerialElements, threads, [&](int64_t index) {
        const int64_t first = index % groups * task_units, o0 = index / groups * task_outputs;
        task(list.data, first, min64(n, first + task_units), o0, workers + worker() * worker_floats(),
             e.sums ? partial.data : nullptr, {a.seconds ? seconds.data + 4 * worker() : nullptr});
      });
    }
    if (e.sums) combine_sums(e, partial.data, sum_chunks, e.nb * e.O * g.T * g.H * g.W);
    if (a.seconds)
      for (int i = 0; i < threads * 4; ++i) a.seconds[i % 4] += seconds.data[i] / threads;
    return Status::ok;
  }
};

}  // namespace

Status winograd(const Winograd& a) {
  const Epilogue& e = a.out;
  if (e.nb * e.O * e.T * e.H * e.W == 0) return Status::ok;
  return Run(a)();
}

}  // namespace dsts::cpu::DSTS_ISA
