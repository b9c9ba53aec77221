/* A stand-in for the driver library: every call that Triton makes succeeds at once, and nothing runs.
 * benchmarks.compiled.host_time builds it, to see what a call costs on the host alone. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { SHARED_MEMORY_OPTIN = 97, MULTIPROCESSORS = 16, SHARED_MEMORY = 81, MAX_THREADS_PER_BLOCK = 0 };

static long launches = 0;

long stand_in_launches(void) {
  long found = launches;
  launches = 0;
  return found;
}

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuGetErrorString(int error, const char** text) { return *text = "of a stand-in", 0; }
int cuDeviceGet(int* device, int index) { return *device = index, 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == SHARED_MEMORY_OPTIN ? 232448
           : attribute == SHARED_MEMORY     ? 233472
           : attribute == MULTIPROCESSORS   ? 132
                                            : 1024;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)1, 0; }
int cuCtxGetCurrent(void** context) { return *context = (void*)1, 0; }
int cuCtxSetCurrent(void* context) { return 0; }
int cuCtxGetLimit(size_t* value, int limit) { return *value = 1 << 20, 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuModuleLoadData(void** module, const void* image) { return *module = (void*)2, 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) { return *function = (void*)3, 0; }
int cuFuncGetAttribute(int* value, int attribute, void* function) {
  return *value = attribute == MAX_THREADS_PER_BLOCK ? 1024 : 0, 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void* function, int config) { return 0; }
int cuOccupancyMaxActiveClusters(int* clusters, void* function, const void* config) {
  return *clusters = 132, 0;
}
int cuPointerGetAttribute(void* data, int attribute, uint64_t address) {
  return *(uint64_t*)data = address, 0;
}
int cuTensorMapEncodeTiled(void* map, ...) { return memset(map, 0, 128), 0; }
int cuTensorMapEncodeIm2col(void* map, ...) { return 0; }
int cuLaunchKernelEx(const void* config, void* function, void** parameters, void** extra) {
  return launches++, 0;
}
