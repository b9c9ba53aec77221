// Running the blocks of a launch: a worker sets one up, its threads take turns until all have exited, and
// meet at the block's barriers. What a thread that cannot go on says is here too.
#include "block.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <string>

#include "settings.h"

namespace emulator {

__thread Thread* current __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

void finish_barrier(Worker* w, Fiber* except) {
  // Released in an order that is neither the threads' nor always that of arrival.
  const unsigned n = w->arrived, shift = unsigned(w->random.below(n));
  w->arrived = 0;
  ++w->generation;
  for (unsigned i = 0; i < n; ++i) {
    Fiber* f = w->waiting[(i + shift) % n];
    if (f != except) w->make_ready(f);
  }
}

void exit_thread(Fiber* f) {
  Worker* w = f->worker;
  if (f->copies_begin != f->copies_end)
    fail(f->copy_place, "__pipeline_memcpy_async: %u copies of a thread were never waited for",
         f->copies_end - f->copies_begin);
  order_release(w->launch->end_key);
  f->exited = true;
  --w->alive;
  leave_warp(f);
  if (w->arrived && w->arrived == w->alive) finish_barrier(w, nullptr);
}

void enter_fiber() {
  arrive();
  Fiber* f = self();
  const Launch* launch = f->worker->launch;
  order_acquire(&f->worker->start_key);
  launch->invoke(launch->kernel, launch->params);
  exit_thread(f);
  leave(f->worker, f);
  __builtin_unreachable();
}

}  // namespace

Worker::Worker() {
  fibers = static_cast<Fiber*>(
      mmap(nullptr, kMaxThreads * sizeof(Fiber), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  stacks = static_cast<char*>(mmap(nullptr, kMaxThreads * (kStackBytes + kPage), PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (fibers == MAP_FAILED || stacks == MAP_FAILED) fail(Place::here(), "out of memory");
  ready.resize(kMaxThreads);
  waiting.resize(kMaxThreads);
}

void Worker::run_block(uint32_t index) {
  const Launch& l = *launch;
  random.state = l.seed ^ (index * 0xD1B54A32D192ED03u);
  threads = alive = l.threads;
  for (; prepared < threads; ++prepared) {
    char* guard = stacks + prepared * (kStackBytes + kPage);
    if (mprotect(guard, kPage, PROT_NONE) != 0) fail(Place::here(), "no guard page");
    fibers[prepared].stack = guard + kPage;
  }

  // Fresh shared memory of just this size. The memory after it belongs to no one, for AddressSanitizer.
  const unsigned warp_count = (threads + 31) / 32;
  void* memory = nullptr;
  {
    Untouched untouched;
    if (posix_memalign(&memory, 128, l.shared_bytes) != 0) fail(Place::here(), "out of memory");
    memset(memory, 0xFF, l.shared_bytes);
    keys = static_cast<uint64_t*>(malloc((2 + 64 * warp_count) * sizeof(uint64_t)));
  }

  ready_begin = ready_end = arrived = generation = 0;
  for (unsigned i = 0; i < warp_count; ++i) {
    Warp& warp = warps[i];
    const unsigned lanes = std::min(32u, threads - i * 32);
    warp.lanes = fibers + i * 32;
    warp.alive = lanes == 32 ? ~0u : (1u << lanes) - 1;
    for (Meeting& m : warp.meetings) m.arrived = m.generation = 0;
  }
  const Index block = l.block, grid = l.grid;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    f.thread_index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    f.block_index = {index % grid.x, index / grid.x % grid.y, index / (grid.x * grid.y)};
    f.block_size = block;
    f.grid_size = grid;
    f.shared = static_cast<unsigned char*>(memory);
    f.worker = this;
    f.slot = i;
    f.exited = false;
    f.waits_at = nullptr;
    f.copies_begin = f.copies_end = f.open_group = 0;
    f.releases_next = false;
    f.last_atomic = nullptr;
    start_at(f.context, f.stack, i, enter_fiber);
    hire(f, blocks_run % kCrews);
    make_ready(&f);
  }
  random.shuffle(ready.data(), threads);

  Fiber* first = ready[ready_begin++];
  current = first;
  jump(main, first->context, false);
  current = nullptr;

  Untouched untouched;
#ifdef EMULATOR_THREAD
  for (unsigned i = 0; i < threads; ++i) {
    forget_stack(fibers[i].stack);
    if (fresh_threads) __tsan_destroy_fiber(fibers[i].context.sanitizer_fiber);
  }
#endif
  free(keys);
  free(memory);
  ++blocks_run;
}

// Gives the fiber a thread of ThreadSanitizer's. To make one takes it a third of a millisecond, so crews of
// them are kept: races between launches and within a block are all seen, and those between blocks unless the
// two took the same crew on the same worker.
void Worker::hire([[maybe_unused]] Fiber& f, [[maybe_unused]] unsigned crew) {
#ifdef EMULATOR_THREAD
  void*& member = crews[crew][f.slot];
  if (!member || fresh_threads) member = __tsan_create_fiber(0);
  f.context.sanitizer_fiber = member;
  if (fresh_threads) member = nullptr;
#endif
}

void Worker::run(Launch* of) {
  launch = of;
  blocks_run = 0;
  order_release(&start_key);
  describe_thread(main);
  for (size_t i; (i = launch->next.fetch_add(1)) < launch->order.size();) run_block(launch->order[i]);
}

void report_deadlock(Worker* w) {
  fprintf(stderr, "emulator: threads of a block wait for ever\n");
  std::map<std::string, std::pair<unsigned, unsigned>> groups;  // where: how many, the first
  for (unsigned i = 0; i < w->threads; ++i) {
    const Fiber& f = w->fibers[i];
    std::string where = "exited";
    if (!f.exited)
      where = std::string("wait at ") + f.waits_at + " " + f.place.file + ":" + std::to_string(f.place.line);
    auto found = groups.try_emplace(where, 0u, i).first;
    ++found->second.first;
  }
  for (const auto& [where, group] : groups)
    fprintf(stderr, "  %u threads %s, the first is %u\n", group.first, where.c_str(), group.second);
  abort();
}

void fail(Place place, const char* format, ...) {
  fprintf(stderr, "emulator: %s:%d: ", place.file, place.line);
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  if (const Fiber* f = self())
    fprintf(stderr, " (thread %u of block %u, %u, %u)", f->slot, f->block_index.x, f->block_index.y,
            f->block_index.z);
  fprintf(stderr, "\n");
  abort();
}

void block_barrier(Site* site) {
  if (is_skipped(site)) return;
  Fiber* f = self();
  Worker* w = f->worker;
  if (w->arrived) {
    const Fiber* other = w->waiting[0];
    if (differ(other->place, site->place))
      fail(site->place, "__syncthreads, while other threads of the block wait at the one in %s:%d",
           other->place.file, other->place.line);
  }
  void* key = w->block_key(w->generation & 1);
  order_release(key);
  f->place = site->place;
  w->waiting[w->arrived++] = f;
  if (w->arrived == w->alive)
    finish_barrier(w, f);
  else
    wait(f, site->name, site->place);
  order_acquire(key);
}

}  // namespace emulator
