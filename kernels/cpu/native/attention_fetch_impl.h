/* Asking memory for K and V before their turn: V of a chunk while its K is computed with, and K of the next chunk, or of
 * the thread's next item, while V is.
 *
 * Lines are asked for from all stretches in turn. What reads ahead in the processor does so a page at a time, and several
 * pages at once: one stream of a thread reads at half the speed of four. */
#ifndef OCTAVO_ATTENTION_FETCH_IMPL_H
#define OCTAVO_ATTENTION_FETCH_IMPL_H

#include "attention.h"
#include "vec.h"

#define OV_CHUNK_KEYS (OV_CHUNK / OV_KEYS)

typedef struct {
    const char *stretches[OV_CHUNK_KEYS];
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
