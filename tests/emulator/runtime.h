// The emulator's settings, which module.cpp hands to Python.
#pragma once

#include <stdint.h>

#include <string>
#include <utility>
#include <vector>

namespace emulator {

void set_seed(uint64_t value);  // of the order of blocks and threads
void set_workers(int count);    // blocks that run at the same time
// Whether shuffles, votes and matrix operations order memory accesses of their lanes, as __syncwarp does.
// CUDA does not promise it, so they do not unless told to.
void set_warp_operations_order(bool on);
// Whether ThreadSanitizer is given new threads for every block: slow, and no race between blocks is missed.
void set_fresh_threads(bool on);
// Makes the barrier or fence at this line do nothing; `file` may be the end of the path.
void skip_barrier(const std::string& file, int line);
void skip_fence(const std::string& file, int line);
void reset();  // all settings to their defaults
std::vector<std::pair<std::string, int>> sites_met(bool fences);
int arch();

}  // namespace emulator
