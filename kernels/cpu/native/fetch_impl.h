/* Asking memory for what will be read while something else is computed.
 *
 * How much comes at once depends on how lines are asked for. Mostly they are from several stretches in turn: what reads
 * ahead in the processor does so a page at a time and, on Intel, several pages at once (two threads of a Sapphire Rapids
 * read 13 to 19 GB/s in one stream each, 24 to 32 in four). On AMD (by its vendor string; the rest counts as Intel) they
 * are in order: few lines that a program asks for are under way at a time, and what the processor adds on its own,
 * seeing them in order, makes the difference (two threads of a Zen 5 read 27 GB/s in eight streams each, 34 in one; 47
 * without asking, where nothing is computed meanwhile). */
#ifndef OCTAVO_FETCH_IMPL_H
#define OCTAVO_FETCH_IMPL_H

#include "vec.h"

enum { OV_MOST_STRETCHES = 16 };

/* All zero: nothing to ask for. */
typedef struct {
    const char *stretches[OV_MOST_STRETCHES];
    int64_t count, bytes; /* stretches, and of each */
    int64_t together;     /* stretches that take turns */
    int64_t first, at;    /* stretches before `first` are done, those that take turns have come so far */
    int64_t owed;         /* bytes more that were wanted */
} OvFetch;

/* `bytes` more of what there still is to ask for, in whole lines of all stretches that take turns: counting line by line
 * took up to a tenth of a step. */
OV_INLINE void ov_fetch(OvFetch *fetch, int64_t bytes) {
    int64_t owed = fetch->owed + bytes;
    while (owed > 0 && fetch->first < fetch->count) {
        const char *const *stretches = fetch->stretches + fetch->first;
        const int64_t turns = ov_min(fetch->together, fetch->count - fetch->first), length = fetch->bytes;
        int64_t at = fetch->at;
        for (; owed > 0 && at < length; at += 64, owed -= 64 * turns) {
            _Pragma("GCC unroll 1") /* GCC unrolls it sixteen times, and the loop around it has no registers left */
            for (int64_t i = 0; i < turns; i++) _mm_prefetch(stretches[i] + at, _MM_HINT_T1);
        }
        if (at >= length) fetch->first += turns;
        fetch->at = at < length ? at : 0;
    }
    fetch->owed = owed;
}

#endif
