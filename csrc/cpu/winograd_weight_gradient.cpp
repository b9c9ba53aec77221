// Gradient of the filters: what winograd.cpp does, transposed.
//
//   input      x -> V, once for a round of units, as in the forward pass
//   gradient   grad -> D[point][row][output], for some outputs
//   product    dU = V^T * D, point by point, a slice of channels at a time
//   weight     dU -> dW: inverse transform of the filter, added over rounds
//
// A task does the last three for its outputs over all rows of the round, so no two tasks write the same
// filter and sums do not depend on the number of threads.
#include "cpu/winograd_weight_gradient.h"

#include "cpu/winograd_input.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

constexpr int64_t kGradientFloats = 1 << 20;  // transformed gradients of a task
constexpr int64_t kGradientChannels = 128;    // of a weight gradient that is made and written at a time

// Outputs of a task: fewer where there are few, so that threads have something to share.
int64_t outputs_of_task(int64_t O) { return O >= 512 ? 64 : O >= 128 ? 32 : kBlock; }

// (nh, nw) points to (3, 3) taps, or nt to 3 where kH is 0: taps[tap] from dU at `from`, points `point`
// apart.
template <int kH, int kW>
void inverse_filter(const float* from, int64_t point, Vector* taps) {
  constexpr int nw = ::dsts::Winograd<kW>::kInputs;
  if constexpr (kH == 0) {
    Vector v[nw];
    for (int j = 0; j < nw; ++j) v[j] = vector_at(from + j * point);
    apply<kW, Matrix::weight>(v, [&](int i, Vector sum) { taps[i] = sum; });
  } else {
    constexpr int nh = ::dsts::Winograd<kH>::kInputs;
    Vector half[3][nh];
    for (int i = 0; i < nh; ++i) {
      Vector v[nw];
      for (int j = 0; j < nw; ++j) v[j] = vector_at(from + (i * nw + j) * point);
      apply<kW, Matrix::weight>(v, [&](int j, Vector sum) { half[j][i] = sum; });
    }
    for (int j = 0; j < 3; ++j)
      apply<kH, Matrix::weight>(half[j], [&](int i, Vector sum) { taps[3 * i + j] = sum; });
  }
}

template <int kTaps>
void inverse_filter(const Geometry& g, const float* from, int64_t point, Vector* taps) {
  if constexpr (kTaps == 3)
    with_tile(TemporalTiles{}, g.tile_t,
              [&](auto frames) { inverse_filter<0, decltype(frames)::value>(from, point, taps); });
  else
    with_tile(SpatialTiles{}, g.tile_h, [&](auto height) {
      with_tile(SpatialTiles{}, g.tile_w, [&](auto width) {
        inverse_filter<decltype(height)::value, decltype(width)::value>(from, point, taps);
      });
    });
}

// weight[rows[lane]][column][tap] (+)= taps[tap][lane] for `lanes` <= kWide lanes; taps are neighbours in
// memory.
template <class T, int kTaps, int kFirst = 0>
DSTS_INLINE void store_taps(const Vector* taps, T* const* rows, int64_t lanes, int64_t column, bool add) {
  constexpr int kCount = kTaps - kFirst < kWide ? kTaps - kFirst : kWide;
  Vector block[kWide] = {};
#pragma GCC unroll 16
  for (int j = 0; j < kCount; ++j) block[j] = taps[kFirst + j];
  transpose_block<float>(block);
  for (int64_t o = 0; o < lanes; ++o) {
    float values[kWide];
    memcpy(values, &block[o], sizeof values);
    T* to = rows[o] + column + kFirst;
    if (add)
      for (int j = 0; j < kCount; ++j) values[j] += load(to[j]);
    if constexpr (same<T, float>)
      memcpy(to, values, kCount * sizeof(float));
    else
      for (int j = 0; j < kCount; ++j) store(values[j], to + j);
  }
  if constexpr (kFirst + kCount < kTaps)
    store_taps<T, kTaps, kFirst + kCount>(taps, rows, lanes, column, add);
}

struct GradientRun {
  const WinogradWeightGradient& a;
  const Geometry g;
  Blocking spatial, temporal;
  int64_t units, round_units, task_outputs;
  int threads;

  explicit GradientRun(const WinogradWeightGradient& w)
      : a(w),
        g(w.grad, w.tiles),
        spatial(w.spatial, inputs_of(g.tile_h) * inputs_of(g.tile_w), g.tile_t * g.tiles_x),
        temporal(w.temporal, inputs_of(g.tile_t), g.tile_h * g.W) {
    const int64_t O = a.grad.C;
    units = a.samples.count * g.units_a_sample();
    task_outputs = min64(outputs_of_task(O), ceil_div(O, kBlock) * kBlock);
    const int64_t spatial_rows = spatial.points * spatial.unit_rows,
                  temporal_rows = temporal.points * temporal.unit_rows;
    const int64_t v =
        spatial_rows * spatial.slices * spatial.ld + temporal_rows * temporal.slices * temporal.ld;
    const int64_t d = max64(spatial_rows, temporal_rows) * task_outputs;
    round_units = min64(units, max64(1, min64(kRoundFloats / v, kGradientFloats / d)));
    const int64_t macs = round_units * (spatial_rows * spatial.K + temporal_rows * temporal.K) * O;
    threads = macs / kMacsAnElement < kSerialElements ? 1 : a.threads;
    spatial.resize(round_units, 0, 0), temporal.resize(round_units, 0, 0);
  }

