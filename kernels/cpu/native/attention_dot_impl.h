/* The two products of attention in vector registers: q . k for sixteen keys in lanes, and weights . V for sixteen
 * dimensions in lanes. Up to eight rows share each load of K and V, and with AVX-512 they take two vectors of them at once,
 * or four where they are few: with fewer sums under way each would wait for its last product. Every row is summed in the
 * same order, dimensions or keys one after another, so it does not matter which rows these are.
 */
#ifndef OCTAVO_ATTENTION_DOT_IMPL_H
#define OCTAVO_ATTENTION_DOT_IMPL_H

#include "attention_softmax_impl.h"
#include "fetch_impl.h"

#ifdef __AVX512F__
#define OV_MOST_ROWS 8
#define OV_VECTORS_FOR(rows) ((rows) > 4 ? 2 : 4) /* up to 16 sums */
#else
#define OV_MOST_ROWS 4 /* a V16 is two of sixteen registers */
#define OV_VECTORS_FOR(rows) 1
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

/* What both products do for up to eight rows of x: vectors of 16 lanes, weighed by elements of x, summed up. x holds bf16
 * (OV_PAIRS) or fp32. */
typedef struct {
    const char *x;
    int64_t row_bytes;
    OvFetch *fetch; /* what to ask for meanwhile */
} OvDot;

/* sums[v][r] += x[r][i] * vectors[v][i], over `count` vectors of fp32 `stride` bytes apart, or as many pairs of bf16
 * vectors: x[r][2 i] * the first of the pair + x[r][2 i + 1] * the second; mask: which of the two count. */
OV_INLINE void ov_dot(const OvDot *dot, const char *x, const char *const *vectors, int64_t stride, int64_t count,
                      uint32_t mask, V16 *sums, int rows, int num_vectors, OvForm form) {
    for (int64_t i = 0; i < count; i++, x += form == OV_WIDE ? 8 : 4) {
        ov_fetch(dot->fetch, 64 * num_vectors);
        if (form == OV_FLOATS) {
            V16 vector[4];
            OV_UNROLL
            for (int v = 0; v < num_vectors; v++) vector[v] = v16_load((const float *)(vectors[v] + i * stride));
            OV_UNROLL
            for (int r = 0; r < rows; r++) {
                const V16 weight = v16_set(*(const float *)(x + r * dot->row_bytes));
                OV_UNROLL
                for (int v = 0; v < num_vectors; v++)
                    sums[v * rows + r] = v16_fma(weight, vector[v], sums[v * rows + r]);
            }
            continue;
        }
        OvPairs pairs[4];
        OV_UNROLL
        for (int v = 0; v < num_vectors; v++) pairs[v] = ov_load_pairs((const uint16_t *)(vectors[v] + i * stride), mask);
#ifdef __AVX512BF16__
        if (form == OV_PAIRS) {
            OV_UNROLL
            for (int r = 0; r < rows; r++) {
                int pair;
                memcpy(&pair, x + r * dot->row_bytes, 4);
                const __m512bh weights = (__m512bh)_mm512_set1_epi32(pair);
                OV_UNROLL
                for (int v = 0; v < num_vectors; v++)
                    sums[v * rows + r] = _mm512_dpbf16_ps(sums[v * rows + r], weights, (__m512bh)pairs[v]);
            }
            continue;
        }
#endif
        OV_UNROLL
        for (int v = 0; v < num_vectors; v++) {
            const V16 first = ov_pair_first(pairs[v]), second = ov_pair_second(pairs[v]);
            OV_UNROLL
            for (int r = 0; r < rows; r++) {
                const float *at = (const float *)(x + r * dot->row_bytes);
                V16 *sum = &sums[v * rows + r];
                *sum = v16_fma(v16_set(at[0]), first, *sum);
                *sum = v16_fma(v16_set(at[1]), second, *sum);
            }
        }
    }
}

/* ---------------------------------------------------------------------------------------------------------- scores */

/* `rows` rows of q against K of every sixteen keys of a chunk, of which groups [first, last) are wanted. */
typedef struct {
    OvDot q;
    const void *const *keys;
    int64_t first, last, width;
    float *scores; /* of the first row; a row every OV_CHUNK */
} OvScores;

OV_INLINE void ov_score_groups(const OvScores *s, int64_t group, int first_row, int rows, int num_groups, OvForm form) {
    V16 sums[16];
    const char *keys[4];
    OV_UNROLL
    for (int i = 0; i < num_groups * rows; i++) sums[i] = v16_zero();
    OV_UNROLL
    for (int v = 0; v < num_groups; v++) keys[v] = s->keys[group + v];
    ov_dot(&s->q, s->q.x + first_row * s->q.row_bytes, keys, 64, form == OV_FLOATS ? s->width : s->width / 2, UINT32_MAX,
           sums, rows, num_groups, form);
    float *scores = s->scores + first_row * OV_CHUNK + group * OV_KEYS;
    OV_UNROLL
    for (int v = 0; v < num_groups; v++) {
        OV_UNROLL
        for (int r = 0; r < rows; r++) v16_store(scores + r * OV_CHUNK + v * OV_KEYS, sums[v * rows + r]);
    }
}

