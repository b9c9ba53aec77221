// Launchers of the CUDA kernels, one for each. `dtype` is that of the features; nothing is allocated, nothing
// waits.
#pragma once

#include "cuda/params.h"

namespace dsts::cuda {

void semhash(const SemhashParams&, bool backward, int dtype, void* stream);
void tap_sums(const TapSumsParams&, int taps, int dtype, void* stream);
void group_samples(const GroupParams&, void* stream);
void list_channels(const ListParams&, void* stream);
void gather_panel(const GatherPanelParams&, int dtype, void* stream);
void route_and_gather(const RouteParams&, int dtype, void* stream);
void pack_filters(const FilterParams&, int slots, int from_dtype, int to_dtype, void* stream);
void unpack_filters(const FilterParams&, int neurons, int dtype, void* stream);

// `tf32` multiplies float32 in tensor cores (sm_80 and later), else it is exact.
void conv(const ConvParams&, bool by_output, int dtype, bool tf32, int capability, void* stream);
void data_gradient(const DataGradientParams&, int dtype, bool tf32, int capability, void* stream);
void weight_gradient(const WeightGradientParams&, int dtype, bool tf32, int capability, void* stream);

}  // namespace dsts::cuda
