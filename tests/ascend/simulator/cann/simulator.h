// What the files of the stand-in CANN share.
#pragma once
#include <stddef.h>
#include <stdint.h>

// Error codes of acl_base_rt.h.
enum {
    OK = 0,
    NO_CONTEXT = 107002,
    UNSUPPORTED = 207000,
    OUT_OF_MEMORY = 207001,
    NOT_SIMULATED = 500002,
};

int simulator_device(void);                // the calling thread's device
void simulator_run_all(void);              // run what all streams hold
void simulator_run_stream(void *stream);   // run what one stream holds; Python calls it before it computes on the stream
