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
    int64_t at, owed;     /* how far all have come, and how many bytes more were wanted */
} OvFetch;

/* `bytes` more of what there still is to ask for, in whole lines of all stretches: counting line by line took up to
 * a tenth of a step. */
OV_INLINE void ov_fetch(OvFetch *fetch, int64_t bytes) {
    fetch->owed += bytes;
    for (; fetch->owed > 0 && fetch->at < fetch->bytes; fetch->owed -= 64 * fetch->count, fetch->at += 64)
        for (int64_t i = 0; i < fetch->count; i++) _mm_prefetch(fetch->stretches[i] + fetch->at, _MM_HINT_T1);
}

#endif
