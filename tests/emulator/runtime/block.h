// Runs CUDA kernels on the CPU: every thread of a block is a fiber with its own stack, all of a block on one
// OS thread, a worker, switched only where the kernel waits. Blocks are taken in random order by a few
// workers. The runtime is compiled without instrumentation in every flavour: its own accesses to other
// threads' data (and its locks, taken outside fibers) are no events.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <atomic>
#include <utility>
#include <vector>

#include "emulator.h"
#include "fiber.h"
#include "warp.h"

namespace emulator {

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kCopies = 256;  // a thread's copies in flight
constexpr unsigned kCrews = 2;

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  size_t below(size_t n) { return size_t((unsigned __int128)(next()) * n >> 64); }
  template <class T>
  void shuffle(T* data, size_t n) {
    for (size_t i = n; i > 1; --i) std::swap(data[i - 1], data[below(i)]);
  }
};

struct Worker;

struct Fiber : Thread {
  Context context;
  Worker* worker;
  char* stack;
  unsigned slot;  // index in the block
  bool exited;
  // Where it waits, null when it runs or can run.
  const char* waits_at;
  Place place;
  // Its part in a warp operation.
  uint32_t value, result;
  int source;
  struct {
    float* d;
    const void *a, *b;
    const float* c;
    int depth;
  } product;
  // Asynchronous copies, a ring.
  Copy copies[kCopies];
  unsigned copies_begin, copies_end, open_group;
  Place copy_place;
  // Fences.
  bool releases_next;
  void* last_atomic;
};

struct Launch {
  const void* kernel;
  Invoke invoke;
  void* params;
  Index grid, block;
  size_t shared_bytes;
  unsigned threads;
  uint64_t seed;
  std::vector<uint32_t> order;
  std::atomic<size_t> next{0};
  void* end_key;  // what orders the host after the threads
};

// One OS thread's stacks and the block it runs.
struct Worker {
  Fiber* fibers = nullptr;  // kMaxThreads of them
  char* stacks = nullptr;
  unsigned prepared = 0;
  Context main;
  Launch* launch = nullptr;
  Random random{0};

  // The block.
  unsigned threads = 0, alive = 0;
  std::vector<Fiber*> ready;  // a ring of kMaxThreads
  unsigned ready_begin = 0, ready_end = 0;
  std::vector<Fiber*> waiting;  // at the block barrier
  unsigned arrived = 0, generation = 0;
  Warp warps[kMaxThreads / 32];
  uint64_t* keys = nullptr;
  uint64_t start_key = 0;  // orders threads after the worker, and so after the host that made it

  void* crews[kCrews][kMaxThreads] = {};
  unsigned blocks_run = 0;  // in this launch

  Worker();
  void run(Launch* of);
  void run_block(uint32_t index);
  void hire(Fiber& f, unsigned crew);
  void make_ready(Fiber* f) {
    f->waits_at = nullptr;
    ready[ready_end++ % kMaxThreads] = f;
  }
  void* block_key(unsigned parity) { return &keys[parity]; }
  void* meeting_key(unsigned warp, unsigned slot, unsigned parity) {
    return &keys[2 + (warp * 32 + slot) * 2 + parity];
  }
};

inline bool differ(const char* a, const char* b) { return a != b && strcmp(a, b) != 0; }
inline bool differ(Place a, Place b) { return a.line != b.line || differ(a.file, b.file); }

inline Fiber* self() { return static_cast<Fiber*>(current); }
inline unsigned lane_of(const Fiber* f) { return f->slot % 32; }

[[noreturn]] void report_deadlock(Worker* w);

// Runs the next fiber that can run, or the worker's main flow once all have exited.
inline void leave(Worker* w, Fiber* f) {
  if (w->ready_begin != w->ready_end) {
    Fiber* next = w->ready[w->ready_begin++ % kMaxThreads];
    current = next;
    jump(f->context, next->context, f->exited);
  } else if (w->alive == 0) {
    jump(f->context, w->main, true);
  } else {
    report_deadlock(w);
  }
}

inline void wait(Fiber* f, const char* name, Place place) {
  f->waits_at = name;
  f->place = place;
  leave(f->worker, f);
}

}  // namespace emulator
