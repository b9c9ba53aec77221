// Runs the frozen convolution on a bare driver: no torch, no CUDA toolkit, a PTX or cubin file and
// libcuda.so.1.
//
//   bare KERNEL.ptx [--kernel NAME] [--batch B] [--channels C] [--size T H W] [--repeat N]
//
// For simulators and bare machines. It launches conv_kernel<__half, true> as a frozen layer does, one neuron
// a sample, checks outputs against double precision and prints time and rates; see docs/gpu.md. Exit status:
// 0, 1 where an output is wrong, 2 where it could not run.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "cuda/grids.h"
#include "cuda/params.h"
#include "driver.h"
#include "kernel_file.h"
#include "layer.h"

namespace {

using dsts::cuda::ConvParams;
using dsts::cuda::kTile;
constexpr int kThreads = 128, kSamples = 512;

struct Options {
  std::string path, kernel = "conv_kernelI6__halfLb1E";  // mangled, as far as it must match
  int batch = 8, channels = 1024, t = 8, h = 16, w = 16, repeat = 20;
};

Options parse(int count, char** words) {
  Options o;
  int i = 1;
  const auto word = [&] {
    if (i == count) throw std::runtime_error("an option lacks its value");
    return std::string(words[i++]);
  };
  const auto number = [&] {
    const std::string text = word();
    const int value = std::atoi(text.c_str());
    if (value < 1) throw std::runtime_error("got '" + text + "', wanted a positive number");
    return value;
  };
  while (i < count) {
    const std::string name = word();
    if (name == "--kernel")
      o.kernel = word();
    else if (name == "--batch")
      o.batch = number();
    else if (name == "--channels")
      o.channels = number();
    else if (name == "--size")
      o.t = number(), o.h = number(), o.w = number();
    else if (name == "--repeat")
      o.repeat = number();
    else if (o.path.empty() && name[0] != '-')
      o.path = name;
    else
      throw std::runtime_error("not understood: " + name);
  }
  if (o.path.empty())
    throw std::runtime_error(
        "wanted: bare KERNEL.ptx [--kernel NAME] [--batch B] [--channels C] "
        "[--size T H W] [--repeat N]");
  return o;
}

std::string find_kernel(const bare::KernelFile& file, const std::string& part) {
  std::string listed;
  for (const std::string& name : file.kernels) {
    if (name.find(part) != std::string::npos) return name;
    listed += "\n  " + name;
  }
  throw std::runtime_error("no kernel's name has '" + part + "'; there are:" + listed);
}

// What the launcher in csrc/cuda/conv.cu launches with, by the same headers.
struct Launch {
  dsts::cuda::PersistentGrid grid;
  int smem_bytes;

