// Settings, and the barriers and fences met so far, which tests may switch off.
#include "settings.h"

#include <string.h>

#include <algorithm>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "block.h"
#include "runtime.h"

namespace emulator {

namespace {

SpinLock sites_lock;
std::vector<Site*> sites;
std::vector<std::pair<std::string, int>> skipped_barriers, skipped_fences;

std::mutex launches_lock;
uint64_t seed_value = 0, launches = 0;
int worker_count = 2;

bool is_fence(const Site& site) { return strcmp(site.name, "__threadfence") == 0; }

bool ends_with(const std::string& text, const std::string& suffix) {
  return text.size() >= suffix.size() &&
         text.compare(text.size() - suffix.size(), suffix.size(), suffix) == 0;
}

}  // namespace

void look_up(Site* site) {
  std::lock_guard<SpinLock> hold(sites_lock);
  if (site->epoch == epoch) return;
  if (std::find(sites.begin(), sites.end(), site) == sites.end()) sites.push_back(site);
  bool skip = false;
  for (const auto& [file, line] : is_fence(*site) ? skipped_fences : skipped_barriers)
    skip |= line == site->place.line && ends_with(site->place.file, file);
  __atomic_store_n(&site->skipped, skip, __ATOMIC_RELAXED);
  __atomic_store_n(&site->epoch, epoch.load(), __ATOMIC_RELEASE);
}

uint64_t next_seed() {
  std::lock_guard<std::mutex> hold(launches_lock);
  return Random{seed_value * 0x2545F4914F6CDD1Du + launches++}.next();
}
int workers() {
  std::lock_guard<std::mutex> hold(launches_lock);
  return worker_count;
}

void set_seed(uint64_t value) {
  std::lock_guard<std::mutex> hold(launches_lock);
  seed_value = value;
  launches = 0;
}
void set_workers(int count) {
  std::lock_guard<std::mutex> hold(launches_lock);
  worker_count = std::max(1, count);
}
void set_warp_operations_order(bool on) { warp_operations_order = on; }
void set_fresh_threads(bool on) { fresh_threads = on; }
void skip_barrier(const std::string& file, int line) {
  std::lock_guard<SpinLock> hold(sites_lock);
  skipped_barriers.emplace_back(file, line);
  ++epoch;
}
void skip_fence(const std::string& file, int line) {
  std::lock_guard<SpinLock> hold(sites_lock);
  skipped_fences.emplace_back(file, line);
  ++epoch;
}
void reset() {
  set_seed(0);
  set_workers(2);
  set_warp_operations_order(false);
  set_fresh_threads(false);
  std::lock_guard<SpinLock> hold(sites_lock);
  skipped_barriers.clear();
  skipped_fences.clear();
  ++epoch;
}
std::vector<std::pair<std::string, int>> sites_met(bool fences) {
  std::lock_guard<SpinLock> hold(sites_lock);
  std::set<std::pair<std::string, int>> met;
  for (const Site* site : sites)
    if (is_fence(*site) == fences) met.emplace(site->place.file, site->place.line);
  return {met.begin(), met.end()};
}
int arch() { return EMULATOR_ARCH; }

}  // namespace emulator
