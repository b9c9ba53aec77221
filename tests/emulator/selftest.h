// The emulator's own test kernels, as functions of host memory.
#pragma once

namespace selftest {

// out[b] = the sum of block b's `threads` values; `beyond` reads that many values past the end of shared
// memory, `beyond_input` past the end of x.
int block_sum(const float* x, float* out, int blocks, int threads, int beyond, int beyond_input);
// Each warp's sum by shuffles, and a ballot of the positive ones.
int warp_sum(const float* x, float* out, unsigned* ballots, int warps);
// The sum of all values, by the block that arrives last.
int last_block_sum(const float* x, float* partial, int* counter, float* out, int blocks);
// out = 2 x, through shared memory filled by asynchronous copies, two chunks in flight; `keep` is what the
// waits leave in flight.
int double_buffer(const float* x, float* out, int chunks, int keep);
// d = a b, 16 x depth and depth x 16, of kind 0 (half), 1 (bfloat16) or 2 (tf32).
int product(const void* a, const void* b, float* d, int kind, int depth, int a_by_column, int b_by_column,
            int d_by_column, int repeat);
// c += a b by mma.sync.m8n8k4: [32][4] halves of either operand and [32][8] floats, by lane.
int quads(const void* a, const void* b, float* c, int a_by_row, int b_by_column);
// What ldmatrix gives 32 lanes, four registers each, of as many rows of 16 bytes; with rows `offset` bytes
// further, and by the first `lanes` only.
int matrices(const unsigned char* rows, unsigned* out, int turned, int offset, int lanes);
// mma.sync of each lane's registers, over so many bytes of K; kinds as above.
int fragment_product(const unsigned* a, const unsigned* b, const float* c, float* out, int kind,
                     int depth_bytes);
// kind 0: half of the threads wait at another barrier; 1: at a shuffle; 2: one thread has left, and the rest
// go on.
int divergent(int kind, float* out);
int round_trip(const float* x, float* halves, float* bfloats, int n);
int misaligned_product(const void* a, int offset, int stride);
int bare(int blocks, int threads, int shared_bytes, int allowed);
int barriers(int blocks, int threads, int repeat);

}  // namespace selftest