  Launch(const bare::Layer& layer, const bare::Driver& driver, int capability) {
    using namespace dsts::cuda;
    const int resident = resident_ctas(capability, driver.attribute(bare::kSharedOfProcessor) / 1024);
    grid =
        persistent_grid(layer.batch, layer.positions(), layer.channels, layer.width / bare::kBlock * kMaxTaps,
                        driver.attribute(bare::kProcessors) * resident);
    smem_bytes = product_smem(capability, false, true, true, sizeof(bare::Half)) + kConvSmemBytes +
                 schedule_bytes(grid.num_ctas, kThreads);
  }
};

ConvParams parameters(const bare::Layer& layer, const Launch& launch, const bare::Driver& driver) {
  const auto fresh = [&](size_t bytes) { return reinterpret_cast<void*>(driver.allocate(bytes, 0xff)); };
  const long long row = layer.channels, positions = layer.positions();
  const auto& grid = launch.grid;
  ConvParams p{};
  p.panel = driver.upload(layer.panel), p.filters = driver.upload(layer.filters);
  p.plan = driver.upload(layer.plan), p.bias = driver.upload(layer.bias);
  p.out = fresh(layer.batch * positions * row * sizeof(bare::Half));
  p.workspace = static_cast<float*>(fresh(sizeof(float) * 2 * grid.num_ctas * kTile * kTile));
  p.arrival_counters = static_cast<int*>(fresh(sizeof(int) * grid.arrival_counters));
  p.extent = dsts::cuda::extent_of(layer.t, layer.h, layer.w);
  p.out_strides = {positions * row, 1, layer.h * layer.w * row, layer.w * row, row};  // channels last
  p.batch = layer.batch, p.width = p.pitch = layer.width, p.outputs = layer.channels;
  p.filter_pitch = bare::kBlock, p.kt = 1, p.kh = p.kw = 3, p.sign = 1;
  p.spatial_taps = dsts::cuda::kSpatialTaps, p.temporal_taps = dsts::cuda::kTemporalTaps;
  p.packed = p.relu = 1, p.num_ctas = grid.num_ctas, p.waves = grid.waves;
  p.idle_percent = dsts::cuda::kIdlePercent;
  p.vector_out = layer.channels % (dsts::cuda::kVectorBytes / sizeof(bare::Half)) == 0;
  return p;
}

// The median of the launches, in milliseconds.
float run(const bare::Driver& d, bare::Function kernel, const Launch& launch, ConvParams p, int repeat) {
  if (launch.smem_bytes > 48 * 1024)
    d.check(d.cuFuncSetAttribute(kernel, bare::kMaxDynamicShared, launch.smem_bytes), "cuFuncSetAttribute");
  bare::Event start, end;
  d.check(d.cuEventCreate(&start, 0), "cuEventCreate"), d.check(d.cuEventCreate(&end, 0), "cuEventCreate");
  std::vector<float> times(repeat);
  void* arguments[] = {&p};
  for (float& time : times) {
    d.check(d.cuMemsetD8_v2(reinterpret_cast<bare::Address>(p.arrival_counters), 0,
                            sizeof(int) * launch.grid.arrival_counters),
            "cuMemsetD8");
    d.check(d.cuEventRecord(start, nullptr), "cuEventRecord");
    d.check(d.cuLaunchKernel(kernel, static_cast<unsigned>(launch.grid.num_ctas), 1, 1, kThreads, 1, 1,
                             static_cast<unsigned>(launch.smem_bytes), nullptr, arguments, nullptr),
            "cuLaunchKernel");
    d.check(d.cuEventRecord(end, nullptr), "cuEventRecord");
    d.check(d.cuEventSynchronize(end), "the kernel");
    d.check(d.cuEventElapsedTime(&time, start, end), "cuEventElapsedTime");
  }
  d.check(d.cuCtxSynchronize(), "the kernel");
  std::sort(times.begin(), times.end());
  return times[repeat / 2];
}

// Compares some outputs with double precision, and all with what memory held before; returns the wrong ones.
int check(const bare::Layer& layer, const std::vector<bare::Half>& out, double* error) {
  int wrong = 0;
  bare::Values values;
  for (int i = 0; i < kSamples; ++i) {
    const int n = values.bits() % layer.batch, position = values.bits() % layer.positions();
    const int o = values.bits() % layer.channels;
    double size;
    const double wanted = layer.expected(n, position, o, &size);
    const double got =
        bare::from_half(out[(static_cast<size_t>(n) * layer.positions() + position) * layer.channels + o]);
    const double off = std::fabs(got - wanted);
    *error = std::max(*error, off);
    // The output's own rounding, and that of adding up in float32.
    if (!(off <= std::ldexp(wanted, -10) + std::ldexp(size, -16))) {
      if (++wrong <= 4)
        std::printf("wrong: sample %d, position %d, output %d: %g, not %g\n", n, position, o, got, wanted);
    }
  }
  const auto unwritten =
      std::count_if(out.begin(), out.end(), [](bare::Half h) { return std::isnan(bare::from_half(h)); });
  if (unwritten) std::printf("wrong: %lld outputs are NaN\n", static_cast<long long>(unwritten));
  return wrong + (unwritten > 0);
}

int measure(const Options& options) {
  const bare::KernelFile file = bare::read_kernel_file(options.path);
  const std::string name = find_kernel(file, options.kernel);
  const bare::Driver driver;
  std::printf("device: %s, %d.%d, %d multiprocessors\n", driver.name().c_str(),
              driver.attribute(bare::kMajor), driver.attribute(bare::kMinor),
              driver.attribute(bare::kProcessors));
  bare::Module module;
  bare::Function kernel;
  driver.check(driver.cuModuleLoadData(&module, file.image.c_str()), "cuModuleLoadData");
  driver.check(driver.cuModuleGetFunction(&kernel, module, name.c_str()), "cuModuleGetFunction");

  const bare::Layer layer(options.batch, options.channels, options.t, options.h, options.w);
  const Launch launch(layer, driver, file.capability);
  std::printf("kernel: %s for sm_%d, %d CTAs of %d threads, %d waves, %d bytes of shared memory\n",
              name.c_str(), file.capability, launch.grid.num_ctas, kThreads, launch.grid.waves,
              launch.smem_bytes);
  std::printf("layer: batch %d, %d channels, %dx%dx%d\n", layer.batch, layer.channels, layer.t, layer.h,
              layer.w);
  const ConvParams p = parameters(layer, launch, driver);
  const double seconds = run(driver, kernel, launch, p, options.repeat) * 1e-3;
  std::printf("time: %.4f ms, median of %d\n", seconds * 1e3, options.repeat);
  if (seconds > 0)
    std::printf("rate: %.2f TFLOP/s, %.1f GB/s\n", layer.operations() / seconds * 1e-12,
                layer.bytes() / seconds * 1e-9);

  std::vector<bare::Half> out(static_cast<size_t>(layer.batch) * layer.positions() * layer.channels);
  driver.check(driver.cuMemcpyDtoH_v2(out.data(), reinterpret_cast<bare::Address>(p.out),
                                      out.size() * sizeof(bare::Half)),
               "cuMemcpyDtoH");
  double error = 0;
  const int wrong = check(layer, out, &error);
  std::printf("error: %.3g at most in %d outputs, %s\n", error, kSamples,
              wrong ? "WRONG" : "as it should be");
  return wrong ? 1 : 0;
}

}  // namespace

int main(int count, char** words) {
  try {
    return measure(parse(count, words));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bare: %s\n", error.what());
    return 2;
  }
}
