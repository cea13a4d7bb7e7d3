// Runs a recorded list of kernels as one call, with the team of threads awake from the first to the last.

#include <time.h>

#include "simd.h"
#include "threads.h"

namespace {

struct Operation {
    int (*function)(const void* call);
    const void* call;
};

struct GraphCall {
    const Operation* operations;
    int64_t count, threads;
    int64_t* times;  // count + 1 of them: when each began, and when the last ended, in nanoseconds; or null
};

int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * int64_t(1000000000) + time.tv_nsec;
}

}  // namespace

// Returns 0, or what the first operation that failed returned; those behind it have not run then.
EXPORT int graph(const GraphCall* c) {
    Session session(int(c->threads));
    for (int64_t i = 0; i < c->count; ++i) {
        if (c->times) c->times[i] = now();
        if (int result = c->operations[i].function(c->operations[i].call)) return result;
    }
    if (c->times) c->times[c->count] = now();
    return 0;
}
