// Gradient of the filters: what winograd.cpp does, transposed.
//
//   input      x -> V, once for a chunk of units, as in the forward pass
//   gradient   grad -> D[point][row][output], for some outputs
//   product    dU = V^T * D, point by point, a slice of channels at a time
//   weight     dU -> dW: inverse transform of the filter, added over chunks
//
// A task does the last three for its outputs over all rows of the chunk, so no two tasks write the same
// filter and sums do not depend on the number of threads.
#include "cpu/winograd_gradient.h"

#include "cpu/winograd_input.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

constexpr int64_t kGradientFloats = 1 << 20;  // transformed gradients of a task
constexpr int64_t kGradientChannels = 128;    // of a filter gradient that is made and written at a time

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

template <int kH>
void inverse_filter(int tile_w, const float* from, int64_t point, Vector* taps) {
  switch (tile_w) {
    case 1:
      return inverse_filter<kH, 1>(from, point, taps);
    case 2:
      return inverse_filter<kH, 2>(from, point, taps);
    case 4:
      return inverse_filter<kH, 4>(from, point, taps);
    default:
      if constexpr (kH == 0) inverse_filter<0, 8>(from, point, taps);
  }
}

template <int kTaps>
void inverse_filter(const Geometry& g, const float* from, int64_t point, Vector* taps) {
  if constexpr (kTaps == 3) return inverse_filter<0>(g.tile_t, from, point, taps);
  switch (g.tile_h) {
    case 1:
      return inverse_filter<1>(g.tile_w, from, point, taps);
    case 2:
      return inverse_filter<2>(g.tile_w, from, point, taps);
    default:
      return inverse_filter<4>(g.tile_w, from, point, taps);
  }
}

// weight[rows[lane]][column][tap] (+)= taps[tap][lane] for `lanes` <= kWide lanes, taps being neighbours in
// memory.
template <class T, int kTaps, int kFirst = 0>
DSTS_INLINE void store_taps(const Vector* taps, T* const* rows, int64_t lanes, int64_t column, bool add) {
  constexpr int kCount = kTaps - kFirst < kWide ? kTaps - kFirst : kWide;
  Vector block[kWide] = {};
#pragma GCC unroll 16
  for (int j = 0; j < kCount; ++j) block[j] = taps[kFirst + j];
  transpose_block<float>(block);
  for (int64_t o = 0; o < lanes; ++o) {
    float found[kWide];
    memcpy(found, &block[o], sizeof found);
    T* to = rows[o] + column + kFirst;
    if (add)
      for (int j = 0; j < kCount; ++j) found[j] += load(to[j]);
    if constexpr (same<T, float>)
      memcpy(to, found, kCount * sizeof(float));
    else
      for (int j = 0; j < kCount; ++j) store(found[j], to + j);
  }
  if constexpr (kFirst + kCount < kTaps)
    store_taps<T, kTaps, kFirst + kCount>(taps, rows, lanes, column, add);
}

struct GradientRun {
  const WinogradGradient& a;
  const Winograd& f;
  Winograd grad;  // the gradient, seen as features
  const Geometry g;
  Operand spatial, temporal;
  int64_t units, chunk, task_outputs;
  int threads;

  explicit GradientRun(const WinogradGradient& w)
      : a(w),
        f(w.forward),
        grad(w.forward),
        g(w.forward),
        spatial(f.spatial, inputs_of(g.tile_h) * inputs_of(g.tile_w), g.tile_t * g.tiles_x),
        temporal(f.temporal, inputs_of(g.tile_t), g.tile_h * g.W) {
    grad.x_strides = a.grad_strides, grad.x_dtype = a.grad_dtype;
    units = f.out.nb * g.units_a_sample(),
    task_outputs = min64(outputs_of_task(f.out.O), ceil_div(f.out.O, kBlock) * kBlock);
    const int64_t rows_s = spatial.points * spatial.unit_rows, rows_t = temporal.points * temporal.unit_rows;
    const int64_t v = rows_s * spatial.slices * spatial.ld + rows_t * temporal.slices * temporal.ld;
    const int64_t d = max64(rows_s, rows_t) * task_outputs;
    chunk = min64(units, max64(1, min64(kChunkFloats / v, kGradientFloats / d)));
    const int64_t macs = chunk * (rows_s * spatial.K + rows_t * temporal.K) * f.out.O;
    threads = macs / kMacsAnElement < kSerialElements ? 1 : f.out.threads;
    spatial.resize(chunk, 0, 0), temporal.resize(chunk, 0, 0);
  }

  int64_t d_point(const Operand& m) const { return chunk * m.unit_rows * task_outputs + kPadding; }
  int64_t u_point(const Operand& m) const {
    return min64(m.width, kGradientChannels) * task_outputs + kPadding;
  }
  int64_t worker_floats() const {
    return max64(spatial.points * (d_point(spatial) + u_point(spatial)),
                 temporal.points * (d_point(temporal) + u_point(temporal)));
  }

