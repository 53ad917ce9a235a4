/* The two products of attention in vector registers: q . k for sixteen keys in lanes, and weights . V for sixteen
 * dimensions in lanes. Up to eight rows share each load of K and V; every row is summed in the same order, dimensions
 * or keys one after another, so it does not matter which rows these are.
 */
#ifndef OCTAVO_ATTENTION_DOT_IMPL_H
#define OCTAVO_ATTENTION_DOT_IMPL_H

#include "attention_softmax_impl.h"

#ifdef __AVX512F__
#define OV_MOST_ROWS 8
#else
#define OV_MOST_ROWS 4 /* a V16 is two of sixteen registers */
#endif

/* Sixteen pairs of bf16, their first or second elements as fp32. */
#ifdef __AVX512F__
OV_INLINE V16 ov_pair_first(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
OV_INLINE V16 ov_pair_second(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xFFFF0000)));
}
typedef __m512i OvPairs;
OV_INLINE OvPairs ov_load_pairs(const uint16_t *p, uint32_t mask) {
    OvPairs pairs = _mm512_loadu_si512(p);
    return mask == UINT32_MAX ? pairs : _mm512_and_si512(pairs, _mm512_set1_epi32((int)mask));
}
#else
typedef struct {
    __m256i low, high;
} OvPairs;
OV_INLINE V16 ov_pair_first(OvPairs p) {
    return (V16){_mm256_castsi256_ps(_mm256_slli_epi32(p.low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(p.high, 16))};
}
OV_INLINE V16 ov_pair_second(OvPairs p) {
    const __m256i upper = _mm256_set1_epi32((int)0xFFFF0000);
    return (V16){_mm256_castsi256_ps(_mm256_and_si256(p.low, upper)),
                 _mm256_castsi256_ps(_mm256_and_si256(p.high, upper))};
}
OV_INLINE OvPairs ov_load_pairs(const uint16_t *p, uint32_t mask) {
    OvPairs pairs = {_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 16))};
    if (mask == UINT32_MAX) return pairs;
    const __m256i kept = _mm256_set1_epi32((int)mask);
    return (OvPairs){_mm256_and_si256(pairs.low, kept), _mm256_and_si256(pairs.high, kept)};
}
#endif

/* sums[r] += x[r][2i] * first + x[r][2i + 1] * second, over `count` pairs of vectors at `pairs`, `stride` elements from
 * one to the next. x holds bf16 (OV_PAIRS) or fp32 (OV_WIDE), x_stride elements from row to row. */
OV_INLINE void ov_dot_pairs(const void *x, int64_t x_stride, const uint16_t *pairs, int64_t stride, int64_t count,
                            uint32_t mask, V16 *sums, int rows, OvForm form) {
    for (int64_t i = 0; i < count; i++) {
        OvPairs both = ov_load_pairs(pairs + i * stride, mask);
#ifdef __AVX512BF16__
        if (form == OV_PAIRS) {
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                int pair;
                memcpy(&pair, (const uint16_t *)x + r * x_stride + 2 * i, 4);
                sums[r] = _mm512_dpbf16_ps(sums[r], (__m512bh)_mm512_set1_epi32(pair), (__m512bh)both);
            }
            continue;
        }
#endif
        (void)form;
        V16 first = ov_pair_first(both), second = ov_pair_second(both);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const float *at = (const float *)x + r * x_stride + 2 * i;
            sums[r] = v16_fma(v16_set(at[0]), first, sums[r]);
            sums[r] = v16_fma(v16_set(at[1]), second, sums[r]);
        }
    }
}

/* sums[r] += x[r][i] * vectors[i], all fp32. */
OV_INLINE void ov_dot_floats(const float *x, int64_t x_stride, const float *vectors, int64_t stride, int64_t count,
                             V16 *sums, int rows) {
    for (int64_t i = 0; i < count; i++) {
        V16 vector = v16_load(vectors + i * stride);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) sums[r] = v16_fma(v16_set(x[r * x_stride + i]), vector, sums[r]);
    }
}

/* What both products do for up to eight rows: vectors of 16 lanes at `vectors`, weighed by rows of x, added to rows of
 * `out` or put there. `count` counts vectors, or pairs of them. */
typedef struct {
    const void *x;
    int64_t x_stride; /* elements of x */
    const void *vectors;
    int64_t stride, count;
    uint32_t mask; /* of pairs: which of the two count */
    float *out;
    int64_t out_stride;
    int add;
} OvDot;

