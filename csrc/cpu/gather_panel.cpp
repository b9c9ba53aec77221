// Gather of a panel, bound by memory. Planes: where positions are contiguous on both sides, every output
// channel is a copy (or a scaled copy) of long runs. Tiles: everything else; a tile of positions x channels
// is small enough that both sides stay in cache, and the output's innermost dimension is the inner loop.
#include "cpu/gather_panel.h"

#include "cpu/pick.h"
#include "cpu/tile.h"

namespace dsts::cpu::DSTS_ISA {
namespace {

template <class T, class U, bool kScaled>
DSTS_INLINE void copy_element(T from, acc_t<T> scale, U* to) {
  if constexpr (kScaled)
    store(load(from) * scale, to);
  else if constexpr (same<T, U>)
    *to = from;  // bit for bit
  else
    store(load(from), to);
}

template <class T>
acc_t<T> scale_of(const GatherPanel& a, int64_t sample, int64_t channel) {
  const auto s = load(static_cast<const T*>(a.scale)[sample * a.scale_stride_b + channel]);
  return a.complement ? 1 - s : s;
}

int64_t channel_of(const GatherPanel& a, int64_t j) { return a.channels ? a.channels[j] : j; }

// The innermost dimensions that are contiguous on both sides, as one run; short runs are left to the tiles.
struct Runs {
  int64_t outer, inner, length;  // outer * inner runs, strides t and h apart, of length elements
};

bool contiguous_runs(const GatherPanel& a, Runs* r) {
  const Strides &s = a.src.strides, &o = a.out.strides;
  if (a.out.W > 1 && (s.w != 1 || o.w != 1)) return false;
  *r = {a.out.T, a.out.H, a.out.W};
  if (a.out.H > 1 && (s.h != a.out.W || o.h != a.out.W)) return a.out.W >= 4;
  *r = {a.out.T, 1, a.out.H * a.out.W};
  if (a.out.T > 1 && (s.t != r->length || o.t != r->length)) return r->length >= 4;
  *r = {1, 1, a.out.T * a.out.H * a.out.W};
  return r->length >= 4;
}

template <class T, class U, bool kScaled>
void gather_planes(const GatherPanel& a, const Runs& r) {
  const int64_t elements = a.out.B * a.out.C * a.out.T * a.out.H * a.out.W;
  parallel_for(a.out.B * a.out.C, elements, a.threads, [&](int64_t task) {
    const int64_t i = task / a.out.C, j = task % a.out.C, sample = sample_at(a.samples, i);
    const bool listed = j < a.num_channels;
    const int64_t channel = listed ? channel_of(a, j) : 0;
    const T* src = static_cast<const T*>(a.src.data) + sample * a.src.strides.b + channel * a.src.strides.c;
    U* out = static_cast<U*>(a.out.data) + i * a.out.strides.b + j * a.out.strides.c;
    acc_t<T> scale = 1;
    if constexpr (kScaled)
      if (listed) scale = scale_of<T>(a, sample, channel);
    for (int64_t t = 0; t < r.outer; ++t)
      for (int64_t h = 0; h < r.inner; ++h) {
        const T* from = src + t * a.src.strides.t + h * a.src.strides.h;
        U* to = out + t * a.out.strides.t + h * a.out.strides.h;
        if (!listed) {
          memset(to, 0, size_t(r.length) * sizeof(U));
        } else if constexpr (same<T, U> && !kScaled) {
          memcpy(to, from, size_t(r.length) * sizeof(U));
        } else {
#pragma omp simd
          for (int64_t p = 0; p < r.length; ++p) copy_element<T, U, kScaled>(from[p], scale, to + p);
        }
      }
  });
}

// One tile as its task sees it: np positions x nc channels, of which `listed` come from src, the rest are 0.
template <class T, class U>
struct Tile {
  const T* src;
  U* out;
  int64_t np, nc, listed;
  int64_t src_off[kTilePositions], out_off[kTilePositions];
  bool src_run, out_run;
  int64_t channel_off[kRowChannels];
  int64_t last_channel;  // the largest channel_off: memory is known to reach np elements past it
  acc_t<T> scale[kRowChannels + kLanes<acc_t<T>>] = {};  // Pick reads past the end
  Pick<acc_t<T>, kRowChannels> pick;
  bool picks = false;  // src is channels-last and pick is prepared
};

// Source runs along positions, output along channels: transposed in registers.
template <class T, class U, bool kScaled>
void gather_transposed(const Tile<T, U>& t) {
  constexpr bool kRaw = !kScaled && same<T, U>;
  using A = acc_t<T>;
  const T* from = t.src + t.src_off[0];
  const T* end = from + t.last_channel + t.np;
  transpose<A, false>(
      t.listed, t.np,
      [&](int64_t j, int64_t p, int64_t n) {
        const lanes_t<A> v = load_lanes<A, kRaw>(from + t.channel_off[j] + p, n, end);
        return kScaled ? v * t.scale[j] : v;
      },
      [&](int64_t p, int64_t j, int64_t n, lanes_t<A> v) {
        store_lanes<A, kRaw>(v, t.out + t.out_off[p] + j, n);
      });
}

// Output runs along positions: pick channels into a buffer row by row, then transpose that.
template <class T, class U, bool kScaled>
void gather_to_planes(const Tile<T, U>& t, int64_t out_stride_c) {
  constexpr bool kRaw = !kScaled && same<T, U>;
  using A = acc_t<T>;
  A buf[kTileElements];
  for (int64_t p = 0; p < t.np; ++p) {
    const T* from = t.src + t.src_off[p];
    if (t.picks) {
      if (p + kPrefetchRows < t.np) {
        const int64_t begin = t.pick.start[0], n = t.pick.start[t.pick.windows - 1] + kLanes<A> - begin;
        prefetch_row(t.src + t.src_off[p + kPrefetchRows] + begin, n);
      }
      t.pick.template run<kRaw, kScaled>(from, from, t.scale, t.listed, buf + p * kTileChannels);
      continue;
    }
    for (int64_t j = 0; j < t.listed; ++j) {
      const A value = lane_of<A, kRaw>(from[t.channel_off[j]]);
      buf[p * kTileChannels + j] = kScaled ? value * t.scale[j] : value;
    }
  }
  store_tile<kRaw>(buf, kTileChannels, t.out_off, true, out_stride_c, t.np, t.listed, t.out);
  for (int64_t j = t.listed; j < t.nc; ++j)
    memset(t.out + t.out_off[0] + j * out_stride_c, 0, size_t(t.np) * sizeof(U));
}

template <class T, class U, bool kScaled>
void gather_tile(const Tile<T, U>& t, int64_t out_stride_c) {
  constexpr bool kRaw = !kScaled && same<T, U>;
  const bool out_innermost = out_stride_c == 1;
  if (!out_innermost && t.out_run && t.nc <= kTileChannels)
    return gather_to_planes<T, U, kScaled>(t, out_stride_c);
  // A vector holds few of a kernel's taps (3): element by element is as fast then.
  const bool transposed = out_innermost && t.src_run && !t.picks && t.np > kLanes<acc_t<T>> / 2;
  if (transposed) gather_transposed<T, U, kScaled>(t);
  for (int64_t p = 0; p < t.np; ++p) {
    const T* from = t.src + t.src_off[p];
    U* to = t.out + t.out_off[p];
    if (out_innermost) {
      if (t.picks)
        t.pick.template run<kRaw, kScaled>(from, from, t.scale, t.listed, to);
      else if (!transposed)
        for (int64_t j = 0; j < t.listed; ++j)
          copy_element<T, U, kScaled>(from[t.channel_off[j]], t.scale[j], to + j);
      memset(to + t.listed, 0, size_t(t.nc - t.listed) * sizeof(U));
    } else {
      for (int64_t j = 0; j < t.listed; ++j)
        copy_element<T, U, kScaled>(from[t.channel_off[j]], t.scale[j], to + j * out_stride_c);
      for (int64_t j = t.listed; j < t.nc; ++j) memset(to + j * out_stride_c, 0, sizeof(U));
    }
  }
}

template <class T, class U, bool kScaled>
void gather_tiles(const GatherPanel& a) {
  const Grid g{a.out.T, a.out.H, a.out.W};
  const int64_t P = g.positions(), np_max = min64(kTilePositions, P), blocks = ceil_div(P, np_max);
  // Channels innermost on both sides: long pieces. Few positions (weights): as many channels as the tile
  // holds.
  const bool innermost = a.src.strides.c == 1 && a.out.strides.c == 1;
  const int64_t fitting = max64(kTileChannels, kTileElements / np_max / 16 * 16);
  const int64_t nc_max = innermost              ? kRowChannels
                         : a.out.strides.c == 1 ? min64(kRowChannels, fitting)
                                                : kTileChannels;
  parallel_for(a.out.B * blocks, a.out.B * a.out.C * P, a.threads, [&](int64_t task) {
    Tile<T, U> t;
    const int64_t i = task / blocks, sample = sample_at(a.samples, i), p0 = task % blocks * np_max;
    t.np = min64(np_max, P - p0);
    t.src = static_cast<const T*>(a.src.data) + sample * a.src.strides.b;
    t.src_run = position_offsets(g, a.src.strides, p0, t.np, t.src_off);
    t.out_run = position_offsets(g, a.out.strides, p0, t.np, t.out_off);
    for (int64_t j0 = 0; j0 < a.out.C; j0 += nc_max) {
      t.nc = min64(nc_max, a.out.C - j0);
      t.listed = max64(0, min64(t.nc, a.num_channels - j0));
      t.out = static_cast<U*>(a.out.data) + i * a.out.strides.b + j0 * a.out.strides.c;
      t.last_channel = 0;
      for (int64_t j = 0; j < t.listed; ++j) {
        const int64_t channel = channel_of(a, j0 + j);
        t.channel_off[j] = channel * a.src.strides.c;
        t.last_channel = max64(t.last_channel, t.channel_off[j]);
        if constexpr (kScaled) t.scale[j] = scale_of<T>(a, sample, channel);
      }
      t.picks = kHasPermute && a.src.strides.c == 1 && t.listed > 0 && t.last_channel + 1 >= kLanes<acc_t<T>>;
      if (t.picks) t.pick.prepare(t.channel_off, t.listed, t.last_channel);
      gather_tile<T, U, kScaled>(t, a.out.strides.c);
    }
  });
}

template <class T, class U, bool kScaled>
Status gather(const GatherPanel& a) {
  Runs runs;
  if (contiguous_runs(a, &runs))
    gather_planes<T, U, kScaled>(a, runs);
  else
    gather_tiles<T, U, kScaled>(a);
  return Status::ok;
}

}  // namespace

Status gather_panel(const GatherPanel& a) {
  if (a.out.B * a.out.C * a.out.T * a.out.H * a.out.W == 0) return Status::ok;
  return with_dtypes(a.src.dtype, a.out.dtype, [&](auto src, auto out) {
    using T = typename decltype(src)::type;
    using U = typename decltype(out)::type;
    return a.scale ? gather<T, U, true>(a) : gather<T, U, false>(a);
  });
}

}  // namespace dsts::cpu::DSTS_ISA
