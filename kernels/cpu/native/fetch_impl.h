/* Asking memory for what will be read while something else is computed.
 *
 * Lines are asked for from several stretches in turn. What reads ahead in the processor does so a page at a time, and
 * several pages at once: two threads read 13 to 19 GB/s in one stream each where they read 24 to 32 in four. */
#ifndef OCTAVO_FETCH_IMPL_H
#define OCTAVO_FETCH_IMPL_H

#include "vec.h"

enum { OV_MOST_STRETCHES = 16 };

/* All zero: nothing to ask for. */
typedef struct {
    const char *stretches[OV_MOST_STRETCHES];
    int64_t count, bytes; /* stretches, and of each */
    int64_t turn, at;     /* the stretch whose turn it is, and how far all have come */
} OvFetch;

/* The next `bytes` of what there still is to ask for. */
OV_INLINE void ov_fetch(OvFetch *fetch, int64_t bytes) {
    for (; bytes > 0 && fetch->at < fetch->bytes; bytes -= 64) {
        _mm_prefetch(fetch->stretches[fetch->turn] + fetch->at, _MM_HINT_T1);
        if (++fetch->turn < fetch->count) continue;
        fetch->turn = 0;
        fetch->at += 64;
    }
}

#endif