  template <class T, int kTaps>
  void write(const Operand& m, int64_t k0, int64_t count, int64_t o0, int64_t outputs, const float* dU,
             bool add) const {
    const WinogradOperator& op = m.op;
    T* rows[kWide];
    for (int64_t first = 0; first < outputs; first += kWide) {
      const int64_t lanes = min64(kWide, outputs - first);
      for (int64_t o = 0; o < lanes; ++o) {
        const int64_t row = o0 + first + o;
        rows[o] =
            static_cast<T*>(const_cast<void*>(op.weight)) + (op.rows ? op.rows[row] : row) * op.stride_o;
      }
      for (int64_t k = 0; k < count; ++k) {
        const int64_t index = k0 + k;
        Vector taps[kTaps];
        inverse_filter<kTaps>(g, dU + k * task_outputs + first, u_point(m), taps);
        store_taps<T, kTaps>(taps, rows, lanes, (op.columns ? op.columns[index] : index) * op.stride_k, add);
      }
    }
  }

  // Outputs [o0, o0 + task_outputs) of one operator, over the chunk's n units.
  template <int kTaps>
  void task(const Unit* list, int64_t n, const Operand& m, int64_t rows, int64_t o0, float* memory, bool add,
            Stopwatch& watch) const {
    if (!m.K) return;
    const int64_t outputs = min64(task_outputs, f.out.O - o0);
    WinogradOperator channels = {};
    channels.count = outputs;
    Operand D(channels, m.points, 0);
    D.width = D.ld = task_outputs, D.slices = 1, D.v_point = d_point(m), D.V = memory;
    Winograd features = grad;
    with_float(a.grad_dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      features.x = static_cast<const T*>(a.grad) + o0 * a.grad_strides.c;
      const int64_t columns = Patch(features, D).columns;
      for (int64_t j = 0; j < n; ++j)
        if constexpr (kTaps == 9)
          for (int64_t frame = 0; frame < list[j].frames; ++frame)
            spatial_input<T, true>(features, g, list[j], frame, D);
        else
          for (int64_t p0 = 0; p0 < list[j].rows * g.W; p0 += columns)
            temporal_input<T, true>(features, g, list[j], p0, D);
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
      with_float(f.weight_dtype, [&](auto tag) {
        write<typename decltype(tag)::type, kTaps>(m, k0, count, o0, outputs, dU, add);
      });
      watch.lap(3);
    });
  }

  Status operator()() {
    const int64_t parts = ceil_div(f.out.O, task_outputs);
    Scratch<float> scratch(spatial.v_floats() + temporal.v_floats() + threads * worker_floats() + kBlock);
    Scratch<Unit> list(chunk + 1);
    Scratch<double> seconds(threads * 4);
    if (!scratch.ok() || !list.ok() || !seconds.ok()) return Status::no_memory;
    memset(seconds.data, 0, size_t(threads * 4) * sizeof(double));
    spatial.V = scratch.data + (64 - reinterpret_cast<uintptr_t>(scratch.data) % 64) % 64 / sizeof(float);
    temporal.V = spatial.V + spatial.v_floats();
    float* workers = temporal.V + temporal.v_floats();
    for (int64_t begin = 0; begin < units; begin += chunk) {
      const int64_t n = min64(chunk, units - begin);
      g.number_rows(list.data, begin, n);
      Stopwatch watch{f.seconds};
      with_float(f.x_dtype, [&](auto tag) {
        input_stage<typename decltype(tag)::type>(f, g, list.data, n, spatial, temporal, threads);
      });
      watch.lap(0);
      const bool add = a.add || begin > 0;
      parallel_for(2 * parts, kSerialElements, threads, [&](int64_t index) {
        float* memory = workers + worker() * worker_floats();
        Stopwatch own{f.seconds ? seconds.data + 4 * worker() : nullptr};
        const int64_t o0 = index / 2 * task_outputs;
        if (index % 2)
          task<3>(list.data, n, temporal, list.data[n].temporal_row, o0, memory, add, own);
        else
          task<9>(list.data, n, spatial, list.data[n].spatial_row, o0, memory, add, own);
      });
    }
    if (f.seconds)
      for (int i = 0; i < threads * 4; ++i) f.seconds[i % 4] += seconds.data[i] / threads;
    return Status::ok;
  }
};

}  // namespace

Status winograd_gradient(const WinogradGradient& a) {
  const Epilogue& e = a.forward.out;
  if (e.nb * e.O * e.T * e.H * e.W == 0) return Status::ok;
  return GradientRun(a)();
}

}  // namespace dsts::cpu::DSTS_ISA
