// Devices and their memory, on the host: what torch_npu asks of AscendCL besides streams. Signatures: CANN's acl_rt.h.
//
//   ASCEND_SIMULATOR_DEVICES     number of devices (default 2)
//   ASCEND_SIMULATOR_MEMORY_MB   memory of each (default 1024)
//   ASCEND_SIMULATOR_SOC         name of the chip (default Ascend910B2)
#include "simulator.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_DEVICES = 16, ALIGNMENT = 512 };
typedef struct { int device; } context;
typedef struct { size_t size; int device; } block_header;

static __thread int current_device = -1;
static context contexts[MOST_DEVICES];
static atomic_size_t used[MOST_DEVICES];

static long long setting(const char *name, long long otherwise) {
    const char *value = getenv(name);
    return value ? atoll(value) : otherwise;
}
static size_t capacity(void) { return (size_t)setting("ASCEND_SIMULATOR_MEMORY_MB", 1024) << 20; }
int simulator_device(void) { return current_device < 0 ? 0 : current_device; }

int aclInit(const char *config) { return OK; }
int aclFinalize(void) { return OK; }
int aclrtGetDeviceCount(uint32_t *count) { *count = setting("ASCEND_SIMULATOR_DEVICES", 2); return OK; }
int aclrtSetDevice(int32_t device) { current_device = device; return OK; }
int aclrtResetDevice(int32_t device) { return OK; }
int aclrtGetDevice(int32_t *device) { *device = simulator_device(); return current_device < 0 ? NO_CONTEXT : OK; }
int aclrtGetCurrentContext(void **out) {
    if (current_device < 0) return NO_CONTEXT;
    contexts[current_device].device = current_device;
    *out = &contexts[current_device];
    return OK;
}
int aclrtSetCurrentContext(void *given) {
    if (!given) return NO_CONTEXT;
    current_device = ((context *)given)->device;
    return OK;
}
int aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
    if (flags) *flags = 0;
    *active = 1;
    return OK;
}

const char *aclrtGetSocName(void) {
    const char *name = getenv("ASCEND_SIMULATOR_SOC");
    return name ? name : "Ascend910B2";
}
const char *aclGetRecentErrMsg(void) { return "(the simulator keeps no messages)"; }
int aclGetDeviceCapability(uint32_t device, int what, int64_t *value) { *value = 24; return OK; }
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t one, int32_t other) { *can = 1; return OK; }
int aclrtDeviceGetBareTgid(int32_t *process) { *process = 1; return OK; }
int aclrtSetDeviceSatMode(int mode) { return OK; }
int aclrtPeekAtLastError(int level) { return OK; }
int aclrtGetLastError(int level) { return OK; }
int aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return OK; }
int aclrtCtxGetSysParamOpt(int option, int64_t *value) { *value = 0; return OK; }
int aclrtPointerGetAttributes(const void *pointer, void *attributes) { memset(attributes, 0, 32); return OK; }
int aclSetCompileopt(int option, const char *value) { return OK; }
size_t aclGetCompileoptSize(int option) { return 32; }
int aclGetCompileopt(int option, char *value, size_t length) { strncpy(value, "disable", length); return OK; }

// Memory starts with bytes of ones, so that a number read before it is written is not a number.
int aclrtMalloc(void **out, size_t size, int policy) {
    int device = simulator_device();
    block_header *header = NULL;
    if (used[device] + size > capacity()) return OUT_OF_MEMORY;
    if (posix_memalign((void **)&header, ALIGNMENT, size + ALIGNMENT)) return OUT_OF_MEMORY;
    header->size = size;
    header->device = device;
    used[device] += size;
    *out = (char *)header + ALIGNMENT;
    memset(*out, 0xff, size);
    return OK;
}
int aclrtMallocAlign32(void **out, size_t size, int policy) { return aclrtMalloc(out, size, policy); }
int aclrtFree(void *block) {
    if (!block) return OK;
    simulator_run_all();
    block_header *header = (block_header *)((char *)block - ALIGNMENT);
    used[header->device] -= header->size;
    free(header);
    return OK;
}
int aclrtMallocHost(void **out, size_t size) { return posix_memalign(out, ALIGNMENT, size) ? OUT_OF_MEMORY : OK; }
int aclrtMallocHostWithCfg(void **out, uint64_t size, void *config) { return aclrtMallocHost(out, size); }
int aclrtFreeHost(void *block) { simulator_run_all(); free(block); return OK; }
int aclrtGetMemInfo(int kind, size_t *available, size_t *total) {
    *total = capacity();
    *available = capacity() - used[simulator_device()];
    return OK;
}
// Expandable segments are not simulated: torch_npu then takes blocks of a fixed size.
int aclrtReserveMemAddress(void **out, size_t size, size_t alignment, void *at, uint64_t flags) { return UNSUPPORTED; }
int aclrtMallocPhysical(void **out, size_t size, const void *properties, uint64_t flags) { return UNSUPPORTED; }

int aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind) { memmove(to, from, size); return OK; }
int aclrtMemset(void *to, size_t room, int32_t value, size_t size) { memset(to, value, size); return OK; }

// Kernels by name are not simulated: Python replaces the operators, and what it does not replace has to fail.
int aclopCompileAndExecute(void) { return NOT_SIMULATED; }
int aclopCompileAndExecuteV2(void) { return NOT_SIMULATED; }