OV_INLINE void ov_score_rows(const OvScores *s, int first_row, int rows, OvForm form) {
    int64_t group = s->first;
    for (; group + OV_VECTORS_FOR(rows) <= s->last; group += OV_VECTORS_FOR(rows))
        ov_score_groups(s, group, first_row, rows, OV_VECTORS_FOR(rows), form);
    for (; group < s->last; group++) ov_score_groups(s, group, first_row, rows, 1, form);
}

/* ---------------------------------------------------------------------------------------------------------- values */

/* Weights of `rows` rows times V of every sixteen keys of a chunk, of which keys [begin, end) are wanted; others are not
 * even read where they fill a pair. */
typedef struct {
    OvDot weights; /* of the chunk's first key */
    const void *const *values;
    int64_t begin, end, width;
    float *out; /* [rows][width] */
} OvValues;

/* Keys [begin, end) of sixteen, both even or of one pair. */
OV_INLINE void ov_add_keys(const OvValues *v, int64_t group, int64_t begin, int64_t end, uint32_t mask, int64_t d,
                           int first_row, V16 *sums, int rows, int num_vectors, OvForm form) {
    const int64_t step = form == OV_FLOATS ? 1 : 2, size = form == OV_FLOATS ? 4 : 2; /* keys; bytes of an element */
    const char *x = v->weights.x + first_row * v->weights.row_bytes + (group * OV_KEYS + begin) * (form == OV_PAIRS ? 2 : 4);
    const char *vectors[4];
    OV_UNROLL
    for (int i = 0; i < num_vectors; i++)
        vectors[i] = (const char *)v->values[group] + (begin * v->width + step * (d + 16 * i)) * size;
    ov_dot(&v->weights, x, vectors, step * v->width * size, (end - begin) / step, mask, sums, rows, num_vectors, form);
}

OV_INLINE void ov_value_vectors(const OvValues *v, int64_t d, int first_row, int rows, int num_vectors, OvForm form) {
    V16 sums[16];
    OV_UNROLL
    for (int i = 0; i < num_vectors * rows; i++) sums[i] = v16_zero();
    int64_t begin = v->begin;
    if (form != OV_FLOATS && begin % 2 != 0) {
        ov_add_keys(v, begin / OV_KEYS, begin % OV_KEYS - 1, begin % OV_KEYS + 1, 0xFFFF0000u, d, first_row, sums, rows,
                    num_vectors, form);
        begin++;
    }
    const int64_t end = form == OV_FLOATS ? v->end : v->end & ~1;
    while (begin < end) {
        const int64_t group = begin / OV_KEYS, base = group * OV_KEYS, until = ov_min(end, base + OV_KEYS);
        ov_add_keys(v, group, begin - base, until - base, UINT32_MAX, d, first_row, sums, rows, num_vectors, form);
        begin = until;
    }
    if (begin < v->end)
        ov_add_keys(v, begin / OV_KEYS, begin % OV_KEYS, begin % OV_KEYS + 2, 0xFFFFu, d, first_row, sums, rows,
                    num_vectors, form);
    float *out = v->out + first_row * v->width + d;
    OV_UNROLL
    for (int i = 0; i < num_vectors; i++) {
        OV_UNROLL
        for (int r = 0; r < rows; r++) v16_store(out + r * v->width + 16 * i, sums[i * rows + r]);
    }
}

OV_INLINE void ov_value_rows(const OvValues *v, int first_row, int rows, OvForm form) {
    int64_t d = 0;
    for (; d + 16 * OV_VECTORS_FOR(rows) <= v->width; d += 16 * OV_VECTORS_FOR(rows))
        ov_value_vectors(v, d, first_row, rows, OV_VECTORS_FOR(rows), form);
    for (; d < v->width; d += 16) ov_value_vectors(v, d, first_row, rows, 1, form);
}

/* --------------------------------------------------------------------------------------------------- any number of rows */

#if OV_MOST_ROWS == 8
#define OV_MORE_ROWS(f, ...) \
    case 7: f(__VA_ARGS__, 7, form); break; \
    case 6: f(__VA_ARGS__, 6, form); break; \
    case 5: f(__VA_ARGS__, 5, form); break; \
    case 4: f(__VA_ARGS__, 4, form); break;
#else
#define OV_MORE_ROWS(f, ...)
#endif
#define OV_ALL_ROWS(f, product, rows) \
    int first = 0; \
    for (; first + OV_MOST_ROWS <= rows; first += OV_MOST_ROWS) f(product, first, OV_MOST_ROWS, form); \
    switch (rows - first) { \
        OV_MORE_ROWS(f, product, first) \
    case 3: f(product, first, 3, form); break; \
    case 2: f(product, first, 2, form); break; \
    case 1: f(product, first, 1, form); break; \
    default: break; \
    }

OV_INLINE void ov_score_keys(const OvScores *scores, int rows, OvForm form) { OV_ALL_ROWS(ov_score_rows, scores, rows) }
OV_INLINE void ov_sum_values(const OvValues *values, int rows, OvForm form) { OV_ALL_ROWS(ov_value_rows, values, rows) }

#endif
