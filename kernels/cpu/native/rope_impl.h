/* Rotary positions (Su et al. 2021) for q and k, and the new K/V written to their slots.
 *
 * Dimension i turns with i + rotary_dim / 2 ("neox" pairing); dimensions from rotary_dim on stay as they are. All in
 * fp32, rounded to the working type once at the end, the optional norm of each head included.
 */
#ifndef OCTAVO_ROPE_IMPL_H
#define OCTAVO_ROPE_IMPL_H

#include "attention.h"
#include "elementwise_impl.h"

/* x = norm(x) * weight, both fp32 [width]. */
OV_INLINE void ov_norm_head(float *x, const float *weight, float eps, int64_t width) {
    float squares = ov_sum_squares(x, 1.0f, NULL, NULL, width, 0);
    ov_norm_row(x, squares, weight, x, width, eps, 0);
}

OV_INLINE V16 ov_load_up_to(const float *p, int n) { return n == 16 ? v16_load(p) : v16_load_part(p, n); }

OV_INLINE void ov_store_up_to(float *p, V16 x, int n) {
    if (n == 16) v16_store(p, x);
    else v16_store_part(p, x, n);
}

/* cos_sin: a row of the rope table, `half` cosines and then `half` sines. */
OV_INLINE void ov_rotate(float *x, const float *cos_sin, int64_t half) {
    for (int64_t i = 0; i < half; i += 16) {
        int n = (int)ov_min(16, half - i);
        V16 cosine = ov_load_up_to(cos_sin + i, n), sine = ov_load_up_to(cos_sin + half + i, n);
        V16 first = ov_load_up_to(x + i, n), second = ov_load_up_to(x + half + i, n);
        V16 minus = v16_sub(v16_zero(), v16_mul(second, sine));
        ov_store_up_to(x + i, v16_fma(first, cosine, minus), n);
        ov_store_up_to(x + half + i, v16_fma(second, cosine, v16_mul(first, sine)), n);
    }
}

/* A head of q or k: fetched, normalised if there is a weight, rotated. */
OV_INLINE void ov_turn_head(const void *from, float *x, const OvAttention *spec, const void *norm, const float *cos_sin,
                            int64_t half, int bf16) {
    int64_t width = spec->head_dim;
    for (int64_t i = 0; i < width; i += 16) v16_store(x + i, v16_get(from, i, 16, bf16));
    if (norm) ov_norm_head(x, (const float *)norm, spec->norm_eps, width);
    ov_rotate(x, cos_sin, half);
}

/* Writes x [head_dim] as key number `offset` of a block's K. */
OV_INLINE void ov_write_key(void *k, int64_t offset, const float *x, int64_t width, int bf16) {
    int64_t group = offset / OV_KEYS * OV_KEYS * width, lane = offset % OV_KEYS;
    if (!bf16) {
        float *to = (float *)k + group + lane;
        for (int64_t d = 0; d < width; d++) to[d * OV_KEYS] = x[d];
        return;
    }
    uint16_t *to = (uint16_t *)k + group + 2 * lane;
    for (int64_t d = 0; d < width; d += 16) {
        uint16_t rounded[16];
        _mm256_storeu_si256((__m256i *)rounded, v16_to_bf16(v16_load(x + d)));
        for (int i = 0; i < 16; i += 2) memcpy(to + (d + i) * OV_KEYS, rounded + i, 4);
    }
}

/* Writes the head of v at `from` as key number `offset` of a block's V. */
OV_INLINE void ov_write_value(void *v, int64_t offset, const void *from, int64_t width, int bf16) {
    if (!bf16) {
        memcpy((float *)v + offset * width, from, (size_t)width * 4);
        return;
    }
    uint16_t *to = (uint16_t *)v + (offset / 2 * width) * 2 + offset % 2;
    const uint16_t *bits = (const uint16_t *)from;
    for (int64_t d = 0; d < width; d++) to[2 * d] = bits[d];
}

/* Asks for the lines that the token's K and V will be written to, while its queries are computed. */
OV_INLINE void ov_fetch_slot(const OvOp *op, int64_t block, int64_t offset, int bf16) {
    const OvAttention *spec = op->spec;
    const int64_t width = spec->head_dim, element = bf16 ? 2 : 4;
    const int64_t keys = offset / OV_KEYS * OV_KEYS, values = bf16 ? offset / 2 * 2 : offset; /* bf16: V in pairs */
    for (int64_t head = 0; head < spec->num_kv_heads; head++) {
        const char *k = ov_at(op->out2, ov_kv_offset(spec, block, 0, head) + keys * width, bf16);
        const char *v = ov_at(op->out2, ov_kv_offset(spec, block, 1, head) + values * width, bf16);
        for (int64_t i = 0; i < width * OV_KEYS * element; i += 64) __builtin_prefetch(k + i, 1);
        for (int64_t i = 0; i < width * 4; i += 64) __builtin_prefetch(v + i, 1);
    }
}

OV_INLINE void ov_rope_write_row(const OvOp *op, const OvStep *step, int64_t r, int bf16) {
    const OvAttention *spec = op->spec;
    int64_t width = spec->head_dim, half = op->n[0] / 2, slot = step->groups[op->n[1]].slots[r];
    const float *cos_sin = (const float *)op->weight + step->positions[r] * op->n[0];
    const void *row = ov_at(op->a, r * op->stride_a, bf16);
    float x[OV_MAX_HEAD_DIM] __attribute__((aligned(64)));
    void *q = ov_at(op->out, r * op->stride_out, bf16);
    int64_t block = slot / spec->block_size, offset = slot % spec->block_size;
    if (slot >= 0) ov_fetch_slot(op, block, offset, bf16);
    for (int64_t head = 0; head < spec->num_heads; head++) {
        ov_turn_head(ov_at(row, head * width, bf16), x, spec, spec->q_norm, cos_sin, half, bf16);
        for (int64_t i = 0; i < width; i += 16) v16_put(q, head * width + i, v16_load(x + i), 16, bf16);
    }
    if (slot < 0) return;
    for (int64_t head = 0; head < spec->num_kv_heads; head++) {
        const void *k = ov_at(row, (spec->num_heads + head) * width, bf16);
        const void *v = ov_at(k, spec->num_kv_heads * width, bf16);
        ov_turn_head(k, x, spec, spec->k_norm, cos_sin, half, bf16);
        ov_write_key(ov_at(op->out2, ov_kv_offset(spec, block, 0, head), bf16), offset, x, width, bf16);
        ov_write_value(ov_at(op->out2, ov_kv_offset(spec, block, 1, head), bf16), offset, v, width, bf16);
    }
}

static void ov_rope_write(const OvOp *op, const OvStep *step, OvWorker *w) {
    OV_FOR_ROWS(op, step, w, ov_rope_write_row);
}

#endif
