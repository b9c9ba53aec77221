// Launches, as the host sees them: their limits, the order of their blocks, and the workers that run them.
#include <stdlib.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "block.h"
#include "settings.h"

namespace emulator {

namespace {

constexpr size_t kDefaultShared = 48 << 10;
constexpr int kSharedLimit = (EMULATOR_ARCH >= 800 ? 163 : EMULATOR_ARCH >= 750 ? 64 : 96) << 10;

std::mutex host_lock;
std::vector<Worker*> idle_workers;
std::map<const void*, int> shared_limits;

Worker* take_worker() {
  std::lock_guard<std::mutex> hold(host_lock);
  if (idle_workers.empty()) return new Worker;
  Worker* w = idle_workers.back();
  idle_workers.pop_back();
  return w;
}

}  // namespace

Error allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > kSharedLimit) return Error::kInvalidValue;
  std::lock_guard<std::mutex> hold(host_lock);
  shared_limits[kernel] = bytes;
  return Error::kNone;
}

Error launch(const void* kernel, Invoke invoke, void* params, Index grid, Index block, size_t shared_bytes) {
  Launch l;
  const auto volume = [](Index i) { return uint64_t(i.x) * i.y * i.z; };
  if (volume(block) == 0 || block.x > 1024 || block.y > 1024 || block.z > 64 || volume(block) > kMaxThreads)
    return Error::kInvalidConfiguration;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535)
    return Error::kInvalidConfiguration;
  if (volume(grid) > 1u << 28) fail(Place::here(), "a grid of more than 2^28 blocks");
  {
    std::lock_guard<std::mutex> hold(host_lock);
    const auto limit = shared_limits.find(kernel);
    if (shared_bytes >
        (limit == shared_limits.end() ? kDefaultShared : std::max(kDefaultShared, size_t(limit->second))))
      return Error::kInvalidValue;
  }
  l.seed = next_seed();
  l.kernel = kernel;
  l.invoke = invoke;
  l.params = params;
  l.grid = grid;
  l.block = block;
  l.shared_bytes = shared_bytes;
  l.threads = unsigned(volume(block));
  l.order.resize(size_t(volume(grid)));
  for (size_t i = 0; i < l.order.size(); ++i) l.order[i] = uint32_t(i);
  Random random{l.seed};
  random.shuffle(l.order.data(), l.order.size());
  l.end_key = malloc(sizeof(uint64_t));

  const size_t needed = std::min(size_t(workers()), l.order.size());
  std::vector<std::pair<std::thread, Worker*>> running;
  for (size_t i = 0; i < needed; ++i) {
    Worker* w = take_worker();
    running.emplace_back(std::thread([w, &l] { w->run(&l); }), w);
  }
  for (auto& [thread, worker] : running) {
    thread.join();
    std::lock_guard<std::mutex> hold(host_lock);
    idle_workers.push_back(worker);
  }
  order_acquire(l.end_key);
  free(l.end_key);
  return Error::kNone;
}

}  // namespace emulator
