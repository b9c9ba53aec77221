// The schedule of csrc/cuda/schedule.h by itself, as a function of host memory.
#pragma once

namespace schedule {

// starts [num_ctas + 1] and dealt [1] of `samples` samples, whose tiles have lengths[b] iterations each,
// `per_sample` tiles.
int starts(const int* lengths, int* starts, int* dealt, int samples, int per_sample, int num_ctas, int waves,
           int idle_percent, int threads);

}  // namespace schedule
