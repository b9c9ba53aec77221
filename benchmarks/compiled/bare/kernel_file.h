// A PTX or cubin file: its kernels' mangled names, and the compute capability it was compiled for.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace bare {

struct KernelFile {
  std::string image;  // ends with a zero, as PTX must
  std::vector<std::string> kernels;
  int capability = 0;  // times ten
};

template <class T>
T field(const std::string& image, size_t at) {
  T value;
  if (at + sizeof value > image.size()) throw std::runtime_error("the cubin ends early");
  std::memcpy(&value, image.data() + at, sizeof value);
  return value;
}

// Functions of the symbol table of a 64-bit ELF file.
inline void read_cubin(KernelFile* file) {
  const std::string& image = file->image;
  const auto flags = field<uint32_t>(image, 48);
  const bool later = field<uint8_t>(image, 8) >= 8;  // version of the ABI
  file->capability = static_cast<int>(later ? flags >> 8 & 0xff : flags & 0xff);
  const auto headers = field<uint64_t>(image, 40);
  const int size = field<uint16_t>(image, 58), count = field<uint16_t>(image, 60);
  for (int i = 0; i < count; ++i) {
    const size_t header = headers + static_cast<size_t>(i) * size;
    constexpr uint32_t kSymbols = 2;
    if (field<uint32_t>(image, header + 4) != kSymbols) continue;
    const auto first = field<uint64_t>(image, header + 24), bytes = field<uint64_t>(image, header + 32);
    const size_t strings =
        field<uint64_t>(image, headers + size_t{field<uint32_t>(image, header + 40)} * size + 24);
    for (size_t at = first; at < first + bytes; at += 24) {
      constexpr uint8_t kFunction = 2;
      if ((field<uint8_t>(image, at + 4) & 15) == kFunction)
        file->kernels.push_back(image.c_str() + strings + field<uint32_t>(image, at));
    }
  }
}

inline std::string word_after(const std::string& text, size_t at) {
  const size_t first = text.find_first_not_of(" \t", at);
  return text.substr(first, text.find_first_of(" \t\r\n(,", first) - first);
}

inline void read_ptx(KernelFile* file) {
  const std::string &text = file->image, target = ".target", entry = ".entry";
  const size_t at = text.find(target);
  if (at == std::string::npos) throw std::runtime_error("neither a cubin nor PTX");
  file->capability = std::atoi(word_after(text, at + target.size()).c_str() + std::strlen("sm_"));
  for (size_t i = text.find(entry); i != std::string::npos; i = text.find(entry, i + 1))
    file->kernels.push_back(word_after(text, i + entry.size()));
}

inline KernelFile read_kernel_file(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw std::runtime_error(path + ": cannot be read");
  KernelFile file;
  file.image.assign(std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>());
  if (file.image.compare(0, 4,
                         "\x7f"
                         "ELF") == 0)
    read_cubin(&file);
  else
    read_ptx(&file);
  return file;
}

}  // namespace bare
