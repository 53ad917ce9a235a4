/* Scores to weights within a chunk, and chunks merged: the running maximum and sum of Milakov & Gimelshein (2018), as
 * in FlashAttention, but per chunk of absolute position.
 *
 * Maxima are in units of log2, so that one product takes a score there. The sum is over the weights as they were
 * rounded for the product with V, hence the weights that V meets add up to 1.
 */
#ifndef OCTAVO_ATTENTION_SOFTMAX_IMPL_H
#define OCTAVO_ATTENTION_SOFTMAX_IMPL_H

#include <math.h>

#include "attention.h"
#include "vec_math.h"

#define OV_STEP 32 /* keys: what one product of tiles adds up, at multiples of this in a chunk */

/* How q, the weights, K and V lie, and what multiplies them. */
typedef enum {
    OV_FLOATS, /* all fp32 */
    OV_PAIRS,  /* all bf16, in pairs */
    OV_WIDE    /* K and V bf16, q and weights bf16 values kept as fp32: no product of pairs in AVX2 */
} OvForm;

#ifdef __AVX512BF16__
#define OV_BF16_FORM OV_PAIRS
#else
#define OV_BF16_FORM OV_WIDE
#endif

/* Steps [from, to) of a row's weights become 0. */
OV_INLINE void ov_no_weights(float *row, int64_t from, int64_t to, OvForm form) {
    size_t bytes = OV_STEP * (form == OV_PAIRS ? 2 : 4);
    if (from < to) memset((char *)row + from * bytes, 0, (size_t)(to - from) * bytes);
}

/* Scores of keys outside [begin, end) become -inf, from the step of the first to that of the last. */
OV_INLINE void ov_mask_scores(float *row, int64_t begin, int64_t end) {
    const V16 none = v16_set(-INFINITY);
    int64_t first = begin / OV_STEP * OV_STEP, last = ov_ceil_div(end, OV_STEP) * OV_STEP;
    for (int64_t i = first; i < begin; i += 16)
        v16_store(row + i, v16_keep(v16_load(row + i), none, (int)ov_min(begin - i, 16), 16));
    for (int64_t i = end / 16 * 16; i < last; i += 16)
        v16_store(row + i, v16_keep(v16_load(row + i), none, 0, end > i ? (int)(end - i) : 0));
}

/* Weights of 32 keys from their scores, written in their form; what was written is added to the sums. */
OV_INLINE void ov_weigh_step(float *row, int64_t step, V16 scale, V16 minus_max, V16 *sums, OvForm form) {
    const float *from = row + step * OV_STEP;
    V16 a = v16_exp2(v16_fma(v16_load(from), scale, minus_max));
    V16 b = v16_exp2(v16_fma(v16_load(from + 16), scale, minus_max));
#ifdef __AVX512BF16__
    if (form == OV_PAIRS) {
        __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh(b, a);
        _mm512_storeu_si512((uint16_t *)row + step * OV_STEP, pairs);
        const __m512i odd = _mm512_set1_epi32((int)0xFFFF0000);
        sums[0] = v16_add(sums[0], _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
        sums[1] = v16_add(sums[1], _mm512_castsi512_ps(_mm512_and_si512(pairs, odd)));
        return;
    }
#endif
    if (form == OV_WIDE) {
        a = v16_rounded(a, 1);
        b = v16_rounded(b, 1);
    }
    v16_store(row + step * OV_STEP, a);
    v16_store(row + step * OV_STEP + 16, b);
    sums[0] = v16_add(sums[0], a);
    sums[1] = v16_add(sums[1], b);
}

/* What takes a score (after its cap) to units of log2. */
OV_INLINE float ov_log2_factor(const OvAttention *spec) {
    return (spec->soft_cap > 0.0f ? spec->soft_cap : spec->scale) * 1.44269504f;
}

/* The largest score in units of log2 of a row that sees keys [begin, end) of the chunk, at least one. The row holds q . k
 * as they are; afterwards, scores with their cap, and -inf for the other keys of steps that the row looks at. */
OV_INLINE float ov_largest_score(float *row, int64_t begin, int64_t end, const OvAttention *spec) {
    int64_t from = begin / OV_STEP * OV_STEP, to = ov_ceil_div(end, OV_STEP) * OV_STEP;
    if (spec->soft_cap > 0.0f) { /* cap * tanh(q . k * scale / cap); the cap itself comes with the factor */
        V16 inner = v16_set(spec->scale / spec->soft_cap);
        for (int64_t i = from; i < to; i += 16) v16_store(row + i, v16_tanh(v16_mul(v16_load(row + i), inner)));
    }
    ov_mask_scores(row, begin, end);
    V16 most = v16_set(-INFINITY), other = most;
    for (int64_t i = from; i < to; i += OV_STEP) {
        most = v16_max(most, v16_load(row + i));
        other = v16_max(other, v16_load(row + i + 16));
    }
    return v16_largest(v16_max(most, other)) * ov_log2_factor(spec);
}

/* A row's scores, as ov_largest_score left them, become weights in place in steps [first_step, last_step); those of keys
 * outside [begin, end) exactly 0. Their sum. */
OV_INLINE float ov_weigh_row(float *row, int64_t begin, int64_t end, int64_t first_step, int64_t last_step, float factor,
                             float max, OvForm form) {
    int64_t from = begin / OV_STEP, to = ov_ceil_div(end, OV_STEP);
    V16 sums[2] = {v16_zero(), v16_zero()};
    for (int64_t step = from; step < to; step++)
        ov_weigh_step(row, step, v16_set(factor), v16_set(-max), sums, form);
    ov_no_weights(row, first_step, from, form);
    ov_no_weights(row, to, last_step, form);
    return v16_sum(v16_add(sums[0], sums[1]));
}

/* A row's sum of values over the chunks so far, relative to their maximum. Nothing seen yet: sum 0. */
typedef struct {
    float *values; /* [head_dim] */
    float *max, *sum;
} OvRowState;

/* Takes the next chunk of a row into its state. The first is taken as it is. */
OV_INLINE void ov_merge_row(OvRowState into, const float *values, float max, float sum, int64_t width) {
    if (sum == 0.0f) return; /* none of its keys seen; a NaN goes on */
    if (*into.sum == 0.0f) {
        memcpy(into.values, values, (size_t)width * 4);
        *into.max = max;
        *into.sum = sum;
        return;
    }
    float larger = max > *into.max ? max : *into.max;
    V16 old_factor = v16_exp2(v16_set(*into.max - larger)), new_factor = v16_exp2(v16_set(max - larger));
    for (int64_t i = 0; i < width; i += 16) {
        V16 added = v16_mul(v16_load(values + i), new_factor);
        v16_store(into.values + i, v16_fma(v16_load(into.values + i), old_factor, added));
    }
    V16 sums = v16_fma(v16_set(*into.sum), old_factor, v16_mul(v16_set(sum), new_factor));
    *into.max = larger;
    *into.sum = v16_first(sums);
}

/* The finished row. Adding 0 makes a -0 of nothing but underflow the 0 that other paths have. */
OV_INLINE void ov_finish_row(OvRowState state, void *out, int64_t width, int bf16) {
    V16 inverse = v16_set(*state.sum == 0.0f ? 0.0f : 1.0f / *state.sum);
    for (int64_t i = 0; i < width; i += 16) {
        V16 x = *state.sum == 0.0f ? v16_zero() : v16_load(state.values + i);
        v16_put(out, i, v16_add(v16_mul(x, inverse), v16_zero()), 16, bf16);
    }
}

#endif
