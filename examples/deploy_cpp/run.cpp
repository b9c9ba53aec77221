// Runs a package of AOTInductor on a tensor, without Python:
//
//   run MODEL.pt2 INPUT.pt OUTPUT.pt [REPEATS]
//
// INPUT.pt is what torch.save(tensor, path) writes in Python, OUTPUT.pt what torch.load(path) reads there. With REPEATS
// it prints the median time of so many runs in milliseconds. OMP_NUM_THREADS says how many threads.
#include <ATen/core/Tensor.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

at::Tensor load(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("INPUT.pt: got " + path + ", which cannot be read");
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const c10::IValue value = torch::jit::pickle_load(bytes);
  if (!value.isTensor()) throw std::runtime_error("INPUT.pt: got " + value.tagKind() + ", wanted one tensor");
  return value.toTensor();
}

void save(const at::Tensor& tensor, const std::string& path) {
  const std::vector<char> bytes = torch::jit::pickle_save(tensor);
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size())).flush();
  if (!file) throw std::runtime_error("OUTPUT.pt: got " + path + ", which cannot be written");
}

double median_ms(torch::inductor::AOTIModelPackageLoader& model, const at::Tensor& input, int repeats) {
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    model.run({input});
    times.push_back(
        std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4 || argc > 5) {
    std::cerr << "usage: run MODEL.pt2 INPUT.pt OUTPUT.pt [REPEATS]\n";
    return 2;
  }
  try {
    torch::inductor::AOTIModelPackageLoader model(argv[1]);
    const at::Tensor input = load(argv[2]);
    save(model.run({input}).at(0), argv[3]);
    if (argc == 5) std::cout << median_ms(model, input, std::max(1, std::stoi(argv[4]))) << "\n";
  } catch (const std::exception& error) {
    std::cerr << "run: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
