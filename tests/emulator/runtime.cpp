// Runs CUDA kernels on the CPU: every thread of a block is a fiber with its own stack, all of a block on one
// OS thread, switched only where the kernel waits. Blocks are taken in random order by a few OS threads.
// The sanitizers are told of fibers, and ThreadSanitizer of exactly the order that CUDA promises, so what
// it reports does not depend on the schedule. This file is compiled without instrumentation in every
// flavour: its own accesses to other threads' data (and its locks, taken outside fibers) are no events.
#include "runtime.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "emulator.h"

#ifndef __x86_64__
#  include <ucontext.h>
#endif

#ifdef EMULATOR_THREAD
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
}
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

#ifdef EMULATOR_ADDRESS
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
}
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

namespace emulator {

__thread Thread* current __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

constexpr size_t kPage = 4096;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kCopies = 256;  // a thread's copies in flight
constexpr unsigned kCrews = 2;
constexpr size_t kDefaultShared = 48 << 10;
constexpr int kSharedLimit = (EMULATOR_ARCH >= 800 ? 163 : 96) << 10;

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

// ThreadSanitizer's view. What a fiber acquires from an address is what others released there before.
void order_release([[maybe_unused]] void* key) {
#ifdef EMULATOR_THREAD
  __tsan_release(key);
#endif
}
void order_acquire([[maybe_unused]] void* key) {
#ifdef EMULATOR_THREAD
  __tsan_acquire(key);
#endif
}
// While one of these lives, memory handed out or back counts as never touched.
struct Untouched {
#ifdef EMULATOR_THREAD
  Untouched() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__); }
  ~Untouched() { AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
#else
  ~Untouched() {}
#endif
};

// Where a flow of control stands while it does not run.
struct Context {
#ifdef __x86_64__
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
  void* sanitizer_fiber = nullptr;
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

// Lanes of a warp that wait for one another; found by the lowest lane of the mask.
struct Meeting {
  const char* name = nullptr;
  unsigned mask = 0, arrived = 0, generation = 0;
  void (*finish)(Fiber* first_lane, unsigned lanes) = nullptr;
};

struct Warp {
  Fiber* lanes = nullptr;
  unsigned alive = 0;
  Meeting meetings[32];
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

// Settings, and the sites met so far. A spin lock, since a lock that ThreadSanitizer sees would order the
// threads that take it.
struct SpinLock {
  std::atomic_flag flag = ATOMIC_FLAG_INIT;
  void lock() {
    while (flag.test_and_set(std::memory_order_acquire)) {
    }
  }
  void unlock() { flag.clear(std::memory_order_release); }
};
SpinLock sites_lock, atomics_lock;
std::vector<Site*> sites;
std::vector<std::pair<std::string, int>> skipped_barriers, skipped_fences;
std::atomic<unsigned> epoch{1};
std::atomic<bool> warp_operations_order{false}, fresh_threads{false};

std::mutex host_lock;
std::vector<Worker*> idle_workers;
std::map<const void*, int> shared_limits;
uint64_t seed_value = 0, launches = 0;
int worker_count = 2;

bool is_fence(const Site& site) { return strcmp(site.name, "__threadfence") == 0; }

bool ends_with(const std::string& text, const std::string& suffix) {
  return text.size() >= suffix.size() &&
         text.compare(text.size() - suffix.size(), suffix.size(), suffix) == 0;
}

// Outside the fast path, so that it stays small.
__attribute__((noinline)) void look_up(Site* site) {
  std::lock_guard<SpinLock> hold(sites_lock);
  if (site->epoch == epoch) return;
  if (std::find(sites.begin(), sites.end(), site) == sites.end()) sites.push_back(site);
  bool skip = false;
  for (const auto& [file, line] : is_fence(*site) ? skipped_fences : skipped_barriers)
    skip |= line == site->place.line && ends_with(site->place.file, file);
  __atomic_store_n(&site->skipped, skip, __ATOMIC_RELAXED);
  __atomic_store_n(&site->epoch, epoch.load(), __ATOMIC_RELEASE);
}

bool is_skipped(Site* site) {
  if (__atomic_load_n(&site->epoch, __ATOMIC_ACQUIRE) != epoch.load(std::memory_order_relaxed)) look_up(site);
  return __atomic_load_n(&site->skipped, __ATOMIC_RELAXED);
}

bool differ(const char* a, const char* b) { return a != b && strcmp(a, b) != 0; }
bool differ(Place a, Place b) { return a.line != b.line || differ(a.file, b.file); }

Fiber* self() { return static_cast<Fiber*>(current); }

// Switching.

#ifdef __x86_64__
// Saves what the calling convention says a function keeps, and takes up the other stack. (The rounding
// mode and the like are the same everywhere.)
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
#endif

void enter_fiber();

void jump(Context& from, Context& to, [[maybe_unused]] bool for_good) {
#ifdef EMULATOR_ADDRESS
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack_bottom, to.stack_bytes);
#endif
#ifdef EMULATOR_THREAD
  __tsan_switch_to_fiber(to.sanitizer_fiber, 1);  // 1: orders nothing
#endif
#ifdef __x86_64__
  emulator_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
#ifdef EMULATOR_ADDRESS
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void start_at(Context& context, char* stack, unsigned slot) {
  // Stacks lie a multiple of the page size apart; tops at the same offset would share a few cache sets.
  char* top = stack + kStackBytes - (slot * 320u) % 4096u;
  top = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(63));
  context.stack_bottom = stack;
  context.stack_bytes = kStackBytes;
  context.fake_stack = nullptr;
#ifdef __x86_64__
  auto** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(&enter_fiber);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  context.stack_pointer = sp;
#else
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack;
  context.registers.uc_stack.ss_size = size_t(top - stack);
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, &enter_fiber, 0);
#endif
}

