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

#include "cuda/params.h"
#include "driver.h"
#include "kernel_file.h"
#include "layer.h"

namespace {

using dsts::cuda::ConvParams;
using dsts::cuda::kTile;
constexpr int kThreads = 128, kSamples = 512, kMostPrograms = 1024;

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

// As csrc/cuda/launch.h works it out.
dsts::cuda::Divide divide_by(int divisor) {
  unsigned shift = 0;
  while ((1ull << shift) < static_cast<unsigned>(divisor)) ++shift;
  const unsigned long long magic = ((1ull << 32) * ((1ull << shift) - divisor)) / divisor + 1;
  return {static_cast<unsigned>(divisor), static_cast<unsigned>(magic), shift};
}

// Grid, waves and shared memory of a launch: conv_grid of dsts_kernels/backends/cuda/kernels.py, and the
// launcher in csrc/cuda/conv.cu.
struct Launch {
  int programs, waves, flags, shared;

  Launch(const bare::Layer& layer, const bare::Driver& driver, int capability) {
    const int columns = bare::ceil_div(layer.channels, kTile);
    const bool turing = capability >= 75 && capability < 80;
    const int needed = capability < 75 ? 44 : turing ? 32 : 70;
    const int resident = driver.attribute(bare::kSharedOfProcessor) >= 2 * needed * 1024 ? 2 : 1;
    const int tiles = layer.batch * bare::ceil_div(layer.positions(), kTile) * columns;
    const int most = tiles * (layer.width / bare::kBlock) * 12;
    programs = std::min({driver.attribute(bare::kProcessors) * resident,
                         bare::ceil_div(most, dsts::cuda::kLeast), kMostPrograms});
    waves = std::max(0, tiles / programs - 1);
    flags = programs + layer.batch * columns;
    // product_bytes
    const int stages = capability < 80 ? 2 : 4;
    const int operand = kTile * (capability < 75 ? 80 : turing ? 32 : 64);
    const int chunk = kTile * (kTile / (turing ? 4 : 2) + 4) * 4 + kTile * 9 * 4;
    const int tile = 192;  // sizeof(ConvShared)
    shared = std::max(stages * 2 * operand, chunk) + tile + 4 * (3 * programs + 1 + kThreads);
  }
};

ConvParams parameters(const bare::Layer& layer, const Launch& launch, const bare::Driver& driver) {
  const auto room = [&](size_t bytes) { return reinterpret_cast<void*>(driver.allocate(bytes, 0xff)); };
  const long long row = layer.channels, positions = layer.positions();
  ConvParams p{};
  p.panel = driver.upload(layer.panel), p.filters = driver.upload(layer.filters);
  p.plan = driver.upload(layer.plan), p.bias = driver.upload(layer.bias);
  p.out = room(layer.batch * positions * row * sizeof(bare::Half));
  p.partial = static_cast<float*>(room(sizeof(float) * 2 * launch.programs * kTile * kTile));
  p.flags = static_cast<int*>(room(sizeof(int) * launch.flags));
  p.extent = {layer.t, layer.h, layer.w, layer.positions(), divide_by(layer.w), divide_by(layer.h)};
  p.out_strides = {positions * row, 1, layer.h * layer.w * row, layer.w * row, row};  // channels last
  p.batch = layer.batch, p.width = p.pitch = layer.width, p.outputs = layer.channels;
  p.filter_pitch = bare::kBlock, p.kt = 1, p.kh = p.kw = 3, p.taps_1 = 9, p.taps_2 = 3, p.sign = 1;
  p.packed = p.relu = 1, p.programs = launch.programs, p.waves = launch.waves;
  p.vector_out = layer.channels % 8 == 0;
  return p;
}

// The median of the launches, in milliseconds.
float run(const bare::Driver& d, bare::Function kernel, const Launch& launch, ConvParams p, int repeat) {
  if (launch.shared > 48 * 1024)
    d.check(d.cuFuncSetAttribute(kernel, bare::kMaxDynamicShared, launch.shared), "cuFuncSetAttribute");
  bare::Event start, end;
  d.check(d.cuEventCreate(&start, 0), "cuEventCreate"), d.check(d.cuEventCreate(&end, 0), "cuEventCreate");
  std::vector<float> times(repeat);
  void* arguments[] = {&p};
  for (float& time : times) {
    d.check(d.cuMemsetD8_v2(reinterpret_cast<bare::Address>(p.flags), 0, sizeof(int) * launch.flags),
            "cuMemsetD8");
    d.check(d.cuEventRecord(start, nullptr), "cuEventRecord");
    d.check(d.cuLaunchKernel(kernel, static_cast<unsigned>(launch.programs), 1, 1, kThreads, 1, 1,
                             static_cast<unsigned>(launch.shared), nullptr, arguments, nullptr),
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
  std::printf("kernel: %s for sm_%d, %d blocks of %d threads, %d bytes of shared memory\n", name.c_str(),
              file.capability, launch.programs, kThreads, launch.shared);
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
