// What the shadow CUDA headers in include/ ask of the runtime. Kernels are compiled by g++ with these
// headers in place of CUDA's; runtime/ runs every CUDA thread as a fiber. All that touches the kernel's own
// data (a copy, an atomic, a matrix load) is inline in the headers, where the sanitizers see it as the
// calling thread's access; all bookkeeping is in runtime/, which is never instrumented.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace emulator {

struct Index {
  unsigned x, y, z;
};

// What a kernel reads of its thread.
struct Thread {
  Index thread_index, block_index, block_size, grid_size;
  unsigned char* shared;
};
extern __thread Thread* current __attribute__((tls_model("initial-exec")));

inline unsigned char* dynamic_shared() { return current->shared; }

// Where a call was made, for messages: the last parameter of a function, filled in by the compiler.
struct Place {
  const char* file;
  int line;
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// A barrier or fence in the source, which a test may switch off. Constant-initialised: a guard variable
// would order the threads that pass it.
struct Site {
  const char* name;
  Place place;
  unsigned epoch;  // when `skipped` was looked up; 0 for never
  bool skipped;
};

void block_barrier(Site* site);
void warp_barrier(Site* site, unsigned mask = 0xFFFFFFFFu);
void fence(Site* site);

// Called around an atomic operation on `address`, which itself is relaxed.
void before_atomic(const void* address);
void after_atomic();

enum class Vote { kBallot, kAny, kAll };
uint32_t shuffle(const char* name, unsigned mask, uint32_t value, int source, Place place);
unsigned vote(const char* name, Vote vote, unsigned mask, bool predicate, Place place);
int lane();

// Waits for the warp and checks that all lanes ask for the same matrix and that it is aligned.
void meet_at_matrix(const char* name, const void* matrix, unsigned stride, size_t element_size, Place place);

enum class Operand { kHalf, kBFloat16, kTf32 };
// d = a * b + c for matrices of 16 x depth, depth x 16 and 16 x 16, each lane giving its share.
void multiply(Operand operand, int depth, float* d, const void* a, const void* b, const float* c,
              Place place);

// c += a * b as mma.sync.m8n8k4 has it for halves and sums in float: four products of 8 x 4 by 4 x 8, each
// lane giving four elements of either operand, by the layouts of the PTX ISA.
void multiply_quads(bool a_by_row, bool b_by_column, float* c, const void* a, const void* b,
                    Place place = Place::here());
// ldmatrix.x4: waits for the warp, each lane of which says where a row of 16 bytes of shared memory lies, and
// tells it where the rows lie that its four registers come from: one each or, turned round, two.
void meet_at_rows(const char* name, const unsigned char* row, bool turned, const unsigned char* (&from)[4][2],
                  Place place);
// mma.sync.m16n8k*: c += a b over 32 bytes of K, four registers of `a` and two of `b`, or over half of it.
void multiply_add(Operand operand, int depth_bytes, float (&c)[4], const unsigned* a, const unsigned* b,
                  Place place = Place::here(__builtin_FILE(), __builtin_LINE()));

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, zeros;  // bytes copied, and zeros written after them
  unsigned group;
};
void queue_copy(void* to, const void* from, size_t size, size_t zeros, Place place);
void commit_copies();
// Takes the next copy that a wait for all but the last `keep` groups has to make.
bool next_copy(unsigned keep, Copy* copy);

enum class Error { kNone, kInvalidValue, kInvalidConfiguration };
using Invoke = void (*)(const void* kernel, void* params);
Error launch(const void* kernel, Invoke invoke, void* params, Index grid, Index block, size_t shared_bytes);
Error allow_shared(const void* kernel, int bytes);

[[noreturn]] void fail(Place place, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace emulator
