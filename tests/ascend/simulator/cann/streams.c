// Streams and events. A stream is a queue of copies, fills, records and waits.
//
// Normally a task runs when it is submitted. With ASCEND_SIMULATOR_LAZY=1 it runs as late as the program allows: when
// its stream, or an event recorded after it, is waited for. Whoever forgets to wait then sees old numbers every time,
// which a real device shows now and then. Signatures: CANN's acl_rt.h.
#define _GNU_SOURCE
#include "simulator.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

// Polling an event must come to an end, although nothing runs by itself: after so many questions it is waited for.
enum { PATIENCE = 1000 };

typedef struct stream stream;
typedef struct { stream *where; uint64_t ticket; double milliseconds; int questions; } event;
typedef enum { COPY, FILL, RECORD, WAIT } task_kind;
typedef struct task {
    task_kind kind;
    void *to;
    const void *from;
    size_t size;
    int value;
    event *recorded;
    stream *awaited;
    uint64_t ticket;  // of the awaited stream
    struct task *next;
} task;
struct stream { int device; uint64_t submitted, finished; task *first, *last; stream *next; };

static pthread_mutex_t lock;
static stream unnamed, *streams = &unnamed;  // torch_npu passes no stream for the default one of a device

__attribute__((constructor)) static void prepare(void) {
    pthread_mutexattr_t recursive;
    pthread_mutexattr_init(&recursive);
    pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&lock, &recursive);
}
static int lazy(void) {
    const char *value = getenv("ASCEND_SIMULATOR_LAZY");
    return value && *value == '1';
}
static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e3 + time.tv_nsec / 1e6;
}
static stream *named(void *given) { return given ? given : &unnamed; }

static void run_until(stream *s, uint64_t ticket) {
    while (s->finished < ticket && s->first) {
        task *t = s->first;
        // Taken off first: what it waits for may come back to this stream.
        s->first = t->next;
        if (!s->first) s->last = NULL;
        if (t->kind == COPY) memmove(t->to, t->from, t->size);
        if (t->kind == FILL) memset(t->to, t->value, t->size);
        if (t->kind == RECORD) t->recorded->milliseconds = now();
        if (t->kind == WAIT && t->awaited) run_until(t->awaited, t->ticket);
        s->finished++;
        free(t);
    }
}
static int submit(void *given, task content) {
    pthread_mutex_lock(&lock);
    stream *s = named(given);
    task *t = malloc(sizeof *t);
    *t = content;
    t->next = NULL;
    if (s->last) s->last->next = t; else s->first = t;
    s->last = t;
    s->submitted++;
    if (t->kind == RECORD) {
        t->recorded->where = s;
        t->recorded->ticket = s->submitted;
        t->recorded->questions = 0;
    }
    if (!lazy()) run_until(s, s->submitted);
    pthread_mutex_unlock(&lock);
    return OK;
}
void simulator_run_stream(void *given) {
    pthread_mutex_lock(&lock);
    stream *s = named(given);
    run_until(s, s->submitted);
    pthread_mutex_unlock(&lock);
}
void simulator_run_all(void) {
    pthread_mutex_lock(&lock);
    for (stream *s = streams; s; s = s->next) run_until(s, s->submitted);
    pthread_mutex_unlock(&lock);
}
static void run_event(event *e) {
    pthread_mutex_lock(&lock);
    if (e->where) run_until(e->where, e->ticket);
    pthread_mutex_unlock(&lock);
}
static int finished(event *e) {
    if (!e->where || e->where->finished >= e->ticket) return 1;
    if (++e->questions < PATIENCE) return 0;
    run_event(e);
    return 1;
}

int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *s) {
    return submit(s, (task){.kind = COPY, .to = to, .from = from, .size = size});
}
int aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t size, void *s) {
    return submit(s, (task){.kind = FILL, .to = to, .value = value, .size = size});
}

// Streams are never freed: events may still name them, and torch keeps 32 of a priority for ever.
int aclrtCreateStream(void **out) {
    stream *s = calloc(1, sizeof *s);
    s->device = simulator_device();
    pthread_mutex_lock(&lock);
    s->next = streams->next;
    streams->next = s;
    pthread_mutex_unlock(&lock);
    *out = s;
    return OK;
}
int aclrtCreateStreamWithConfig(void **out, uint32_t priority, uint32_t flags) { return aclrtCreateStream(out); }
int aclrtDestroyStream(void *s) { simulator_run_stream(s); return OK; }
int aclrtDestroyStreamForce(void *s) { return OK; }
int aclrtSynchronizeStream(void *s) { simulator_run_stream(s); return OK; }
int aclrtSynchronizeStreamWithTimeout(void *s, int32_t timeout) { return aclrtSynchronizeStream(s); }
int aclrtSynchronizeDevice(void) { simulator_run_all(); return OK; }
int aclrtSynchronizeDeviceWithTimeout(int32_t timeout) { return aclrtSynchronizeDevice(); }
int aclrtStreamGetId(void *s, int32_t *id) { *id = (int)((uintptr_t)s & 0x7fffffff); return OK; }
int aclrtStreamQuery(void *s, int *status) { *status = named(s)->finished < named(s)->submitted; return OK; }
int aclrtGetStreamOverflowSwitch(void *s, uint32_t *flag) { *flag = 0; return OK; }

int aclrtCreateEventExWithFlag(void **out, uint32_t flag) { *out = calloc(1, sizeof(event)); return OK; }
int aclrtCreateEventWithFlag(void **out, uint32_t flag) { return aclrtCreateEventExWithFlag(out, flag); }
int aclrtCreateEvent(void **out) { return aclrtCreateEventExWithFlag(out, 0); }
int aclrtDestroyEvent(void *e) { run_event(e); free(e); return OK; }
int aclrtRecordEvent(void *e, void *s) { return e ? submit(s, (task){.kind = RECORD, .recorded = e}) : OK; }
int aclrtResetEvent(void *e, void *s) { return OK; }
int aclrtStreamWaitEvent(void *s, void *e) {
    return submit(s, (task){.kind = WAIT, .awaited = ((event *)e)->where, .ticket = ((event *)e)->ticket});
}
int aclrtSynchronizeEvent(void *e) { run_event(e); return OK; }
int aclrtQueryEventStatus(void *e, int *status) { *status = finished(e); return OK; }           // 1: complete
int aclrtQueryEventWaitStatus(void *e, int *status) { *status = !finished(e); return OK; }      // 0: complete
int aclrtEventElapsedTime(float *milliseconds, void *start, void *end) {
    run_event(start);
    run_event(end);
    *milliseconds = (float)(((event *)end)->milliseconds - ((event *)start)->milliseconds);
    return OK;
}