OV_INLINE void ov_dot_rows(const OvDot *dot, int first, int rows, uint32_t mask, OvForm form) {
    V16 sums[OV_MOST_ROWS];
    float *out = dot->out + first * dot->out_stride;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) sums[r] = dot->add ? v16_load(out + r * dot->out_stride) : v16_zero();
    const char *x = (const char *)dot->x + first * dot->x_stride * (form == OV_PAIRS ? 2 : 4);
    if (form == OV_FLOATS)
        ov_dot_floats((const float *)x, dot->x_stride, (const float *)dot->vectors, dot->stride, dot->count, sums,
                      rows);
    else
        ov_dot_pairs(x, dot->x_stride, (const uint16_t *)dot->vectors, dot->stride, dot->count, mask, sums, rows,
                     form);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) v16_store(out + r * dot->out_stride, sums[r]);
}

OV_INLINE void ov_dot_all_rows(const OvDot *dot, int rows, uint32_t mask, OvForm form) {
    int first = 0;
    for (; first + OV_MOST_ROWS <= rows; first += OV_MOST_ROWS) ov_dot_rows(dot, first, OV_MOST_ROWS, mask, form);
    switch (rows - first) {
#if OV_MOST_ROWS == 8
    case 7: ov_dot_rows(dot, first, 7, mask, form); break;
    case 6: ov_dot_rows(dot, first, 6, mask, form); break;
    case 5: ov_dot_rows(dot, first, 5, mask, form); break;
    case 4: ov_dot_rows(dot, first, 4, mask, form); break;
#endif
    case 3: ov_dot_rows(dot, first, 3, mask, form); break;
    case 2: ov_dot_rows(dot, first, 2, mask, form); break;
    case 1: ov_dot_rows(dot, first, 1, mask, form); break;
    default: break;
    }
}

static void ov_dot_f32(const OvDot *dot, int rows) { ov_dot_all_rows(dot, rows, UINT32_MAX, OV_FLOATS); }
static void ov_dot_bf16(const OvDot *dot, int rows) {
    if (dot->mask == UINT32_MAX) ov_dot_all_rows(dot, rows, UINT32_MAX, OV_BF16_FORM);
    else ov_dot_all_rows(dot, rows, dot->mask, OV_BF16_FORM);
}

/* Scores of `rows` rows of q (q_stride elements apart) against sixteen keys. */
OV_INLINE void ov_score_keys(const void *q, int64_t q_stride, const void *keys, int64_t width, float *scores, int rows,
                             OvForm form) {
    OvDot dot = {.x = q, .x_stride = q_stride, .vectors = keys, .out = scores, .out_stride = OV_CHUNK};
    dot.mask = UINT32_MAX;
    dot.stride = form == OV_FLOATS ? OV_KEYS : 2 * OV_KEYS;
    dot.count = form == OV_FLOATS ? width : width / 2;
    if (form == OV_FLOATS) ov_dot_f32(&dot, rows);
    else ov_dot_bf16(&dot, rows);
}

/* Adds the values of keys [begin, end), of the sixteen at `values`, to rows of `out`; others are not even read where
 * they fill a pair. weights: of the first of the sixteen, a row of them every OV_CHUNK floats. */
OV_INLINE void ov_add_values(const void *weights, const void *values, int64_t begin, int64_t end, int64_t width,
                             float *out, int rows, OvForm form) {
    OvDot dot = {.mask = UINT32_MAX, .out_stride = width, .add = 1};
    if (form == OV_FLOATS) {
        dot.x = (const float *)weights + begin;
        dot.x_stride = OV_CHUNK;
        dot.stride = width;
        dot.count = end - begin;
        for (int64_t d = 0; d < width; d += 16) {
            dot.vectors = (const float *)values + begin * width + d;
            dot.out = out + d;
            ov_dot_f32(&dot, rows);
        }
        return;
    }
    dot.x_stride = form == OV_PAIRS ? 2 * OV_CHUNK : OV_CHUNK;
    dot.stride = 2 * width;
    while (begin < end) {
        dot.mask = begin % 2 ? 0xFFFF0000u : end - begin == 1 ? 0xFFFFu : UINT32_MAX;
        int64_t pair = begin / 2;
        dot.count = dot.mask == UINT32_MAX ? (end - begin) / 2 : 1;
        dot.x = (const char *)weights + 2 * pair * (form == OV_PAIRS ? 2 : 4);
        for (int64_t d = 0; d < width; d += 16) {
            dot.vectors = (const uint16_t *)values + pair * 2 * width + 2 * d;
            dot.out = out + d;
            ov_dot_bf16(&dot, rows);
        }
        begin = 2 * (pair + dot.count);
    }
}

#endif