[[noreturn]] void report_deadlock(Worker* w) {
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

// Runs the next fiber that can run, or the worker's main flow once all have exited.
void leave(Worker* w, Fiber* f) {
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

void wait(Fiber* f, const char* name, Place place) {
  f->waits_at = name;
  f->place = place;
  leave(f->worker, f);
}

// Barriers.

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

unsigned lane_of(const Fiber* f) { return f->slot % 32; }

void finish_meeting(Worker* w, Warp& warp, Meeting& meeting, Fiber* except) {
  const unsigned lanes = meeting.arrived;
  meeting.arrived = 0;
  ++meeting.generation;
  if (meeting.finish) meeting.finish(warp.lanes, lanes);
  for (unsigned rest = lanes; rest; rest &= rest - 1) {
    Fiber* f = warp.lanes + __builtin_ctz(rest);
    if (f != except) w->make_ready(f);
  }
}

// Waits for the lanes of `mask` that have not exited; the last one runs `finish`.
void meet(Fiber* f, const char* name, unsigned mask, Place place, bool orders,
          void (*finish)(Fiber*, unsigned)) {
  Worker* w = f->worker;
  Warp& warp = w->warps[f->slot / 32];
  const unsigned bit = 1u << lane_of(f);
  if (!(mask & bit)) fail(place, "%s: the calling lane %u is not in the mask %#x", name, lane_of(f), mask);
  const unsigned slot = unsigned(__builtin_ctz(mask));
  Meeting& meeting = warp.meetings[slot];
  if (meeting.arrived && (meeting.mask != mask || differ(meeting.name, name)))
    fail(place, "%s with mask %#x, while other lanes of the warp are at %s with mask %#x", name, mask,
         meeting.name, meeting.mask);
  meeting.name = name;
  meeting.mask = mask;
  meeting.finish = finish;
  meeting.arrived |= bit;
  // Two keys in turn: a lane may be at the next meeting before a slower one has left this one.
  void* key = nullptr;
  if (kThreadSanitizer && (orders || warp_operations_order.load(std::memory_order_relaxed)))
    key = w->meeting_key(f->slot / 32, slot, meeting.generation & 1);
  if (key) order_release(key);
  if (meeting.arrived == (mask & warp.alive))
    finish_meeting(w, warp, meeting, f);
  else
    wait(f, name, place);
  if (key) order_acquire(key);
}

void exit_thread(Fiber* f) {
  Worker* w = f->worker;
  if (f->copies_begin != f->copies_end)
    fail(f->copy_place, "__pipeline_memcpy_async: %u copies of a thread were never waited for",
         f->copies_end - f->copies_begin);
  order_release(w->launch->end_key);
  f->exited = true;
  --w->alive;
  Warp& warp = w->warps[f->slot / 32];
  warp.alive &= ~(1u << lane_of(f));
  for (Meeting& meeting : warp.meetings)
    if (meeting.arrived && meeting.arrived == (meeting.mask & warp.alive))
      finish_meeting(w, warp, meeting, nullptr);
  if (w->arrived && w->arrived == w->alive) finish_barrier(w, nullptr);
}

void enter_fiber() {
#ifdef EMULATOR_ADDRESS
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  Fiber* f = self();
  const Launch* launch = f->worker->launch;
  order_acquire(&f->worker->start_key);
  launch->invoke(launch->kernel, launch->params);
  exit_thread(f);
  leave(f->worker, f);
  __builtin_unreachable();
}

// Running blocks.

Worker* take_worker() {
  std::lock_guard<std::mutex> hold(host_lock);
  if (!idle_workers.empty()) {
    Worker* w = idle_workers.back();
    idle_workers.pop_back();
    return w;
  }
  auto* w = new Worker;
  w->fibers = static_cast<Fiber*>(
      mmap(nullptr, kMaxThreads * sizeof(Fiber), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  w->stacks = static_cast<char*>(mmap(nullptr, kMaxThreads * (kStackBytes + kPage), PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (w->fibers == MAP_FAILED || w->stacks == MAP_FAILED) fail(Place::here(), "out of memory");
  w->ready.resize(kMaxThreads);
  w->waiting.resize(kMaxThreads);
  return w;
}

// Forgets what was done to a stack: another thread will use it that is not ordered after this one.
#ifdef EMULATOR_THREAD
void forget_stack(char* stack) {
  unsigned char resident[kStackBytes / kPage];
  if (mincore(stack, kStackBytes, resident) != 0) return;
  size_t first = 0;
  while (first < sizeof resident && !(resident[first] & 1)) ++first;
  if (first < sizeof resident)
    mmap(stack + first * kPage, kStackBytes - first * kPage, PROT_READ | PROT_WRITE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}
#endif

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
    start_at(f.context, f.stack, i);
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
#ifdef EMULATOR_ADDRESS
  pthread_attr_t attributes;
  void* bottom = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &bottom, &main.stack_bytes);
  pthread_attr_destroy(&attributes);
  main.stack_bottom = bottom;
#endif
#ifdef EMULATOR_THREAD
  main.sanitizer_fiber = __tsan_get_current_fiber();
#endif
  for (size_t i; (i = launch->next.fetch_add(1)) < launch->order.size();) run_block(launch->order[i]);
}

}  // namespace

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

void warp_barrier(Site* site, unsigned mask) {
  if (!is_skipped(site)) meet(self(), site->name, mask, site->place, true, nullptr);
}

void fence(Site* site) {
  if (is_skipped(site)) return;
  Fiber* f = self();
  if (f->last_atomic) order_acquire(f->last_atomic);
  f->releases_next = true;
}

// A release has to cover the atomic operation itself (whoever comes last may reset a counter), and must be
// seen by all who find its result; so for ThreadSanitizer the two are one step.
void before_atomic(const void* address) {
  self()->last_atomic = const_cast<void*>(address);
  if (kThreadSanitizer) atomics_lock.lock();
}

void after_atomic() {
  Fiber* f = self();
  if (f->releases_next) order_release(f->last_atomic);
  f->releases_next = false;
  if (kThreadSanitizer) atomics_lock.unlock();
}

int lane() { return int(lane_of(self())); }

uint32_t shuffle(const char* name, unsigned mask, uint32_t value, int source, Place place) {
  Fiber* f = self();
  f->value = value;
  f->source = source;
  meet(f, name, mask, place, false, [](Fiber* lanes, unsigned here) {
    for (unsigned rest = here; rest; rest &= rest - 1) {
      Fiber& f = lanes[__builtin_ctz(rest)];
      // What a lane gets that reads one which does not take part is undefined.
      f.result = here >> f.source & 1 ? lanes[f.source].value : 0xFFFFFFFFu;
    }
  });
  return f->result;
}

unsigned vote(const char* name, Vote vote, unsigned mask, bool predicate, Place place) {
  Fiber* f = self();
  f->value = predicate;
  meet(f, name, mask, place, false, [](Fiber* lanes, unsigned here) {
    unsigned votes = 0;
    for (unsigned rest = here; rest; rest &= rest - 1)
      votes |= lanes[__builtin_ctz(rest)].value << __builtin_ctz(rest);
    for (unsigned rest = here; rest; rest &= rest - 1) {
      lanes[__builtin_ctz(rest)].result = votes;
      lanes[__builtin_ctz(rest)].value = here;
    }
  });
  switch (vote) {
    case Vote::kBallot:
      return f->result;
    case Vote::kAny:
      return f->result != 0;
    default:
      return f->result == f->value;
  }
}

namespace {
void require_whole_warp(const char* name, Place place) {
  const Fiber* f = self();
  const unsigned alive = f->worker->warps[f->slot / 32].alive;
  if (alive != ~0u) fail(place, "%s needs all 32 lanes, here are only %#x", name, alive);
}
}  // namespace

void meet_at_matrix(const char* name, const void* matrix, unsigned stride, size_t element_size, Place place) {
  require_whole_warp(name, place);
  if (reinterpret_cast<uintptr_t>(matrix) % 32 != 0)
    fail(place, "%s: the pointer %p is not 32-byte aligned", name, matrix);
  if (stride * element_size % 16 != 0)
    fail(place, "%s: the leading dimension %u is not a multiple of 16 bytes", name, stride);
  Fiber* f = self();
  f->product.a = matrix;
  f->product.depth = int(stride);
  f->place = place;
  meet(f, name, ~0u, place, false, [](Fiber* lanes, unsigned) {
    for (int i = 1; i < 32; ++i)
      if (lanes[i].product.a != lanes[0].product.a || lanes[i].product.depth != lanes[0].product.depth)
        fail(lanes[i].place, "lanes of a warp ask for different matrices or leading dimensions");
  });
}

namespace {

float widened(uint16_t h) {  // half to float, see cuda_fp16.h
  const uint32_t w = uint32_t(h) << 16, twice = w + w;
  const uint32_t scaled = (twice >> 4) + (0xE0u << 23), offset = (twice >> 17) | (126u << 23);
  float normal, subnormal;
  memcpy(&normal, &scaled, 4);
  memcpy(&subnormal, &offset, 4);
  normal *= 0x1p-112f;
  subnormal -= 0.5f;
  uint32_t a, b;
  memcpy(&a, &normal, 4);
  memcpy(&b, &subnormal, 4);
  const uint32_t bits = (w & 0x80000000u) | (twice < (1u << 27) ? b : a);
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

#ifdef __x86_64__
#  define EMULATOR_CLONES __attribute__((target_clones("avx2", "default"), optimize("O3")))
#else
#  define EMULATOR_CLONES
#endif

// The values of a matrix whose elements lie in a row, whatever lanes they came from.
EMULATOR_CLONES void widen_halves(const uint16_t* __restrict__ in, float* __restrict__ out) {
  for (int i = 0; i < 256; ++i) out[i] = widened(in[i]);
}
EMULATOR_CLONES void widen_bfloats(const uint16_t* __restrict__ in, float* __restrict__ out) {
  for (int i = 0; i < 256; ++i) {
    const uint32_t bits = uint32_t(in[i]) << 16;
    memcpy(out + i, &bits, 4);
  }
}

EMULATOR_CLONES void product_16x16(const float* __restrict__ a, const float* __restrict__ b,
                                   float* __restrict__ c, int depth) {
  typedef float Row __attribute__((vector_size(32), aligned(32)));
  for (int i = 0; i < 16; i += 2) {
    auto* row = reinterpret_cast<Row*>(c + i * 16);
    Row c00 = row[0], c01 = row[1], c10 = row[2], c11 = row[3];
    for (int k = 0; k < depth; ++k) {
      const auto* other = reinterpret_cast<const Row*>(b + k * 16);
      const float x = a[i * depth + k], y = a[(i + 1) * depth + k];
      c00 += x * other[0], c01 += x * other[1];
      c10 += y * other[0], c11 += y * other[1];
    }
    row[0] = c00, row[1] = c01, row[2] = c10, row[3] = c11;
  }
}

template <Operand kOperand>
void multiply_shares(Fiber* lanes, unsigned) {
  constexpr int kDepth = kOperand == Operand::kTf32 ? 8 : 16;
  alignas(32) float a[256], b[256], c[256];
  if constexpr (kOperand == Operand::kTf32) {
    uint32_t bits[2][16 * kDepth];
    for (int i = 0; i < 32; ++i) {
      memcpy(bits[0] + i * 4, lanes[i].product.a, 16);
      memcpy(bits[1] + i * 4, lanes[i].product.b, 16);
    }
    for (auto& matrix : bits)  // the device takes the leading bits of what it gets
      for (uint32_t& x : matrix) x &= 0xFFFFE000u;
    memcpy(a, bits[0], sizeof bits[0]);
    memcpy(b, bits[1], sizeof bits[1]);
  } else {
    uint16_t bits[2][256];
    for (int i = 0; i < 32; ++i) {
      memcpy(bits[0] + i * 8, lanes[i].product.a, 16);
      memcpy(bits[1] + i * 8, lanes[i].product.b, 16);
    }
    const auto widen = kOperand == Operand::kHalf ? widen_halves : widen_bfloats;
    widen(bits[0], a);
    widen(bits[1], b);
  }
  for (int i = 0; i < 32; ++i) memcpy(c + i * 8, lanes[i].product.c, 32);
  product_16x16(a, b, c, kDepth);
  for (int i = 0; i < 32; ++i) memcpy(lanes[i].product.d, c + i * 8, 32);
}

}  // namespace

void multiply(Operand operand, int depth, float* d, const void* a, const void* b, const float* c,
              Place place) {
  require_whole_warp("mma_sync", place);
  Fiber* f = self();
  f->product = {d, a, b, c, depth};
  switch (operand) {
    case Operand::kHalf:
      return meet(f, "mma_sync", ~0u, place, false, multiply_shares<Operand::kHalf>);
    case Operand::kBFloat16:
      return meet(f, "mma_sync", ~0u, place, false, multiply_shares<Operand::kBFloat16>);
    case Operand::kTf32:
      return meet(f, "mma_sync", ~0u, place, false, multiply_shares<Operand::kTf32>);
  }
}

void queue_copy(void* to, const void* from, size_t size, size_t zeros, Place place) {
  Fiber* f = self();
  const char* name = "__pipeline_memcpy_async";
  if (size != 4 && size != 8 && size != 16) fail(place, "%s: cannot copy %zu bytes", name, size);
  if (zeros > size) fail(place, "%s: %zu zeros in %zu bytes", name, zeros, size);
  if (reinterpret_cast<uintptr_t>(to) % size || reinterpret_cast<uintptr_t>(from) % size)
    fail(place, "%s: %p or %p is not %zu-byte aligned", name, to, from, size);
  const auto* target = static_cast<unsigned char*>(to);
  if (target < f->shared || target + size > f->shared + f->worker->launch->shared_bytes)
    fail(place, "%s: the destination is outside shared memory", name);
  if (f->copies_end - f->copies_begin == kCopies) fail(place, "%s: too many copies in flight", name);
  f->copies[f->copies_end++ % kCopies] = {to, from, unsigned(size - zeros), unsigned(zeros), f->open_group};
  f->copy_place = place;
}

void commit_copies() { ++self()->open_group; }

bool next_copy(unsigned keep, Copy* copy) {
  Fiber* f = self();
  if (f->copies_begin == f->copies_end) return false;
  const Copy& next = f->copies[f->copies_begin % kCopies];
  if (next.group + keep >= f->open_group) return false;
  *copy = next;
  ++f->copies_begin;
  return true;
}

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
  int workers;
  {
    std::lock_guard<std::mutex> hold(host_lock);
    const auto limit = shared_limits.find(kernel);
    if (shared_bytes >
        (limit == shared_limits.end() ? kDefaultShared : std::max(kDefaultShared, size_t(limit->second))))
      return Error::kInvalidValue;
    l.seed = Random{seed_value * 0x2545F4914F6CDD1Du + launches++}.next();
    workers = worker_count;
  }
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

  std::vector<std::pair<std::thread, Worker*>> running;
  for (size_t i = 0; i < std::min(size_t(workers), l.order.size()); ++i) {
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

// Settings.

void set_seed(uint64_t value) {
  std::lock_guard<std::mutex> hold(host_lock);
  seed_value = value;
  launches = 0;
}
void set_workers(int count) {
  std::lock_guard<std::mutex> hold(host_lock);
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
