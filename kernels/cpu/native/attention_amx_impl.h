/* The two products of attention in AMX tiles: 16 rows times 32 dimensions of q against 16 keys, and 16 rows times 32
 * weights against 16 dimensions of V. K and V are tiles as they lie in their blocks (attention.h).
 *
 * The rows of a tile are independent of one another, and what fills those beyond the last is never looked at.
 */
#ifndef OCTAVO_ATTENTION_AMX_IMPL_H
#define OCTAVO_ATTENTION_AMX_IMPL_H

#ifdef OV_AMX

#include "attention_softmax_impl.h"
#include "fetch_impl.h"

#define OV_TILE_ELEMENTS (16 * 32)

/* Scores of 16 rows of q (q_stride elements apart, padded with zeros to steps of 32 dimensions) against up to four
 * times sixteen keys; a NULL among them is left out. fetch: what to ask for meanwhile. last: the
 * room of the last 16 dimensions, where head_dim % 32 is 16. */
static void ov_amx_scores(const uint16_t *q, int64_t q_stride, const void *const *keys, OvFetch *fetch,
                          int64_t width, float *scores, uint16_t *last) {
    const uint16_t *from[4], *any = NULL;
    for (int i = 0; i < 4; i++)
        if (keys[i]) any = (const uint16_t *)keys[i];
    for (int i = 0; i < 4; i++) from[i] = keys[i] ? (const uint16_t *)keys[i] : any;
    OV_TILE_ZERO(0);
    OV_TILE_ZERO(1);
    OV_TILE_ZERO(2);
    OV_TILE_ZERO(3);
    for (int64_t d = 0; d < width; d += 32) {
        OV_TILE_LOAD(4, q + d, 2 * q_stride);
        const uint16_t *tiles[4];
        for (int i = 0; i < 4; i++) {
            tiles[i] = from[i] + d * OV_KEYS;
            if (width - d >= 32) continue;
            uint16_t *room = last + i * OV_TILE_ELEMENTS; /* its second half stays zero */
            memcpy(room, tiles[i], 16 * OV_KEYS * sizeof *room);
            tiles[i] = room;
        }
        ov_fetch(fetch, 1024);
        OV_TILE_LOAD(5, tiles[0], 64);
        OV_TILE_DOT(0, 4, 5);
        ov_fetch(fetch, 1024);
        OV_TILE_LOAD(6, tiles[1], 64);
        OV_TILE_DOT(1, 4, 6);
        ov_fetch(fetch, 1024);
        OV_TILE_LOAD(7, tiles[2], 64);
        OV_TILE_DOT(2, 4, 7);
        ov_fetch(fetch, 1024);
        OV_TILE_LOAD(5, tiles[3], 64);
        OV_TILE_DOT(3, 4, 5);
    }
    OV_TILE_STORE(0, scores, 4 * OV_CHUNK);
    OV_TILE_STORE(1, scores + 16, 4 * OV_CHUNK);
    OV_TILE_STORE(2, scores + 32, 4 * OV_CHUNK);
    OV_TILE_STORE(3, scores + 48, 4 * OV_CHUNK);
}

/* V of one step for up to 64 dimensions where it is not one run of 16 pairs in memory, or not all of its keys
 * [begin, end) of 32 may be looked at: a copy, zero outside of them. values: of the two halves of the step. */
static void ov_copy_values(uint16_t *to, const void *const *values, int64_t begin, int64_t end, int64_t width,
                           int64_t dims) {
    for (int64_t pair = 0; pair < 16; pair++) {
        uint32_t mask = 2 * pair >= begin && 2 * pair < end ? 0xFFFFu : 0;
        if (2 * pair + 1 >= begin && 2 * pair + 1 < end) mask |= 0xFFFF0000u;
        const uint16_t *from = (const uint16_t *)values[pair / 8];
        if (mask) from += pair % 8 * 2 * width;
        const __m512i kept = _mm512_set1_epi32((int)mask);
        for (int64_t d = 0; d < dims; d += 16) {
            __m512i pairs = mask ? _mm512_and_si512(_mm512_loadu_si512(from + 2 * d), kept) : _mm512_setzero_si512();
            _mm512_storeu_si512(to + pair * 128 + 2 * d, pairs);
        }
    }
}

/* A product with V: of which chunk, and which of its keys. */
typedef struct {
    const uint16_t *weights;    /* of 16 rows, 2 * OV_CHUNK elements apart */
    const void *const *values;  /* of every sixteen keys of the chunk */
    OvFetch *fetch;             /* what to ask for meanwhile */
    int64_t begin, end;         /* keys of the chunk that may be read */
    int64_t width;              /* head_dim */
    uint16_t *copy;             /* [16][64][2] */
} OvAmxValues;

/* V of step s, dimensions [d, d + dims): where it lies, and bytes from pair to pair. */
OV_INLINE const uint16_t *ov_amx_values_at(const OvAmxValues *v, int64_t s, int64_t d, int64_t dims, int64_t *stride) {
    const void *halves[2] = {v->values[2 * s], v->values[2 * s + 1]};
    int64_t begin = v->begin - s * OV_STEP, end = v->end - s * OV_STEP, half = 16 * v->width;
    if (begin <= 0 && end >= OV_STEP && (const uint16_t *)halves[0] + half == (const uint16_t *)halves[1]) {
        *stride = 4 * v->width;
        return (const uint16_t *)halves[0] + 2 * d;
    }
    for (int i = 0; i < 2; i++)
        if (halves[i]) halves[i] = (const uint16_t *)halves[i] + 2 * d;
    ov_copy_values(v->copy, halves, begin, end, v->width, dims);
    *stride = 256;
    return v->copy;
}

/* out [16][width] fp32 = weights . V over all keys of the chunk, in steps of 32. */
static void ov_amx_values(const OvAmxValues *v, float *out) {
    int64_t first = v->begin / OV_STEP, last = ov_ceil_div(v->end, OV_STEP), width = v->width;
    for (int64_t d = 0; d < width; d += 64) {
        int64_t dims = ov_min(64, width - d);
        OV_TILE_ZERO(0);
        OV_TILE_ZERO(1);
        OV_TILE_ZERO(2);
        OV_TILE_ZERO(3);
        for (int64_t s = first; s < last; s++) {
            int64_t stride;
            const uint16_t *from = ov_amx_values_at(v, s, d, dims, &stride);
            ov_fetch(v->fetch, 64 * dims);
            OV_TILE_LOAD(4, v->weights + s * OV_STEP, 4 * OV_CHUNK);
            OV_TILE_LOAD(5, from, stride);
            OV_TILE_DOT(0, 4, 5);
            if (dims > 16) {
                OV_TILE_LOAD(6, from + 32, stride);
                OV_TILE_DOT(1, 4, 6);
            }
            if (dims > 32) {
                OV_TILE_LOAD(7, from + 64, stride);
                OV_TILE_DOT(2, 4, 7);
            }
            if (dims > 48) {
                OV_TILE_LOAD(5, from + 96, stride);
                OV_TILE_DOT(3, 4, 5);
            }
        }
        OV_TILE_STORE(0, out + d, 4 * width);
        if (dims > 16) OV_TILE_STORE(1, out + d + 16, 4 * width);
        if (dims > 32) OV_TILE_STORE(2, out + d + 32, 4 * width);
        if (dims > 48) OV_TILE_STORE(3, out + d + 48, 4 * width);
    }
}

#endif
#endif
