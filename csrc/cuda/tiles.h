// Sizes of tiles, each stated once: kernels, launchers, bindings (so Python) and benchmarks/compiled/bare
// count with these. A size that its users cannot take fails a static assertion, here or beside the code that
// needs it. Neither CUDA nor the standard library is needed to read it.
#pragma once

#ifdef __CUDACC__
#  define DSTS_BOTH_SIDES __host__ __device__
#else
#  define DSTS_BOTH_SIDES
#endif

namespace dsts::cuda {

constexpr int kVectorBytes = 16;  // that a lane moves at once
constexpr int kLineBytes = 128;   // of memory, and of all banks of shared memory

constexpr int kTile = 128;                          // positions, and outputs, of a tile of a product
constexpr int kKBlockBytes = 128;                   // of a K block: 64 channels of a half type, 32 of float32
constexpr int kSpatialTaps = 9, kTemporalTaps = 3;  // of the two operators, 1x3x3 and 3x1x1
constexpr int kMaxTaps = kSpatialTaps + kTemporalTaps;
constexpr int kMinKBlocks = 8;  // that a CTA of a split tile takes at least
constexpr int kMaxCtas = 1024;  // of a convolution
// Percent of a mean tile that the busiest CTA may have above the mean before tiles are shared; or always.
constexpr int kIdlePercent = 15, kAlwaysShare = -1;

constexpr int kGatherPositions = 64;  // that a gathering CTA takes at a time, at most
constexpr int kGatherBytes = 16384;   // of positions with all their channels that it holds
constexpr int kMaxNeurons = 8192;     // a score or a mark of each lies in shared memory

static_assert(kTile == 128, "a warp has 64 by 64 of a tile, four warps share it");
static_assert(kKBlockBytes >= 64 && (kKBlockBytes & (kKBlockBytes - 1)) == 0,
              "a K block is a power of two, and whole steps of the main loop");
static_assert(kMinKBlocks >= 1 && kMaxCtas >= 1);
static_assert(kGatherPositions >= 1 && kGatherPositions * (kKBlockBytes + kVectorBytes) <= 48 * 1024,
              "a K block of the positions that a CTA gathers lies in shared memory that every chip has");
static_assert(kGatherBytes >= kVectorBytes, "no position fits");
static_assert(kGatherBytes / 2 < 65536, "a gather keeps numbers of channels in 16 bits");

// Products by compute capability times ten, as launchers need them of every chip. `exact` is float32 without
// tensor cores, `element` the bytes of an element in memory.

// Stages of the pipeline.
DSTS_BOTH_SIDES constexpr int stages_of(int capability, bool exact) {
  return capability < 80 ? 2 : exact ? 3 : 4;
}

// Whether operands lie in padded rows in shared memory; else their vectors are swizzled.
DSTS_BOTH_SIDES constexpr bool is_padded(int capability, bool exact) { return capability < 75 || exact; }

// Bytes of K that a step of the main loop takes.
DSTS_BOTH_SIDES constexpr int step_bytes(int capability, bool exact) {
  return is_padded(capability, exact) || capability >= 80 ? 64 : 32;
}

// Shared bytes of one operand's part of a step. Padding: a vector behind a row along K, else two.
DSTS_BOTH_SIDES constexpr int padded_bytes(int step, bool by_k, int element) {
  return by_k ? kTile * (step + kVectorBytes) : step / element * (kTile * element + 2 * kVectorBytes);
}
DSTS_BOTH_SIDES constexpr int operand_bytes(int capability, bool exact, bool by_k, int element) {
  const int step = step_bytes(capability, exact);
  return is_padded(capability, exact) ? padded_bytes(step, by_k, element) : kTile * step;
}

// Epilogues take a finished tile in parts: some of its columns as floats, and behind them sums of columns by
// tap. On sm_75 two CTAs have 64 KiB, so parts are half as wide.
DSTS_BOTH_SIDES constexpr int epilogue_columns(int capability) {
  return capability >= 75 && capability < 80 ? kTile / 4 : kTile / 2;
}
constexpr int kEpiloguePad = 4;  // floats behind a row
DSTS_BOTH_SIDES constexpr int epilogue_bytes(int capability) {
  return kTile * (epilogue_columns(capability) + kEpiloguePad) * static_cast<int>(sizeof(float));
}
constexpr int kMaxSumTaps = 9;
constexpr int kTapSumBytes = kTile * kMaxSumTaps * static_cast<int>(sizeof(float));

// Shared bytes of a product's operands or, afterwards, of its epilogue: the same memory.
DSTS_BOTH_SIDES constexpr int product_smem(int capability, bool exact, bool a_by_k, bool b_by_k,
                                           int element) {
  const int step =
      operand_bytes(capability, exact, a_by_k, element) + operand_bytes(capability, exact, b_by_k, element);
  const int operands = stages_of(capability, exact) * step;
  const int epilogue = epilogue_bytes(capability) + kTapSumBytes;
  return operands > epilogue ? operands : epilogue;
}

// Shared bytes of a convolution behind its operands: ConvSmem (conv.cu), and the schedule's integers, of
// which each thread has one.
constexpr int kConvSmemBytes = 192;
DSTS_BOTH_SIDES constexpr int schedule_bytes(int num_ctas, int threads) {
  return (3 * num_ctas + 1 + threads) * static_cast<int>(sizeof(int));
}

// KiB that a CTA of products in tensor cores takes at most, what the system takes of it included. A
// multiprocessor holds two where it has twice as much; conv.cu holds the kernel to it.
DSTS_BOTH_SIDES constexpr int product_smem_kib(int capability) {
  return capability < 75 ? 44 : capability < 80 ? 32 : 70;
}

}  // namespace dsts::cuda