  int64_t d_point(const Blocking& m) const { return round_units * m.unit_rows * task_outputs + kPadding; }
  int64_t u_point(const Blocking& m) const {
    return min64(m.width, kGradientChannels) * task_outputs + kPadding;
  }
  int64_t worker_floats() const {
    return max64(spatial.points * (d_point(spatial) + u_point(spatial)),
                 temporal.points * (d_point(temporal) + u_point(temporal)));
  }

  template <class T, int kTaps>
  void write(const Blocking& m, int64_t k0, int64_t count, int64_t o0, int64_t outputs, const float* dU,
             bool add) const {
    const Operator& op = m.op;
    T* rows[kWide];
    for (int64_t first = 0; first < outputs; first += kWide) {
      const int64_t lanes = min64(kWide, outputs - first);
      for (int64_t o = 0; o < lanes; ++o) {
        const int64_t row = o0 + first + o;
        rows[o] = static_cast<T*>(op.weight) + (op.o_list ? op.o_list[row] : row) * op.stride_o;
      }
      for (int64_t k = 0; k < count; ++k) {
        const int64_t index = k0 + k;
        Vector taps[kTaps];
        inverse_filter<kTaps>(g, dU + k * task_outputs + first, u_point(m), taps);
        store_taps<T, kTaps>(taps, rows, lanes, (op.k_list ? op.k_list[index] : index) * op.stride_k, add);
      }
    }
  }

  // Outputs [o0, o0 + task_outputs) of one operator, over the round's n units.
  template <int kTaps>
  void task(const Unit* list, int64_t n, const Blocking& m, int64_t rows, int64_t o0, float* memory, bool add,
            Stopwatch& watch) const {
    if (!m.K) return;
    const int64_t outputs = min64(task_outputs, a.grad.C - o0);
    Operator all = {};  // of the task's outputs, in order
    all.k_channels = outputs;
    Blocking D(all, m.points, 0);
    D.width = D.ld = task_outputs, D.slices = 1, D.v_point = d_point(m), D.V = memory;
    Source source{a.grad, a.samples};
    with_float(a.grad.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      source.x.data = static_cast<T*>(a.grad.data) + o0 * a.grad.strides.c;
      const int64_t columns = patch_of(source.x).columns;
      for (int64_t j = 0; j < n; ++j)
        if constexpr (kTaps == 9)
          for (int64_t frame = 0; frame < list[j].frames; ++frame)
            spatial_input<T, true>(source, g, list[j], frame, D);
        else
          for (int64_t p0 = 0; p0 < list[j].rows * g.W; p0 += columns)
            temporal_input<T, true>(source, g, list[j], p0, D);
    });
    watch.lap(1);
    float* dU = memory + m.points * d_point(m);
    for_blocks(m, kGradientChannels, [&](int64_t k0, int64_t end) {
      const int64_t count = min64(kGradientChannels, end - k0);
      for (int64_t p = 0; p < m.points; ++p)
        product<Kind::transposed>(count, {m.v_at(k0, 0) + p * m.v_point, m.ld},
                                  {D.V + p * D.v_point, task_outputs, kBlock}, rows,
                                  ceil_div(outputs, kBlock), dU + p * u_point(m), task_outputs);
      watch.lap(2);
      with_float(m.op.dtype, [&](auto tag) {
        write<typename decltype(tag)::type, kTaps>(m, k0, count, o0, outputs, dU, add);
      });
      watch.lap(3);
    });
  }

  Status operator()() {
    const int64_t output_blocks = ceil_div(a.grad.C, task_outputs);
    Scratch<float> scratch(spatial.v_floats() + temporal.v_floats() + threads * worker_floats() + kBlock);
    Scratch<Unit> list(round_units + 1);
    Scratch<double> seconds(threads * 4);
    if (!scratch.ok() || !list.ok() || !seconds.ok()) return Status::no_memory;
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
      const bool add = a.add || begin > 0;
      parallel_for(2 * output_blocks, kSerialElements, threads, [&](int64_t index) {
        float* memory = workers + worker() * worker_floats();
        Stopwatch laps{a.stage_seconds ? seconds.data + 4 * worker() : nullptr};
        const int64_t o0 = index / 2 * task_outputs;
        if (index % 2)
          task<3>(list.data, n, temporal, list.data[n].temporal_row, o0, memory, add, laps);
        else
          task<9>(list.data, n, spatial, list.data[n].spatial_row, o0, memory, add, laps);
      });
    }
    if (a.stage_seconds)
      for (int i = 0; i < threads * 4; ++i) a.stage_seconds[i % 4] += seconds.data[i] / threads;
    return Status::ok;
  }
};

}  // namespace

Status winograd_weight_gradient(const WinogradWeightGradient& a) {
  const Features& grad = a.grad;
  if (a.samples.count * grad.C * grad.T * grad.H * grad.W == 0) return Status::ok;
  return GradientRun(a)();
}

}  // namespace dsts::cpu::DSTS_ISA
